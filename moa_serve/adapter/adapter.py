"""Adapter and AdapterSource: one adapter in host memory, and where it comes from.

Plain data, immutable: made by a loader thread, then read by whoever holds a lease. Files are importers/, lifetimes store.py.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from moa_serve.adapter.manifest import Manifest


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A folder with an adapter in any importable format; `variant` says which one it is where the files alone cannot."""

    path: str | os.PathLike[str]
    variant: str | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated adapter. `tensors` are exactly those of the manifest, on the CPU, in the file's dtype, in memory of their own.

    `revision` is the digest of manifest and tensors: what differs in anything that could change an answer differs here.
    `source_format` is moa-adapter/1, meta, hf_moa or peft.
    """

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    revision: str
    source_format: str
    warnings: tuple[str, ...] = ()

    @cached_property
    def num_bytes(self) -> int:
        """Host memory of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @cached_property
    def bytes_by_owner(self) -> Mapping[tuple[str | None, int], int]:
        """The same by expert and layer, as the file stores it. None: what belongs to no expert alone, as in `Manifest.owners`."""
        found: dict[tuple[str | None, int], int] = {}
        for name, owner in self.manifest.owners().items():
            found[owner] = found.get(owner, 0) + self.tensors[name].nbytes
        return found
