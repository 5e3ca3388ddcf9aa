"""How kernels are called: one place, so that whoever wants to know a step's launches can stand in for it."""

from typing import Any, Protocol


class Launch(Protocol):
    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Run a jitted kernel on a grid; `options` are its constants, num_warps and num_stages."""
        ...


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    kernel[grid](*args, **options)
