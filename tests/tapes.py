"""A stand-in for CUDA graphs on a CPU: what was computed once is computed again, operation by operation, on the very same tensors.

As a graph, a tape knows nothing of what is around it: no Python runs at a replay, so whatever a step reads must stand where it stood.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from moa_serve.gpu.launch import launch


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own annotation is missing
    """Of one computation; `entries` are its operations and launches, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries: list[Callable[[], None]] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), f"{func} waits for the device"
        inputs = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs]

        def again() -> None:
            new = [tensor for tensor in tree_leaves(func(*args, **kwargs)) if isinstance(tensor, Tensor)]
            if made:
                for old, fresh in zip(made, new, strict=True):
                    old.copy_(fresh)

        self.entries.append(again)
        self.names.append(str(func))
        return out

    def launched(self, kernel: Any, grid: tuple[int, ...], args: Any, options: Any) -> None:
        self.entries.append(lambda: launch(kernel, grid, *args, **options))
        self.names.append(kernel.fn.__name__)

    def replay(self) -> None:
        for entry in self.entries:
            entry()


class TapeRecorder:
    """For moa_serve.gpu.graphs.RowGraphs; `launch` is what the model has to call kernels with."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self._running: Tape | None = None

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        with _disable_current_modes():  # what the interpreter does inside is no operation of ours
            launch(kernel, grid, *args, **options)
        if self._running is not None:
            self._running.launched(kernel, grid, args, options)

    def record(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        tape = Tape()
        self._running = tape
        try:
            with tape:
                out = compute()
        finally:
            self._running = None
        self.tapes.append(tape)

        def replay() -> Tensor:
            with torch.inference_mode():
                tape.replay()
            return out

        return replay

    def renew(self) -> None:
        self.tapes.clear()
