"""`doctor --plan`: who buys a card by it must get the context that it tells. Its arithmetic is held by tests/unit/gpu/test_plan.py."""

import json
from pathlib import Path

import pytest
from families import TINY, random_adapter, write_family
from typer.testing import CliRunner, Result

from moa_serve.__main__ import app
from moa_serve.adapter.manifest import BaseShape
from moa_serve.bench.shapes import SHAPES
from moa_serve.config import ModelConfig
from moa_serve.gpu.layout import SlotLayout, SlotShape
from moa_serve.shell.doctor import plan
from moa_serve.train.recipe import manifest_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base without weights."""
    found = tmp_path / "my secret base"
    found.mkdir()
    (found / "config.json").write_text(json.dumps(TINY))
    return found


def planned(*arguments: str | int | Path) -> Result:
    return CliRunner().invoke(app, ["doctor", "--plan", *map(str, arguments)])


def test_the_tables_name_every_part_and_what_fits() -> None:
    result = planned("--shapes", "llama-3.1-8b", "--memory", 16, "--memory", 24, "--memory", 80)
    assert result.exit_code == 0, result.output
    lines = {line.split("  ")[0].strip(): line.split() for line in result.stdout.splitlines() if line.strip()}
    assert {"embedding", "layers", "norm and head", "slots, rows of products", "slots, all else", "KV cache"} <= lines.keys()
    assert lines["the card, as it reports it"][-6::2] == ["16.00", "23.99", "79.65"]
    assert lines["layers"][-6::2] == ["13.00"] * 3
    full = plan.outlook(None, "llama-3.1-8b", [80]).plans[80]
    assert lines["context that is served"][-3] == "0"
    assert lines["context that is served"][-1] == "131,072"
    assert lines["sequences of 2,048 tokens"][-1] == f"{full.num_sequences(2048):,}"
    assert "16 GB: " in result.stdout
    assert "GiB are missing; take a larger card or a smaller base" in result.stdout
    for family in plan.FAMILIES:
        assert family in lines


def test_where_nothing_fits_the_exit_code_says_so() -> None:
    result = planned("--shapes", "llama-3.1-8b", "--memory", 24, "--num-slots", 100)
    assert result.exit_code == 1
    assert "GiB are missing; lower num_slots" in result.stdout


def test_a_shorter_context_leaves_more_of_a_small_card_to_sequences() -> None:
    """Long prompts are masked for their whole context: a card is planned for the longest one that is allowed."""
    full, short = (plan.outlook(None, "llama-3.1-8b", [24], max_model_len=length).plans[24] for length in (None, 8192))
    assert short.num_tokens > full.num_tokens
    assert (short.served_context, short.num_sequences(8192)) == (8192, short.num_tokens // 8192)
    result = planned("--shapes", "llama-3.1-8b", "--memory", 24, "--max-model-len", 65_536)
    assert result.exit_code == 1
    assert "GiB are missing; lower max_model_len to " in result.stdout
    fitting = result.stdout.split("max_model_len to ")[1].split()[0]
    assert planned("--shapes", "llama-3.1-8b", "--memory", 24, "--max-model-len", fitting).exit_code == 0


def test_a_config_is_enough_and_json_is_not_private(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = planned("--model", folder, "--memory", 2, "--json", file)
    assert result.exit_code == 0, result.output
    assert "my secret base on the triton backend" in result.stdout
    found = json.loads(file.read_text())
    assert (found["schema"], found["dtype"], found["options"]["num_slots"]) == ("moa-plan/1", "bfloat16", 8)
    assert "secret" not in file.read_text()
    card = found["cards"][0]
    assert (card["memory_gb"], card["fits"], card["remedy"], card["served_context"]) == (2, True, "", 512)
    parts = card["bytes"]
    assert parts.pop("total") == 2**31
    assert sum(parts.values()) == 2**31
    assert card["sequences"] == {"512": card["num_tokens"] // 512}
    assert [one["family"] for one in found["families"]] == list(plan.FAMILIES)


def test_slots_are_as_large_as_the_adapters_of_the_folder(folder: Path, tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    usual = plan.outlook(str(folder), None, [1], num_slots=3, adapters_dir=adapters)
    assert usual.slots.endswith("the folder holds no adapter")
    for family in ("lora", "molora"):
        write_family(adapters / family, family)
    found = plan.outlook(str(folder), None, [1], num_slots=3, adapters_dir=adapters)
    shape = SlotShape.union(SlotShape.of(random_adapter(family)[0]) for family in ("lora", "molora"))
    rows = SlotLayout(ModelConfig.from_hf(TINY), shape, is_exact=False).row_bytes(2)
    assert found.plans[1].slot_rows == 3 * rows != usual.plans[1].slot_rows
    assert "(2 found)" in found.slots


def test_what_a_slot_costs_is_what_stands_in_it() -> None:
    config = SHAPES["llama-3.1-8b"]
    for family, recipe in plan.FAMILIES.items():
        cost = plan.slot_cost(family, recipe, config, 8)
        parameters = 2 * manifest_of(recipe, BaseShape.of(config)).num_parameters
        assert parameters < cost.slot_bytes < 2.1 * parameters, "zeros, and routers twice, but no more"
        assert cost.is_apart == (family in ("MoLoRA 8 x r8", "MoLA 8 x r8", "AdaMoLE 8 x r8")), "more than 16 MB a layer"
        read = cost.slot_bytes if cost.is_apart else 8 * cost.row_bytes
        assert read / 16e9 < cost.share_of_one < cost.share_of_all < 8 * cost.slot_bytes / 14e9


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--memory", "24"), "--memory: it is for --plan"),
        (("--adapters-dir", "."), "--adapters-dir: it is for --plan"),
        (("--plan", "--quick"), "--quick: a plan is of the triton backend"),
        (("--plan", "--device", "cpu"), "--device: a plan"),
        (("--plan", "--shapes", "llama-3.1-8b", "--model", "x"), "--shapes is a base of its own"),
        (("--plan", "--shapes", "gpt-2"), "must be one of llama-3.2-1b, llama-3.1-8b"),
        (("--plan", "--model", "no-such-folder"), "no such folder"),
        (("--plan", "--model", "nobody/never-fetched"), "a plan fetches nothing; give --shapes"),
        (("--plan", "--shapes", "llama-3.1-8b", "--max-model-len", "131073"), "is more than the 131072 tokens"),
        (("--max-model-len", "8192"), "--max-model-len: it is for --plan"),
        (("--plan", "--memory", "0"), "greater than or equal to 1"),
    ],
)
def test_nothing_is_accepted_and_ignored(arguments: tuple[str, ...], told: str) -> None:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code != 0
    assert result.stdout == ""
    assert told in f"{result.stderr}{result.exception}"


def test_a_file_is_no_base_to_plan_with(folder: Path) -> None:
    result = planned("--model", folder / "config.json")
    assert result.exit_code != 0
    assert "give its folder" in f"{result.stderr}{result.exception}"


def test_variables_for_other_commands_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's MOA_BACKEND=native is no reason to refuse a plan."""
    for name, value in {"MOA_BACKEND": "native", "MOA_DEVICE": "cpu", "MOA_MODEL": "/no/such/base"}.items():
        monkeypatch.setenv(name, value)
    assert planned("--shapes", "llama-3.2-1b").exit_code == 0
