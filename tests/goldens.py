"""The golden folders: tiny bases, adapters as the authors' code writes them, and the numbers that it computed with them."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from moa_serve import AdapterSource

DATA = Path(__file__).parent / "golden" / "data"
NAMES = {"FFN_UP": "UP", "FFN_GATE": "GATE", "FFN_DOWN": "DOWN"}  # theirs -> ours


@dataclass(frozen=True)
class Golden:
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def meta(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "meta.json").read_text()))

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        return load_file(self.folder / "expected.safetensors")

    @property
    def family(self) -> str:
        return "qwen3" if "qwen3" in self.name else "llama"

    @property
    def base(self) -> Path:
        """All folders of one architecture have the same base; the shipped ones keep it once."""
        own = self.folder / "base"
        return own if own.exists() else DATA / "bases" / self.family

    @property
    def is_pooled(self) -> bool:
        return self.meta["variant"] in ("soft_moa_instance", "unipeft")

    @property
    def source(self) -> AdapterSource:
        """Instance-level files look like token-level ones, so their variant has to be said."""
        variant = "soft_moa_instance" if self.meta["variant"] == "soft_moa_instance" else None
        return AdapterSource(self.folder / "adapter", variant)

    @property
    def prompts(self) -> list[list[int]]:
        return [[int(token) for token in row] for row in self.expected["input_ids"]]

    @property
    def num_layers(self) -> int:
        return int(self.meta["llama_params"]["n_layers"]) if "llama_params" in self.meta else 4


def goldens() -> list[Golden]:
    """Those shipped with the tests and those of MOA_GOLDEN_DIR, each once."""
    roots = [Path(root) for root in (os.environ.get("MOA_GOLDEN_DIR"), DATA) if root]
    found = {
        folder.name: Golden(folder) for root in reversed(roots) for folder in root.iterdir() if (folder / "expected.safetensors").exists()
    }
    return [found[name] for name in sorted(found)]
