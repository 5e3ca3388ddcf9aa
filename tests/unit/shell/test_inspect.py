"""`moa-serve inspect` on tiny bases: its numbers against a naive loop, its tables, its figures, and what it says to mistakes."""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TINY, base_tensors, random_adapter, raw_manifest, write_base, write_family, write_tokenizer
from naive import NaiveModel
from torch import Tensor
from typer.testing import CliRunner, Result

from moa_serve import LLM
from moa_serve.__main__ import app
from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.manifest import Manifest
from moa_serve.engine.activity import Activity
from moa_serve.engine.routing import expert_names
from moa_serve.shell import inspect as inspection
from moa_serve.shell.prompts import PromptLine

WITH_TEXT: dict[str, Any] = TINY | {"vocab_size": 259, "eos_token_id": 2}
ADAPTERS = ("soft", "sparse_fn", "molora", "mola_layerwise", "nested_molora", "lora", "prompt", "composition_nested", "instance", "partial")
TEXTS = ["An apple.", "Two pears"]
FIGURES = ["activity", "tokens", "similarity", "similarity_by_layer"]
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    write_base(root / "talker", WITH_TEXT)
    write_tokenizer(root / "talker")
    write_base(root / "mute")
    for family in ADAPTERS:
        write_family(root / "adapters" / family, family, config=WITH_TEXT)
    write_family(root / "for_mute", "sparse_fn")
    return root


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder / "talker", backend="torch", device="cpu", kv_cache_bytes=2**22) as made:
        yield made


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `inspect` in the folder that holds `talker` and `adapters`, with a clean environment."""
    for name in [name for name in os.environ if name.startswith("MOA_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(folder)

    def run(*arguments: str | Path, model: str = "talker") -> Result:
        return CliRunner().invoke(app, ["inspect", "--model", model, "--device", "cpu", *map(str, arguments)])

    return run


def found(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


class RouterWords(NaiveModel):
    """Keeps each router's outputs before and after selection, token by token."""

    def __init__(self, family: str) -> None:
        tensors = random_adapter(family, config=WITH_TEXT)[1]
        super().__init__(WITH_TEXT, base_tensors(WITH_TEXT), raw_manifest(family, WITH_TEXT), tensors)
        self.words: dict[str, list[tuple[list[float], list[float]]]] = {}
        self.scores: list[float] = []

    def select(self, scores: list[float], threshold: float | None) -> list[float]:
        self.scores = scores
        return super().select(scores, threshold)

    def route(self, prefix: str, x: Tensor) -> list[float]:
        kept = super().route(prefix, x)
        self.words.setdefault(prefix, []).append((self.scores, kept))
        return kept

    def tables(self, layer: int) -> tuple[Tensor, Tensor]:
        """(T, E) weights before selection and what was selected, of the layer's routers side by side."""
        prefixes = [f"layers.{layer}.{site}router" for site in ("", "Q.", "V.", "GATE.", "DOWN.")]
        words = [self.words[prefix] for prefix in prefixes if prefix in self.words]
        tokens = list(zip(*words, strict=True))
        weights = torch.tensor([[score for scores, _ in token for score in scores] for token in tokens])
        selected = torch.tensor([[weight > 0 for _, kept in token for weight in kept] for token in tokens])
        return weights, selected


def close(actual: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(actual), expected, atol=2e-4, rtol=1e-3)


# -- the numbers


