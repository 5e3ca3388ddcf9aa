"""`bench options`: rules that part a batch and change nothing else, cases for every way of a sweep, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from families import TINY, random_adapter, write_base, write_family
from typer.testing import CliRunner

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.checkpoint import revision_of
from moa_serve.bench.options import Plan, measure, same_choice
from moa_serve.bench.workload import Pages, Workload
from moa_serve.errors import InvalidRequest
from moa_serve.model.backend import Backend
from moa_serve.shell.bench_options import bench_options

app = typer.Typer()
app.command()(bench_options)


def adapter_of(family: str) -> Adapter:
    manifest, tensors = random_adapter(family)
    return Adapter(manifest, tensors, revision_of(manifest, tensors), "moa-adapter/1")


@pytest.mark.parametrize("family", ["soft", "sparse_fn", "sparse_const", "mola_layerwise", "adamole", "molora"])
def test_rules_that_only_part_a_batch_choose_as_the_adapter_does(pages: Pages, family: str) -> None:
    """If they skipped more, the table would hide what runs cost."""
    adapter = adapter_of(family)
    prepared = pages.model.prepare(adapter)
    rules = [same_choice(adapter.manifest, number) for number in range(8)]
    assert len(set(rules)) == 8
    assert None not in rules
    own, parted = Workload(pages, [prepared] * 8), Workload(pages, [prepared] * 8, rules=rules)
    assert (len(own.batch.segments), len(parted.batch.segments)) == (1, 8)
    torch.testing.assert_close(parted.run(), own.run(), atol=1e-3, rtol=1e-3)
    two = Workload(pages, [prepared] * 8, rules=[rules[0]] * 5 + [rules[1]] * 3)
    assert [(segment.start, segment.end) for segment in two.batch.segments] == [(0, 5), (5, 8)]


def test_every_case_has_its_ratio_to_the_own_way(fresh_model: Backend) -> None:
    plan = Plan(rows=(1, 4), rules=(1, 4), rounds=1, inner_steps=1, context=8)
    found: dict[str, Any] = json.loads(json.dumps(measure(fresh_model, adapter_of("sparse_fn"), plan).to_json()))
    one, four = (size["cases"] for size in found["sizes"])
    assert list(one)[:4] == ["its own way", "control", "base alone", "1 rule, same choice"]
    assert set(four) - set(one) == {"4 rules, same choice"}
    assert {"soft", "own threshold x 2", "threshold 0.5", "top 1"} <= set(one)
    for cases in (one, four):
        assert cases["its own way"]["to_own"]["median"] == 1
        assert cases["base alone"]["selected_share"] is None
        assert cases["soft"]["selected_share"] == 1
        assert cases["threshold 0.9"]["selected_share"] < cases["its own way"]["selected_share"] < 1


def test_the_command_shows_a_table_and_one_json_document(tmp_path: Path) -> None:
    base, folder = write_base(tmp_path / "base"), write_family(tmp_path / "mine", "soft")
    command = [str(folder), "--model", str(base), "--backend", "torch", "--rows", "1,2", "--rules", "2", "--rounds", "1", "--context", "8"]
    shown = CliRunner().invoke(app, [*command, "--no-sweep"])
    assert shown.exit_code == 0, shown.output
    assert "base, torch, float32, 1 thread, mine" in shown.stdout
    (line,) = [line for line in shown.stdout.splitlines() if "2 rules, same choice" in line]
    assert line.endswith("100%")
    assert not [line for line in shown.stdout.splitlines() if "top 1" in line]
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert (found["adapter"], found["variant"], [size["rows"] for size in found["sizes"]]) == ("mine", "soft_moa", [1, 2])
    assert "top 1" in found["sizes"][0]["cases"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"rows": (8, 8)}, "rows must be different numbers"), ({"rules": (0,)}, "of at least 1, not 0"), ({"rounds": 0}, "rounds is 0")],
)
def test_a_wrong_plan_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Plan(**wrong)


def test_an_adapter_without_a_router_and_a_context_beyond_the_base_are_refused(fresh_model: Backend) -> None:
    with pytest.raises(InvalidRequest, match="sweep needs an adapter with a router"):
        measure(fresh_model, adapter_of("lora"), Plan())
    with pytest.raises(InvalidRequest, match="are more than the"):
        measure(fresh_model, adapter_of("soft"), Plan(context=TINY["max_position_embeddings"] + 512))
