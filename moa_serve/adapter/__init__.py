"""Adapters as files and in host memory: no request, no HTTP, no forward pass."""