@pytest.mark.parametrize("family", ["soft", "sparse_fn", "molora", "mola_layerwise", "nested_molora"])
def test_weights_and_activation_equal_a_naive_loop(run: Run, folder: Path, llm: LLM, family: str) -> None:
    flags = [flag for text in TEXTS for flag in ("--text", text)]
    content = found(run(family, *flags, "--layers", "0,1,2", "--json"))
    assert llm.tokenizer is not None
    naives = [RouterWords(family) for _ in TEXTS]
    for naive, text in zip(naives, TEXTS, strict=True):
        naive.logits(llm.tokenizer.encode(text, parse_special=True))
    assert content["num_tokens"] == content["activity"]["num_tokens"] == sum(map(len, TEXTS))
    for layer, names in enumerate(expert_names(Manifest.parse(raw_manifest(family, WITH_TEXT)))):
        tables = [naive.tables(layer) for naive in naives]
        shown = content["tokens"]["layers"][str(layer)]
        assert shown["experts"] == names
        close(shown["weights"], tables[0][0])
        assert shown["selected"] == tables[0][1].tolist()
        uses = content["activity"]["layers"][layer]
        assert list(uses) == names
        weights, selected = (torch.cat([table[part] for table in tables]).float().mean(0) for part in (0, 1))
        close([use["weight"] for use in uses.values()], weights)
        close([use["selected"] for use in uses.values()], selected)
        close(content["activity"]["experts_by_layer"][layer], selected.sum())


def test_similarity_is_that_of_the_model(run: Run, llm: LLM, folder: Path) -> None:
    """tests/unit/model/test_similarity.py holds it against the naive loop; here it must arrive, for adapters without a router too."""
    content = found(run("lora", "--text", TEXTS[0], "--text", TEXTS[1], "--json"))
    assert (content["activity"], content["tokens"]) == (None, None)
    assert llm.tokenizer is not None
    llm.load_adapter("a", folder / "adapters" / "lora")
    layers, num_tokens = llm.similarity([llm.tokenizer.encode(text, parse_special=True) for text in TEXTS], adapter="a")
    assert content["similarity"]["num_tokens"] == num_tokens == sum(map(len, TEXTS)) - len(TEXTS)
    for layer, shown in zip(layers, content["similarity"]["layers"], strict=True):
        assert layer is not None
        assert shown["experts"] == layer.experts
        close(shown["cka"], layer.cka.float())
        assert shown["collapse"]["across"]["cka"] == round(layer.collapse["across"].cka, 4)
        assert shown["collapse"]["across"]["cosine"] is None
    across = [shown["collapse"]["across"]["cka"] for shown in content["similarity"]["layers"]]
    assert content["similarity"]["mean"]["collapse"]["across"]["cka"] == pytest.approx(sum(across) / 3, abs=2e-4)


@pytest.mark.parametrize(("family", "inner"), [("nested_molora", "Q.2"), ("composition_nested", "PROMPT.1"), ("molora", "DOWN/3")])
def test_inner_experts_are_compared_one_by_one(run: Run, family: str, inner: str) -> None:
    mean = found(run(family, "--json"))["similarity"]["mean"]
    assert inner in mean["experts"]
    place = inner.replace(".", "/").split("/")[0]
    assert 0 < mean["collapse"][place]["cosine"] < 1


def test_without_a_text_the_profile_of_the_training_is_shown(run: Run, tmp_path: Path) -> None:
    manifest, tensors = random_adapter("sparse_fn", config=WITH_TEXT)
    use = {"weight": 0.25, "selected": 0.125}
    profile: dict[str, Any] = {"num_tokens": 4321, "layers": [dict.fromkeys(names, use) for names in expert_names(manifest)]}
    write_adapter(tmp_path / "a", manifest.model_copy(update={"profile": profile}), tensors)
    content = found(run(tmp_path / "a", "--json"))
    assert content["activity"]["source"] == "profile"
    assert content["activity"]["num_tokens"] == 4321
    assert content["activity"]["layers"][2]["O"] == use
    assert content["texts"] == [text.replace("\t", "    ") for text in inspection.DEFAULT_TEXTS]
    assert "training's profile, 4,321 tokens" in run(tmp_path / "a").stdout
    assert found(run(tmp_path / "a", "--text", "x y z", "--json"))["activity"]["source"] == "texts"
    for broken in (
        {"note": 1},
        profile | {"num_tokens": 0},
        profile | {"layers": profile["layers"][1:]},
        profile | {"layers": [{"Q": use}] * 3},
    ):
        assert Activity.from_profile(broken, expert_names(manifest)) is None
    write_adapter(tmp_path / "b", manifest.model_copy(update={"profile": {"note": 1}}), tensors)
    result = run(tmp_path / "b", "--json")
    assert found(result)["activity"]["source"] == "texts"
    assert "unknown form" in result.stderr


