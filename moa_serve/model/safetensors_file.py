"""Reading and writing safetensors files tensor by tensor, without ever holding a second copy of the weights.

`safetensors.safe_open` maps the whole file, and every page that was touched counts as memory for as long as the map lives, so a load
through it peaks at twice the weights. Here the library checks the header, and the bytes are read by their offset straight into the
tensor that is kept. Not for adapters, which are small.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moa_serve.errors import ModelCorrupt, ModelNotFound, ModelUnsupported

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK_BYTES = 8 * 2**20  # of scratch where bytes cannot go straight to their place; larger is not faster


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `offset` and `num_bytes` in the file, `dtype` by the format's own name (F32, BF16 ...)."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsFile:
    """The header of one file. Holds no file handle and no map; `path` is opened for each read."""

    def __init__(self, path: Path) -> None:
        """Raises: ModelNotFound where there is no such file, ModelCorrupt where its header or its length is wrong."""
        self.path = path
        try:
            with path.open("rb") as file:  # first, since of a file that may not be read the library says that there is none
                with safe_open(path, framework="pt"):
                    pass  # it checks length, JSON, dtypes, and that the tensors tile the file exactly
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except FileNotFoundError:
            raise ModelNotFound(f"{path}: there is no such file; fetch the model again") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelCorrupt(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
        header.pop("__metadata__", None)
        self.tensors: dict[str, TensorEntry] = {}
        for name, item in header.items():
            start, end = item["data_offsets"]
            self.tensors[name] = TensorEntry(item["dtype"], tuple(item["shape"]), 8 + size + start, end - start)

    def read_into(self, name: str, destination: Tensor) -> None:
        """Copy tensor `name` into `destination`: same shape, contiguous, any dtype and device; converts on the way.

        Raises:
            ModelUnsupported: the tensor is not of a float type (quantised weights).
        """
        entry = self.tensors[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise ModelUnsupported(
                f"{self.path}: tensor {name} is {entry.dtype}; served are {', '.join(DTYPES)} (use the unquantised weights or a GGUF file)"
            )
        flat = destination.view(-1)
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            if flat.device.type == "cpu" and flat.dtype == dtype:
                _read_exactly(file, flat.view(torch.uint8), self.path)
                return
            scratch = torch.empty(min(flat.numel(), _CHUNK_BYTES // dtype.itemsize), dtype=dtype)
            for start in range(0, flat.numel(), max(scratch.numel(), 1)):
                part = scratch[: flat.numel() - start]
                _read_exactly(file, part.view(torch.uint8), self.path)
                flat[start : start + part.numel()].copy_(part)

    def sha256(self, name: str) -> str:
        """Of the tensor's bytes alone: two tensors are equal where dtype, shape and this are."""
        entry, digest = self.tensors[name], hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            left = entry.num_bytes
            while left and (block := file.read(min(left, _CHUNK_BYTES))):
                digest.update(block)
                left -= len(block)
        return digest.hexdigest()


def _read_exactly(file: BinaryIO, into: Tensor, path: Path) -> None:
    """Fill `into` (N,) uint8; one `readinto` stops at 2 GiB, so it takes as many as are needed."""
    view = into.numpy().data
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise ModelCorrupt(f"{path}: ends too early; it changed while it was read, load it again")
        view = view[count:]


def write_safetensors(
    path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write tensors one by one as `tensors` makes them, so that only one is in memory.

    Args:
        entries: name -> (dtype, shape) of every tensor, in the order in which `tensors` gives them.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for name, (dtype, shape) in entries.items():
        num_bytes = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format keeps the data 8-byte aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for (name, (dtype, shape)), (given, tensor) in zip(entries.items(), tensors, strict=True):
            assert (name, shape) == (given, tuple(tensor.shape)), (name, shape, given, tensor.shape)
            file.write(tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
