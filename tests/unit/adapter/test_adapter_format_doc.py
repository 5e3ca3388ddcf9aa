"""docs/adapter-format.md: its example is an adapter, and its table names every tensor."""

import json
import re
from pathlib import Path

import pytest
from support import random_tensors, tiny_config, tiny_manifest

from moa_serve.adapter.adapter import AdapterSource
from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.importers import read_adapter
from moa_serve.adapter.manifest import VARIANTS, Manifest

_PAGE = (Path(__file__).parents[3] / "docs" / "adapter-format.md").read_text(encoding="utf-8")


def test_the_example_is_a_whole_adapter(tmp_path: Path) -> None:
    """An example that does not validate is the first thing that a reader tries."""
    found = re.search(r"```json\n(.*?)```", _PAGE, re.DOTALL)
    assert found
    manifest = Manifest.parse(json.loads(found[1]))
    write_adapter(tmp_path / "a", manifest, random_tensors(manifest))
    assert read_adapter(AdapterSource(tmp_path / "a"), tiny_config()).manifest == manifest


@pytest.mark.parametrize(
    ("variant", "inner"),
    [(name, inner) for name, rule in VARIANTS.items() for inner in (None, "molora", "hydralora") if not inner or rule.site != "linear"],
)
def test_every_tensor_is_in_the_table(variant: str, inner: str | None) -> None:
    """Whoever writes adapters in another program has only this page."""
    kinds = VARIANTS[variant].kinds
    manifest = tiny_manifest(
        tiny_config(),
        variant,
        targets=("Q",) if "lora" in kinds else (),
        prompt_length=2 if "prompt" in kinds else 0,
        parallel_size=2 if "parallel_adapter" in kinds else 0,
        inner=inner,
    )
    documented: set[str] = set()
    for line in _PAGE.splitlines():
        cell = line.split("|")[1] if line.startswith("| `layers.") else ""
        names = re.findall(r"`([^`]+)`", cell)
        stem = names[0].rsplit(".", 1)[0] if names else ""
        for name in names:
            full = name if name.startswith("layers.") else _continued(names[0], stem, name)
            documented |= {full.replace(".*", end) for end in (".weight", ".bias")}
    for name in manifest.expected_tensors():
        general = re.sub(r"([/.])\d+(?=\.|$)", r"\1{e}", name.replace(name.split(".")[1], "{i}", 1))
        assert general in documented


def _continued(first: str, stem: str, name: str) -> str:
    """`.bias` after `layers.{i}.router.weight` replaces its end; `.w1.bias` and `.{e}.up.*` replace two parts."""
    return ".".join(first.split(".")[: len(first.split(".")) - name.count(".")]) + name if name.count(".") > 1 else stem + name
