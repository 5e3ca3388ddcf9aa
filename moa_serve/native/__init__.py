"""The native backend: a C++ library that computes a whole step in one call, its loader, and the packing of weights for it.

`src/` is the library (abi.h is its interface), `compile` builds it, `library` loads it, `packing` and `program` lay out weights and
adapters, `model` is what the engine runs. Not for CUDA; where it cannot serve, the torch backend does.
"""
