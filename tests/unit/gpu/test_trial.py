"""The trial that a GPU's kernels have to pass before they serve, here in the interpreter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_base
from kernel_device import DEVICE, MARKS

from moa_serve.gpu.layout import SlotShape
from moa_serve.gpu.model import FusedTransformer
from moa_serve.gpu.trial import what_is_wrong
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base

pytestmark = MARKS
LORA = frozenset(("Q", "K", "V", "O", "UP", "GATE", "DOWN"))
SHAPES = {
    "sparse": SlotShape(outputs=9, hidden=8, targets=LORA, rank=4, columns=4, parallel=5, parallel_columns=6, prompt=3, residual=True),
    "molora": SlotShape(inner=3, inner_sites=frozenset("QO"), targets=frozenset("QO"), rank=6, columns=6),
    "lora": SlotShape(targets=frozenset(("V", "DOWN")), rank=2, columns=2),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_right_kernels_pass(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model, definition = models(tmp_path, SHAPES[name], dtype)
    assert what_is_wrong(model, definition) is None


def test_a_kernel_that_fails_or_errs_is_named(tmp_path: Path) -> None:
    """A GPU that computes something else must not serve."""

    def failing(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        raise RuntimeError("no kernel image is available\nfor this device")

    model, definition = models(tmp_path, SHAPES["lora"], torch.float32, launch=failing)
    reason = what_is_wrong(model, definition)
    assert reason == "its kernels do not run on this device (RuntimeError: no kernel image is available)"

    model, definition = models(tmp_path, SHAPES["lora"], torch.float32)
    model.bank.matrices.fill_(0.5)
    model.bank.fill = lambda slot, found: None  # type: ignore[method-assign]  # nothing comes into the slot
    reason = what_is_wrong(model, definition)
    assert reason is not None
    assert reason.startswith("its kernels compute other logits than the definition does (with the adapter, apart by ")


def models(folder: Path, shape: SlotShape, dtype: torch.dtype, **more: Any) -> tuple[FusedTransformer, Transformer]:
    base = load_base(write_base(folder / "base"), device=DEVICE, dtype=dtype)
    model = FusedTransformer(base.config, base.weights, num_slots=2, shape=shape, max_tokens=32, **more)
    return model, Transformer(base.config, base.weights)