# -- on a terminal


def test_tables_show_the_three_views_and_mark_what_was_not_selected(run: Run) -> None:
    result = run("sparse_fn", "--text", "An apple a day.", "--layers", "1")
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert text.startswith("sparse_fn (sparse_moa) on talker, 1 text, 15 tokens\n")
    for heading in (
        "Expert weight and activation by layer",
        "experts selected by a token",
        "Router weights token by token",
        "Similarity of",
    ):
        assert heading in text
    rows = re.findall(r"^ +\d+ (\S+) +(.*)$", text.split("layer 1")[1].split("\n\n")[0], re.MULTILINE)
    assert [token for token, _ in rows] == [char.replace(" ", "␣") for char in "An apple a day."]
    cells = " ".join(cells for _, cells in rows).split()
    assert len(cells) == 9 * 15
    assert any(cell.startswith("(") for cell in cells)
    assert "P_ADAPTER" in text
    assert "\x1b" not in text
    assert "14 tokens are few to compare experts by" in result.stderr


def test_an_adapter_without_a_router_has_the_third_view_only(run: Run) -> None:
    text = run("composition_nested").stdout
    assert "no router: its experts always count fully" in text
    assert "token by token" not in text
    assert re.search(r"^mean +\S+ \S+ +\S+ \S+ +\S+ \S+ +\S+$", text, re.MULTILINE), "Q, PROMPT and P_ADAPTER with cosines, then across"


def test_a_single_expert_has_nothing_to_be_compared_with(run: Run) -> None:
    assert "no two experts in any layer" in run("prompt").stdout


def test_what_a_text_holds_cannot_drive_the_terminal(run: Run) -> None:
    result = run("soft", "--text", "x\x1b]0;title\x07\u202e\n\t y")
    assert result.exit_code == 0, result.output
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", result.stdout)
    for label in ("\\x1b", "\\x07", "\\n", "\\t", "\\xe2"):
        assert re.search(rf"^ *\d+ {re.escape(label)} ", result.stdout, re.MULTILINE), label


def test_a_base_without_a_tokenizer_takes_token_ids(run: Run, tmp_path: Path) -> None:
    lines = tmp_path / "ids.jsonl"
    lines.write_text('{"prompt": [5, 17, 80, 3, 44, 9]}\n')
    content = found(run("for_mute", "--file", lines, "--json", model="mute"))
    assert content["tokens"]["tokens"] == ["#5", "#17", "#80", "#3", "#44", "#9"]
    result = run("for_mute", model="mute")
    assert result.exit_code == 2
    assert "no tokenizer; give token ids" in result.stderr


def test_too_few_tokens_have_no_similarity(run: Run) -> None:
    result = run("soft", "--text", "abcd", "--json")
    assert found(result)["similarity"]["mean"]["collapse"]["across"]["cka"] is None
    assert "at least 4" in run("soft", "--text", "abcd").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("base",), "the base alone has no experts"),
        (("missing",), "no such folder"),
        (("soft", "--layers", "3"), "no expert in layer 3, only in 0 to 2"),
        (("partial", "--layers", "1"), "no expert in layer 1"),
        (("soft", "--layers", "a,b"), "must be numbers of layers"),
        (("soft", "--format", "pdf"), "neither png nor svg"),
        (("soft", "--file", os.devnull), "there is no text in it"),
        (("soft", "--file", "adapters.jsonl"), "names an adapter"),
    ],
)
def test_mistakes_are_told_in_one_message(run: Run, folder: Path, arguments: tuple[str, ...], message: str) -> None:
    (folder / "adapters.jsonl").write_text('{"prompt": "hi", "adapter": "soft"}\n')
    result = run(*arguments)
    assert result.exit_code == (1 if arguments == ("missing",) else 2)
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""


# -- figures


