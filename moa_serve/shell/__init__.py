"""What the commands of `moa-serve` read and show: prompts, the choice of adapters, tables.

Only `__main__` imports it. It knows LLM's public surface and the terminal; it computes nothing that a Python user could not.
"""
