"""`moa-serve eval`: what it shows and writes, and which exit code it gives to what."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from families import TINY, write_base, write_family, write_overflowing, write_tokenizer
from goldens import DATA
from rich.console import Console
from tokenizers import decoders, models, pre_tokenizers
from training import full_disk
from typer.testing import CliRunner, Result

from moa_serve.__main__ import app
from moa_serve.errors import InvalidRequest
from moa_serve.shell import terminal
from moa_serve.shell.evaluate import Report, play, show, to_json, to_markdown, write
from moa_serve.shell.selection import Column
from moa_serve.train.data import Example
from moa_serve.train.evaluate import Round, Score, Usage
from moa_serve.train.scoring import Estimate, Scorer, Task, Verdict

WITH_TEXT: dict[str, Any] = TINY | {"vocab_size": 259, "eos_token_id": 2}
ROWS = [
    {
        "instruction": f"Please choose the correct answer to the question: {i}?\n\n"
        "Answer1: a Answer2: b c\n\nAnswer format: answer1/answer2",
        "output": f"the correct answer is answer{1 + i % 2}",
        "answer": f"answer{1 + i % 2}",
    }
    for i in range(9)
]
SUMS = [{"original_text": f"{i} nuts and 2 more ?", "equation": f"X={i}.0+2.0", "ans": i + 2.0} for i in range(4)]
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, adapters for it, and made-up questions."""
    root = tmp_path_factory.mktemp("eval")
    write_base(root / "talker", WITH_TEXT)
    write_tokenizer(root / "talker")
    for name, family in (("sparse", "sparse_fn"), ("plain", "lora")):
        write_family(root / "adapters" / name, family, config=WITH_TEXT)
    (root / "letters").mkdir()
    (root / "letters" / "test.json").write_text(json.dumps(ROWS))
    (root / "sums.jsonl").write_text("\n".join(map(json.dumps, SUMS)))
    (root / "free.jsonl").write_text('{"instruction": "a", "output": "b"}')
    return root


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in [name for name in os.environ if name.startswith("MOA_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(folder)

    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(app, ["eval", "--device", "cpu", *map(str, arguments)])

    return run


LETTERS = ("--data", "letters", "--model", "talker", "--max-tokens", "3")


# -- the command


def test_base_and_all_of_the_directory_run_and_are_written(run: Run, tmp_path: Path) -> None:
    result = run(*LETTERS, "--data", "sums.jsonl", "--limit", "5", "--seed", "3", "--out", tmp_path / "new" / "out")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    for text in ("letters/test, likelihood, 5 of 9 rows in authors form; chance 50.0 %", "sums, generation, 4 rows", "sparse_moa"):
        assert text in result.stdout
    assert "3 adapters in one batch: " in result.stdout
    found = json.loads((tmp_path / "new" / "out" / "results.json").read_text())
    assert [(r["task"].split("/")[-1], r["scorer"], r["n"]) for r in found["rounds"]] == [
        ("test", "generation", 5),
        ("test", "likelihood", 5),
        ("sums", "generation", 4),
    ]
    assert [score["adapter"] for score in found["rounds"][0]["scores"]] == ["base", "plain", "sparse"]
    assert found["settings"] == {"form": "authors", "scorer": "auto", "limit": 5, "seed": 3, "max_tokens": 3, "batch_rows": 64}
    assert f"wrote {tmp_path}/new/out/results.json and " in result.stderr.replace("\n", "")
    assert (tmp_path / "new" / "out" / "results.md").read_text().startswith("# Evaluation\n")


def test_no_text_of_the_data_is_in_the_files(run: Run, folder: Path, tmp_path: Path) -> None:
    """Data sets have licences of their own; results are to be published."""
    (folder / "secret.jsonl").write_text('{"instruction": "Zanzibar?", "output": "Quixotic", "answer": "Quixotic"}\n')
    for form in ("authors", "cloze"):
        run(
            "--data",
            "secret.jsonl",
            "--data",
            "letters",
            "--model",
            "talker",
            "--max-tokens",
            "3",
            "--form",
            form,
            "--scorer",
            "both",
            "--out",
            tmp_path,
        )
        for file in ("results.json", "results.md"):
            text = (tmp_path / file).read_text()
            assert "letters/test" in text
            assert not [word for word in ("Zanzibar", "uixotic", "b c", "Please choose") if word in text]


def test_json_is_one_object_and_the_same_for_one_adapter_alone(run: Run) -> None:
    def scores(*arguments: str) -> dict[tuple[str, str], Any]:
        result = run(*LETTERS, "--json", "--form", "cloze", "--scorer", "both", "--dtype", "float32", *arguments)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        return {(r["scorer"], s["adapter"]): (s["value"], s["answers"]) for r in found["rounds"] for s in r["scores"]}

    mixed = scores("--adapter", "sparse", "--adapter", "base", "--adapter", "two=adapters/plain:lora", "--batch-rows", "4")
    assert {name for _, name in mixed} == {"sparse", "base", "two"}
    alone = scores("--adapter", "sparse") | scores("--adapter", "base") | scores("--adapter", "two=plain")
    assert mixed == alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "nowhere: there is no such file"),
        (("--data", "adapters"), "adapters: the folder has no test.json"),
        (("--data", "letters", "--form", "clozed"), "form is 'clozed', but must be one of authors, cloze"),
        (("--data", "letters", "--scorer", "all"), "scorer is 'all', but must be one of auto, generation, likelihood, both"),
        (("--data", "free.jsonl", "--scorer", "generation"), "free.jsonl: no row can be scored by generation; use --scorer likelihood"),
        (("--data", "letters", "--out", "sums.jsonl/x"), "sums.jsonl/x: cannot be made (Not a directory)"),
        (("--data", "letters", "--max-tokens", "400"), "letters/test.json, row 1: "),
        (("--data", "letters", "--moa", "{top_k: 2}"), "moa is no JSON ("),
        (("--data", "letters", "--moa", "[3]"), "moa must be an object of routing options, not [3]"),
        (
            ("--data", "letters", "--moa", '{"k": 2}'),
            "moa has 'k', which is no routing option; there are mode, threshold, top_k, disable, force",
        ),
        (("--data", "letters", "--moa", "{}"), "moa asks for nothing; give a routing option"),
        (
            ("--data", "letters", "--adapter", "sparse", "--moa", '{"top_k": 20}'),
            "adapter 'sparse': moa.top_k is 20, but the largest router",
        ),
        (("--data", "letters", "--adapter", "plain", "--moa", '{"top_k": 2}'), "adapter 'plain': moa.top_k needs an adapter with a router"),
        (("--data", "letters", "--ablate", "heads"), "ablate is 'heads', but must be kinds, experts, layers, or layers:N"),
        (("--data", "letters", "--adapter", "plain", "--ablate", "kinds"), "adapter 'plain': ablate needs an adapter with a router"),
        (("--data", "letters", "--adapter", "plain", "--sweep"), "adapter 'plain': sweep needs an adapter with a router"),
        (("--data", "letters", "--adapter", "base", "--sweep"), "there is no adapter with a router to ask; name one with --adapter"),
        (("--data", "letters", "--plot", "x.png"), "plot draws what --ablate and --sweep found; give one of them, or leave it out"),
    ],
)
def test_wrong_data_and_wrong_flags_are_exit_2(run: Run, arguments: tuple[str, ...], message: str) -> None:
    result = run("--model", "talker", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {message}")
    assert (result.stdout, len(result.stderr.splitlines())) == ("", 1)


def test_no_data_is_wrong_usage(run: Run) -> None:
    assert run("--model", "talker").exit_code == 2


def test_an_unknown_adapter_is_exit_1(run: Run) -> None:
    result = run(*LETTERS, "--adapter", "spars")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "adapters holds plain, sparse" in result.stderr


def test_a_base_without_a_tokenizer_is_exit_2(run: Run) -> None:
    golden = DATA / "mola_topk" / "adapter"
    result = run("--data", "letters", "--model", DATA / "bases" / "llama", "--adapter", golden)
    assert result.exit_code == 2
    assert "the base llama has no tokenizer, so it cannot read questions" in result.stderr


def test_adapters_are_scored_in_other_ways_beside_their_own(run: Run, tmp_path: Path) -> None:
    """An adapter that was not named and has no router is scored as it is, and the others' tables are not lost for it."""
    options = ("--moa", '{"top_k": 3}', "--ablate", "kinds", "--ablate", "layers:2", "--ablate", "experts", "--sweep")
    result = run(*LETTERS, "--limit", "2", "--form", "cloze", *options, "--json", "--plot", tmp_path / "found.png")
    assert result.exit_code == 0, result.output
    assert "adapter 'plain' has no router: it is scored in its own way alone" in result.stderr.replace("\n", " ")
    assert (tmp_path / "found.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for found in json.loads(result.stdout)["rounds"]:
        base, plain, own, three, *others = found["scores"]
        assert [score["asked"] for score in (base, plain, own)] == [None, None, None]
        assert three["asked"] == {"group": "given", "name": "top_k 3", "moa": {"top_k": 3}}
        assert three["routing"]["experts_per_token"] <= 3
        names = [score["asked"]["name"] for score in others]
        assert (names[0], names[4:7]) == ("without LoRA", ["without FFN", "without layers 0-1", "without layer 2"])
        assert names[7:16] == [*(f"without {name}" for name in ("Q", "K", "V", "O", "UP", "GATE", "DOWN")), "soft", "own threshold x 0.25"]
        assert names[-4:] == ["top 5", "top 4", "top 2", "top 1"], "nothing is asked twice"
        assert all(score["against_own"] is not None for score in others)
        assert next(score for score in others if score["asked"]["name"] == "soft")["routing"]["not_selected"] == 0


@pytest.mark.parametrize("adapter", ["mola_topk", "unipeft", "sparse_moa_const_prompt", "soft_moa_instance_linear:soft_moa_instance"])
def test_adapters_of_the_authors_are_scored_as_they_are(run: Run, tmp_path: Path, adapter: str) -> None:
    name, _, variant = adapter.partition(":")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(DATA / "bases" / "llama" / file)
    write_small_tokenizer(tmp_path)
    source = f"{DATA / name / 'adapter'}{':' if variant else ''}{variant}"
    result = run(
        "--data", "letters", "--model", tmp_path, "--adapter", "base", "--adapter", f"it={source}", "--scorer", "likelihood", "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    base, imported = found["rounds"][0]["scores"]
    assert (found["adapters"][1]["name"], len(found["adapters"][1]["revision"])) == ("it", 64)
    assert imported["num_tokens"] == base["num_tokens"] > 1000
    assert 0 < imported["routing"]["experts_per_token"] <= imported["routing"]["num_experts"]


def write_small_tokenizer(folder: Path) -> None:
    """As `write_tokenizer`, in the 256 tokens of the golden bases: three bytes that ASCII has not are missing."""
    symbols = ["<unk>", "<s>", "</s>", *(set(pre_tokenizers.ByteLevel.alphabet()) - {"ý", "þ", "ÿ"})]
    backend = tokenizers.Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))


def test_an_answer_that_ends_in_an_error_is_told_and_is_exit_1(run: Run, tmp_path: Path) -> None:
    config = WITH_TEXT | {"hidden_size": 264}
    write_base(tmp_path / "base", config)
    write_tokenizer(tmp_path / "base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    write_overflowing(tmp_path / "hot", config, token=3 + alphabet.index("%"))
    rows = [{"instruction": f"{i} {'%' if i == 1 else ''}", "output": "x", "answer": "x"} for i in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = ("--data", tmp_path / "rows.json", "--model", tmp_path / "base", "--max-tokens", "2", "--adapter", "base")
    result = run(*arguments, "--adapter", tmp_path / "hot", "--json")
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    (score,) = [score for score in found["rounds"][0]["scores"] if score["adapter"] == "hot"]
    assert list(score["errors"]) == ["1"]
    assert score["answers"][1] == [None, False]
    assert "rows, generation, hot: 1 answer ended in an error: " in result.stderr.replace("\n", " ")


# -- what is shown and written


EXAMPLES = tuple(Example("choice", choices=("a", "b"), gold=row % 2, output="a", answer="a", row=10 + row) for row in range(4))
COLUMNS = {None: Column(None, "tiny"), "m|ine": Column("m|ine", "sparse_moa", "ab" * 32, is_routed=True)}


def score(adapter: str | None, *values: float, usage: Usage | None = None, against: Estimate | None = None, **more: Any) -> Score:
    verdicts = tuple(Verdict(value, prediction=int(value), **more) for value in values)
    return Score(adapter, verdicts, Estimate(sum(values) / 4, 0.25), against, 100, usage)


def report(scorer: Scorer = "likelihood") -> Report:
    task = Task("odd|name/test", "odd|name/test.json", "cloze", "12" * 32, 40, EXAMPLES)
    mine = score("m|ine", 1, 1, 1, 0, usage=Usage(2.5, 9.0, 4.5), against=Estimate(0.5, 0.2), per_byte=True)
    found = Round(task, scorer, EXAMPLES, 0.5, 0.75, (score(None, 1, 0, 0, 0, per_byte=False), mine), 2.0)
    base = {"name": "tiny", "digest": "34" * 32, "backend": "torch", "device": "cpu", "dtype": "float32"}
    return Report(base, {"form": "cloze", "seed": 0, "limit": None}, COLUMNS, [found])


def test_json_has_all_that_is_needed_to_count_again() -> None:
    found = to_json(report())
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["format", "versions", "base", "settings", "adapters", "tasks", "rounds"]
    assert found["format"] == "moa-eval/1"
    assert found["adapters"] == [
        {"name": "base", "variant": None, "revision": None},
        {"name": "m|ine", "variant": "sparse_moa", "revision": "ab" * 32},
    ]
    assert found["tasks"] == [{"name": "odd|name/test", "path": "odd|name/test.json", "sha256": "12" * 32, "form": "cloze", "num_rows": 40}]
    (played,) = found["rounds"]
    assert {key: value for key, value in played.items() if key not in ("scores", "task", "path")} == {
        "scorer": "likelihood",
        "metric": "accuracy",
        "n": 4,
        "chance": 0.5,
        "majority": 0.75,
        "num_tokens": 200,
        "seconds": 2.0,
        "tokens_per_second": 100.0,
        "rows": [10, 11, 12, 13],
    }
    assert played["scores"][1] == {
        "adapter": "m|ine",
        "asked": None,
        "value": 0.75,
        "standard_error": 0.25,
        "against_base": {"difference": 0.5, "standard_error": 0.2, "beyond_two_standard_errors": True},
        "against_own": None,
        "num_tokens": 100,
        "errors": {},
        "routing": {"experts_per_token": 2.5, "num_experts": 9.0, "not_selected": 0.722222, "not_computed": 0.5},
        "correct": 3,
        "unanswered": 0,
        "accuracy_per_byte": 1.0,
        "answers": [[1, True], [1, True], [1, True], [0, False]],
    }
    assert (played["scores"][0]["against_base"], played["scores"][0]["routing"], played["scores"][0]["correct"]) == (None, None, 1)


def test_a_loss_has_nats_in_place_of_right_answers() -> None:
    (played,) = to_json(report("loss"))["rounds"]
    assert played["metric"] == "nats_per_token"
    assert played["scores"][0]["answers"] == [[1.0, 1], [0.0, 1], [0.0, 1], [0.0, 1]]
    assert "correct" not in played["scores"][0]
    assert "| adapter | variant | nats/token | against base |" in to_markdown(report("loss"))
    assert "+0.5000 ± 0.2000 *" in to_markdown(report("loss"))


def test_markdown_is_a_table_whatever_the_names() -> None:
    assert to_markdown(report()).splitlines() == [
        "# Evaluation",
        "",
        "Base tiny (`343434343434`), torch backend on cpu, float32; form cloze, seed 0.",
        "",
        "## odd\\|name/test, likelihood, 4 of 40 rows in cloze form; chance 50.0 %, always the same place 75.0 %",
        "",
        "| adapter | variant | right % | against base | per byte % | experts a token | not selected % | not computed % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| base |  | 25.0 ± 25.0 |  | 0.0 |  |  |  |",
        "| m\\|ine | sparse_moa | 75.0 ± 25.0 | +50.0 ± 20.0 * | 100.0 | 2.50/9 | 72.2 | 50.0 |",
        "",
        "2 adapters in one batch: 200 tokens in 2.0 s, 100 tokens/s. `test.json` sha256 `121212121212`.",
        "",
        "± one standard error; \\* more than two of them away from what it is held against, row by row.",
        "",
        "Revisions: m\\|ine `abababababab`.",
    ]


def test_a_table_without_a_terminal_is_whole_and_has_no_escape_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    show(terminal.output(), report().rounds[0], COLUMNS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("odd|name/test, likelihood, 4 of 40 rows")
    (own,) = [line for line in lines if "m|ine" in line]
    assert own.split() == ["m|ine", "sparse_moa", "75.0", "±", "25.0", "+50.0", "±", "20.0", "*", "100.0", "2.50/9", "72.2", "50.0"]
    assert "± one standard error; * more than two of them away from what it is held against, row by row" in lines
    assert "\x1b" not in "".join(lines)


class _Played:
    """Two rounds that are over at once."""

    num_pairs = 8

    def run(self, progress: Callable[[str, int], None]) -> Iterator[Round]:
        for done in (4, 8):
            progress("a \x1b task", done)
            yield report().rounds[0]


def test_a_round_that_cannot_be_written_leaves_the_rounds_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are written after every round of hours."""
    write(report(), tmp_path)
    before = (tmp_path / "results.json").read_text()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InvalidRequest, match="cannot be written"):
        write(report("loss"), tmp_path)
    assert (tmp_path / "results.json").read_text() == before


@pytest.mark.parametrize("is_watched", [True, False])
def test_a_bar_counts_where_somebody_watches_and_files_grow_round_by_round(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, is_watched: bool
) -> None:
    """The tables belong to standard output, which may be a file while standard error is a terminal."""
    monkeypatch.setattr(terminal, "messages", lambda: Console(stderr=True, force_terminal=is_watched, width=100))
    empty = replace(report(), rounds=[])
    written: list[int] = []
    monkeypatch.setattr("moa_serve.shell.evaluate.write", lambda report, out: written.append(len(report.rounds)))
    play(_Played(), empty, is_shown=True, out=tmp_path)  # type: ignore[arg-type]
    printed = capsys.readouterr()
    assert ("4/8" in printed.err, "a \\x1b task" in printed.err, bool(printed.err)) == (is_watched,) * 3
    assert printed.out.count("likelihood, 4 of 40 rows") == 2
    assert "\x1b" not in printed.out
    assert written == [1, 2]
    play(_Played(), empty, is_shown=False, out=None)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
    assert written == [1, 2]