@needs_matplotlib
@pytest.mark.parametrize("family", ["soft", "sparse_fn", "mola_layerwise", "instance", "partial"])
def test_figures_are_written_as_png(run: Run, tmp_path: Path, family: str) -> None:
    result = run(family, "--text", "An apple a day.", "--out", tmp_path / "new" / "folder")
    assert result.exit_code == 0, result.output
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert files == sorted([*(f"{name}.png" for name in FIGURES), "inspect.json"])
    for name in FIGURES:
        content = (tmp_path / "new" / "folder" / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG\r\n")
        assert len(content) > 5000
    assert json.loads((tmp_path / "new" / "folder" / "inspect.json").read_text())["adapter"] == family


@needs_matplotlib
def test_svg_figures_name_every_expert_and_are_the_same_each_time(run: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run("molora", "--text", "An apple", "--format", "svg", "--out", tmp_path / name).exit_code == 0
    texts = {name: (tmp_path / "one" / f"{name}.svg").read_text() for name in FIGURES}
    for name in ("activity", "tokens", "similarity"):
        for expert in (f"{target}/{index}" for target in ("Q", "V", "DOWN") for index in range(4)):
            assert f">{expert}</text>" in texts[name], (name, expert)
    assert "molora (molora) on talker" in texts["activity"]
    assert ">layer 2</text>" in texts["similarity_by_layer"]
    assert ">␣</text>" in texts["tokens"]
    assert all((tmp_path / "two" / f"{name}.svg").read_text() == text for name, text in texts.items())


@needs_matplotlib
def test_without_a_router_there_is_only_similarity_to_draw(run: Run, tmp_path: Path) -> None:
    for family, expected in (("lora", ["inspect.json", "similarity.png", "similarity_by_layer.png"]), ("prompt", ["inspect.json"])):
        assert run(family, "--out", tmp_path / family).exit_code == 0
        assert sorted(path.name for path in (tmp_path / family).iterdir()) == expected


@needs_matplotlib
def test_text_in_figures_is_drawn_as_it_is(llm: LLM, folder: Path, tmp_path: Path) -> None:
    """No formula from $, no warning for a character that the font lacks, no control character in the SVG, no title beyond the edge."""
    from moa_serve.shell import plots

    name = r"$\frac{1}{$ 中文 🦜 " + "long " * 20
    adapter = llm.load_adapter("odd", folder / "adapters" / "sparse_fn")
    seen = inspection.inspect_adapter(llm, "odd", adapter, [PromptLine("a $x_1$ & <b> \x1b 中 " * 5, "here")], None)
    assert seen.tokens is not None
    labels = [r"$\alpha$", "中文", "🦜", "a very long token indeed", *seen.tokens.labels[4:]]
    tokens = inspection.TokenRouting(seen.tokens.token_ids, labels, seen.tokens.routing, seen.tokens.layers)
    odd = inspection.Inspection(name, "b$e$", adapter, [], 1, seen.activity, False, tokens, seen.similarity, seen.num_compared)
    for file_format in inspection.FORMATS:
        plots.write(odd, tmp_path, file_format)
    svg = (tmp_path / "tokens.svg").read_text()
    for text in (r"$\frac{1}{$", r"$\alpha$", r"\u4e2d\u6587", r"\U0001f99c", "a very long t…", "b$e$", r"\x1b"):
        assert text in svg, text
    assert "\x1b" not in svg


@needs_matplotlib
def test_a_users_own_matplotlibrc_changes_nothing(run: Run, tmp_path: Path) -> None:
    import matplotlib

    assert run("lora", "--format", "svg", "--out", tmp_path / "plain").exit_code == 0
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "axes.grid": True}):
        assert run("lora", "--format", "svg", "--out", tmp_path / "styled").exit_code == 0
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "plain" / "similarity.svg").read_text() == (tmp_path / "styled" / "similarity.svg").read_text()


def test_without_matplotlib_the_tables_come_and_figures_are_refused_first(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "moa_serve.shell.plots", raising=False)
    monkeypatch.delattr("moa_serve.shell.plots", raising=False)
    assert run("soft").exit_code == 0
    result = run("soft", "--out", tmp_path / "out", model="nowhere")
    assert result.exit_code == 2
    assert "pip install 'moa_serve[train]'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    result = run("lora", "--out", tmp_path / "file" / "below")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
