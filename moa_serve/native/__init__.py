"""The native backend, in progress: a C++ library that computes a whole step in one call, its build, its loader, and its layouts.

`src/` is the library (abi.h is its interface), `compile` builds it, `library` loads it, `packing` lays out weights for it. Nothing imports
this yet: the torch backend serves. Not for CUDA.
"""
