"""Kernels of these tests run in Triton's interpreter where there is no GPU; here it is made twice as quick."""

from collections.abc import Iterator
from typing import Any

import pytest
import triton
from triton.runtime import interpreter


@pytest.fixture(scope="package", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Triton (3.7) puts its stand-ins into the language at every call from kernel to function, which takes longer than most functions:
    once for each module in a launch is enough."""
    if not triton.knobs.runtime.interpret:
        yield
        return
    patched: set[int] = set()
    launch = interpreter.GridExecutor.__call__

    def launched(self: Any, *args: Any, **options: Any) -> Any:
        patched.clear()
        return launch(self, *args, **options)

    def called(self: Any, *args: Any, **options: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        patch.setattr(interpreter.InterpretedFunction, "__call__", called)
        yield
