"""Making adapters and judging them: data files, prompts, training, evaluation.

Nothing that serves imports it. It computes with the same torch module that serves, and scores through the serving engine.
"""
