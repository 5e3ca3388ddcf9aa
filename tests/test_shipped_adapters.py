"""The adapters in `adapters/`: small, in bfloat16, with a card whose figures are those of the files beside it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moa_serve.adapter.manifest import Manifest

FOLDER = Path(__file__).parents[1] / "adapters"
SHIPPED = sorted(path.parent for path in FOLDER.glob("*/adapter.json"))


def test_the_three_families_are_there() -> None:
    found = [Manifest.parse(json.loads((folder / "adapter.json").read_text())) for folder in SHIPPED]
    assert {manifest.variant for manifest in found} >= {"soft_moa", "sparse_moa", "lora"}
    assert any(manifest.router.select.kind == "threshold_fn" for manifest in found if manifest.variant == "sparse_moa")
    assert any(expert.rank == 16 for manifest in found if manifest.variant == "lora" for expert in manifest.experts)


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_it_is_small_and_tells_where_it_comes_from(folder: Path) -> None:
    manifest = Manifest.parse(json.loads((folder / "adapter.json").read_text()))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    with safe_open(folder / "adapter.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert manifest.training is not None
    assert manifest.license
    assert manifest.description
    card = (folder / "README.md").read_text().lower()
    for needed in (
        "## data",
        "## scores",
        "## made with",
        manifest.training["data"]["sha256"][:12],
        "licen",
        "moa-serve train",
        "moa-serve eval",
    ):
        assert needed in card, needed


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_it_beats_the_base_by_more_than_two_standard_errors(folder: Path) -> None:
    """scores.json is what `moa-serve eval --out` wrote, without the single answers; on whole test sets that no training saw."""
    scores = json.loads((folder / "scores.json").read_text())
    mine = [score for found in scores["rounds"] for score in found["scores"] if score["adapter"] == folder.name]
    assert mine
    assert any(score["against_base"]["difference"] > 2 * score["against_base"]["standard_error"] for score in mine)


def test_sparse_skips_at_no_loss() -> None:
    """The pair: at least 35 % of the experts not selected, and an accuracy within one standard error of Soft MoA's."""
    scores = json.loads((FOLDER / "math-sparse" / "scores.json").read_text())
    found = scores["rounds"][0]
    by_name = {score["adapter"]: score for score in found["scores"]}
    sparse, soft = by_name["math-sparse"], by_name["math-soft"]
    assert sparse["routing"]["not_selected"] >= 0.35
    assert sparse["value"] >= soft["value"] - soft["standard_error"]
