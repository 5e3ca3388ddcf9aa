"""Images of adapters in host memory, and what is said of an adapter that fits into no slot."""

import logging

import numpy as np
import pytest
import torch
from families import TINY, random_adapter

from moa_serve.adapter.adapter import Adapter
from moa_serve.config import ModelConfig
from moa_serve.gpu.layout import SlotShape
from moa_serve.gpu.model import FusedTransformer
from moa_serve.gpu.slots import Images, SlotImage, SlottedAdapter
from moa_serve.model.weights import allocate


def image_of(num_bytes: int) -> SlotImage:
    none = torch.zeros(0)
    return SlotImage({}, none, none, torch.zeros(num_bytes, dtype=torch.uint8), none)


def test_images_that_were_not_used_lately_leave_before_memory_is_pinned_without_end() -> None:
    """Pinned memory is never swapped out: hundreds of adapters would take a machine's memory away."""
    images = Images(max_bytes=100)
    none = np.zeros(0, dtype=np.int64)
    known = SlottedAdapter(random_adapter("lora")[0], -1, (), none, none)
    for name in ("a", "b"):
        images.put(name, known, image_of(50))
    assert images.get("a") is not None
    images.put("c", known, image_of(50))
    assert images.get("b") is None
    assert images.get("a") is not None
    assert images.get("c") is not None
    images.put("large", known, image_of(1000))
    assert images.get("large") is not None, "whoever loads it is to have it"
    assert images.get("c") is None
    images.drop("large")
    assert images.get("large") is None


def test_an_adapter_that_fits_into_no_slot_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """It is computed more slowly, which nobody sees in its answers."""
    config = ModelConfig.from_hf(TINY)
    manifest, tensors = random_adapter("soft")
    weights = allocate(config, torch.device("cpu"), torch.float32)
    model = FusedTransformer(config, weights, num_slots=1, shape=SlotShape(), max_tokens=8)
    adapter = Adapter(manifest, tensors, "0123456789abcdef", "test")
    with caplog.at_level(logging.WARNING):
        model.warm(adapter)
        model.warm(adapter)
    assert [record.getMessage() for record in caplog.records] == [
        "adapter revision 0123456789ab is larger than a slot of the triton backend: its rows are computed by torch, one operation at a "
        "time; slots are as large as the adapters that are known when the server starts, so start it again with this one in its folder"
    ]
