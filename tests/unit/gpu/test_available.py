"""Which backend serves a GPU, and what is said where the kernels cannot be had or fail their trial."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_base

from moa_serve.errors import InvalidRequest
from moa_serve.gpu import available, trial
from moa_serve.gpu.available import why_no_kernels
from moa_serve.gpu.model import FusedTransformer
from moa_serve.llm import new_model, resolve_backend
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU that torch finds, of which nothing is asked but this."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return monkeypatch


def test_a_gpu_is_served_by_its_kernels(gpu: pytest.MonkeyPatch) -> None:
    assert why_no_kernels(CUDA) is None
    assert [resolve_backend(asked, CUDA) for asked in ("auto", "triton", "torch")] == ["triton", "triton", "torch"]


@pytest.mark.parametrize("missing", ["triton", "capability", "device", "pages"])
def test_without_what_they_need_torch_serves_and_says_why(gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, missing: str) -> None:
    """`auto` falls back and says so; who asked for the backend by its name is refused with the same reason."""
    if missing == "triton":
        found = importlib.util.find_spec
        gpu.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "triton" else found(name, *more))
    elif missing == "capability":
        gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    elif missing == "device":
        gpu.setattr(torch.cuda, "is_available", lambda: False)
    reason = {
        "triton": "the package triton is not installed",
        "capability": "its kernels need a GPU of compute capability 8.0 or more, and this one has 7.5",
        "device": "torch finds no CUDA device",
        "pages": "its pages hold a power of two of tokens, and block_size is 24",
    }[missing]
    block_size = 24 if missing == "pages" else 16
    with caplog.at_level(logging.WARNING):
        assert resolve_backend("auto", CUDA, block_size) == "torch"
    assert f"the torch backend serves, because {reason}" in caplog.text
    with pytest.raises(InvalidRequest, match=f"backend 'triton' cannot be used: {reason}"):
        resolve_backend("triton", CUDA, block_size)


def test_on_a_cpu_kernels_are_for_tests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InvalidRequest, match="compute on a GPU, and the device is cpu; set TRITON_INTERPRET=1"):
        resolve_backend("triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", CPU) == "triton"
    assert resolve_backend("auto", CPU) != "triton"
    assert available.LEAST_CAPABILITY == (8, 0)


def test_kernels_that_fail_their_trial_do_not_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A GPU that computes something else is served by torch where the backend was left to us, and refused where it was named."""

    class OnCuda(FusedTransformer):
        """As if its device were a GPU, to which a trial belongs."""

        @property
        def device(self) -> Any:
            return CUDA if self._is_made else CPU

        @device.setter
        def device(self, value: torch.device) -> None:
            pass

        _is_made = False

        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            self._is_made = True

    monkeypatch.setattr("moa_serve.gpu.model.FusedTransformer", OnCuda)
    monkeypatch.setattr(trial, "what_is_wrong", lambda model, definition: "its kernels compute other logits")
    base = load_base(write_base(tmp_path / "base"), dtype=torch.float32)
    with caplog.at_level(logging.WARNING):
        model = new_model("triton", base, may_fall_back=True)
    assert isinstance(model, Transformer)
    assert "the torch backend serves, because its kernels compute other logits; moa-serve doctor says more" in caplog.text
    base = load_base(tmp_path / "base", dtype=torch.float32)
    with pytest.raises(
        InvalidRequest, match="backend 'triton' cannot be used: its kernels compute other logits; 'auto' and 'torch' do without"
    ):
        new_model("triton", base)
    monkeypatch.setattr(trial, "what_is_wrong", lambda model, definition: None)
    assert isinstance(new_model("triton", load_base(tmp_path / "base", dtype=torch.float32)), OnCuda)
