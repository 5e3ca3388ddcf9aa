"""What is said of a GPU: which there is, or why torch uses none; and what becomes of `device` then."""

import logging
from pathlib import Path

import pytest
import torch

from moa_serve.errors import InvalidRequest
from moa_serve.llm import resolve_device
from moa_serve.model.devices import cuda_status, has_gpu, why_no_cuda

SIGNS = ["proc/driver/nvidia/gpus/0000:01:00.0", "dev/nvidia0", "dev/dxg"]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torch finds no device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def machine(root: Path, *signs: str) -> Path:
    for sign in ("dev/nvidiactl", "dev/null", *signs):
        (root / sign).parent.mkdir(parents=True, exist_ok=True)
        (root / sign).touch()
    return root


@pytest.mark.parametrize("sign", SIGNS)
def test_a_gpu_is_seen_whatever_torch_can_do(tmp_path: Path, sign: str) -> None:
    assert not has_gpu(machine(tmp_path / "none"))
    assert has_gpu(machine(tmp_path / "one", sign))


@pytest.mark.parametrize(
    ("built", "sign", "words"),
    [
        (None, SIGNS[:1], ["is built without CUDA", "install a torch with CUDA"]),
        (None, [], ["is built without CUDA"]),
        ("13.0", SIGNS[1:2], ["cannot use the NVIDIA GPU", "nvidia-smi", "CUDA 13.0", "CUDA_VISIBLE_DEVICES"]),
        ("13.0", [], ["no NVIDIA GPU is visible", "--gpus 1"]),
    ],
)
def test_the_reason_tells_what_to_do(
    tmp_path: Path, without: pytest.MonkeyPatch, built: str | None, sign: list[str], words: list[str]
) -> None:
    """A torch without CUDA, an old driver and a container without the device look the same from within."""
    without.setattr(torch.version, "cuda", built)
    reason = why_no_cuda(machine(tmp_path, *sign))
    assert all(word in reason for word in words), reason
    assert ("GPU" in reason) == bool(sign or built)


def test_a_gpu_that_cannot_be_used_is_warned_of(without: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A server that is twenty times slower than its hardware looks healthy."""
    without.setattr("moa_serve.llm.has_gpu", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    assert not caplog.records
    without.setattr("moa_serve.llm.has_gpu", lambda: True)
    with caplog.at_level(logging.WARNING):
        assert resolve_device("auto") == torch.device("cpu")
        assert "the CPU computes, because torch" in caplog.text
        caplog.clear()
        assert resolve_device("cpu") == torch.device("cpu")  # as somebody wants it
    assert not caplog.records


def test_cuda_where_there_is_none_is_refused_with_the_reason(without: pytest.MonkeyPatch) -> None:
    assert cuda_status() == f"not available: {why_no_cuda()}"
    with pytest.raises(InvalidRequest) as caught:
        resolve_device("cuda")
    assert str(caught.value) == f"device 'cuda' was asked for, but {why_no_cuda()}; 'cpu' and 'auto' do without"


@pytest.mark.parametrize(("count", "others"), [(1, ""), (2, " (the first of 2 devices)")])
def test_the_device_in_use_is_named(monkeypatch: pytest.MonkeyPatch, count: int, others: str) -> None:
    class Found:
        name, major, minor, total_memory = "NVIDIA Made-Up", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", pytest.fail)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert cuda_status().startswith("available and not in use: ")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Found)
    assert cuda_status() == f"available: NVIDIA Made-Up, compute capability 9.0, 80.00 GiB{others}"
