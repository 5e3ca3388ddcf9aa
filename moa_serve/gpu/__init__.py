"""Triton kernels of a decode step with adapters; on a CPU they run in Triton's interpreter, for tests."""
