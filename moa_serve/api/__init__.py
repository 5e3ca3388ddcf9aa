"""The HTTP surface: OpenAI's routes, adapters at run time, health and metrics. HTTP, JSON, SSE and text; no tensors."""
