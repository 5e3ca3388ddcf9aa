"""The commands on tiny bases: what they show, and above all which exit code they give to what."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from families import TINY, write_base, write_family, write_overflowing, write_tokenizer
from native_tools import SETS
from typer.testing import CliRunner, Result

from moa_serve.__main__ import app

WITH_TEXT: dict[str, Any] = TINY | {"vocab_size": 259, "eos_token_id": 2}
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, and beside it adapters for it: a sparse and a plain one, and one that is cut off."""
    root = tmp_path_factory.mktemp("shell")
    write_base(root / "talker", WITH_TEXT)
    write_tokenizer(root / "talker")
    for name, family in (("sparse", "sparse_fn"), ("plain", "lora")):
        write_family(root / "adapters" / name, family, config=WITH_TEXT)
    return root


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """An adapters directory with a good adapter and one whose weights are cut off."""
    for name in ("good", "broken"):
        write_family(tmp_path / "dir" / name, "soft", config=WITH_TEXT)
    weights = tmp_path / "dir" / "broken" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return tmp_path / "dir"


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs in the folder that holds `talker` and `adapters`, with a clean environment."""
    for name in [name for name in os.environ if name.startswith("MOA_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(folder)

    def run(*arguments: str | Path, stdin: str | bytes | None = None, env: Mapping[str, str] | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, env=env)

    return run


def generate(run: Run, *arguments: str | Path, **more: Any) -> Result:
    return run("generate", "--model", "talker", "--device", "cpu", "--max-tokens", "4", *arguments, **more)


def items(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def columns(result: Result) -> list[str | None]:
    assert result.exit_code == 0, result.output
    return [item["adapter"] for item in items(result)]


# -- version, help, usage


def test_version_is_said_in_both_ways(run: Run) -> None:
    assert run("--version").stdout == run("version").stdout
    assert run("version").stdout.startswith("moa-serve ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "--file", os.devnull),
        ("generate", "hi", "--max-tokens", "0"),
        ("generate", "hi", "--no-such-flag"),
        ("generate", "hi", "--adapters-dir", "missing"),
        ("generate", "hi", "--file", "missing.txt"),
        ("generate", "hi", "--temperature", "3"),
        ("generate", "hi", "--model", "talker", "--backend", "jax"),
        ("generate", "hi", "--model", "talker", "--dtype", "int4"),
        ("generate", "hi", "--model", "talker", "--backend", "torch", "--base-dtype", "int8"),
        ("generate", "hi", "--model", "talker", "--adapter", "base", "--no-base"),
        ("generate", "hi", "--model", "talker", "--adapter", "sparse", "--adapter", "adapters/sparse"),
        ("generate", "-", "--file", "-"),
        ("check",),
        ("no-such-command",),
    ],
)
def test_wrong_usage_is_exit_2(run: Run, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [("generate", "hi"), ("check", "adapters/sparse"), ("convert", "adapters/sparse", "new")])
def test_a_base_that_cannot_be_served_is_exit_2(run: Run, command: tuple[str, ...]) -> None:
    result = run(*command, "--model", "nowhere")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: model 'nowhere': there is no such folder")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(not SETS, reason="the native library is not built")
def test_a_base_in_eight_bits(run: Run) -> None:
    result = run("generate", "hi", "--adapter", "base", "--model", "talker", "--device", "cpu", "--base-dtype", "int8", "--json")
    assert columns(result) == [None]
    assert "native backend on cpu, int8" in result.stderr


def test_settings_come_from_the_environment_and_flags_win(run: Run, tmp_path: Path) -> None:
    env = {"MOA_MODEL": "talker", "MOA_DEVICE": "cpu", "MOA_ADAPTERS_DIR": str(tmp_path), "MOA_DTYPE": "bfloat16"}
    result = run("generate", "hi", "--json", "--max-tokens", "2", env=env)
    assert columns(result) == [None]
    assert "bfloat16" in result.stderr
    assert "float32" in run("generate", "hi", "--dtype", "float32", "--max-tokens", "2", env=env).stderr
    assert run("generate", "hi", env=env | {"MOA_BACKEND": "jax"}).exit_code == 2


# -- check and convert


def test_check_tells_what_an_adapter_is(run: Run) -> None:
    result = run("check", "adapters/sparse", "--model", "talker")
    assert result.exit_code == 0, result.output
    for text in ("sparse can be served on talker", "sparse_moa", "moa-adapter/1", "P_ADAPTER", "0-2", "rank 4", "at most 0.9", "passed"):
        assert text in result.stdout
    assert "\x1b" not in result.stdout


def test_check_as_json_for_good_and_for_bad(run: Run, broken: Path) -> None:
    good = json.loads(run("check", broken / "good", "--model", "talker", "--json").stdout)
    assert (good["ok"], good["name"], good["self_test"], good["warnings"]) == (True, "good", True, [])
    assert good["bytes"] == 4 * good["parameters"]
    result = run("check", broken / "broken", "--model", "talker", "--json")
    bad = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (bad["ok"], bad["code"]) == (False, "adapter_corrupt")
    assert bad["error"] in result.stderr


def test_check_without_the_self_test_says_so(run: Run) -> None:
    result = run("check", "adapters/plain", "--model", "talker", "--no-self-test")
    assert result.exit_code == 0
    assert "not run" in result.stdout


def test_check_lists_everything_that_is_wrong(run: Run, tmp_path: Path) -> None:
    """One finding at a time would mean one run for each."""
    result = run(
        "check",
        write_family(tmp_path / "mine", "soft"),
        "--model",
        write_base(tmp_path / "base", TINY | {"num_key_value_heads": 4, "vocab_size": 95}),
    )
    assert result.exit_code == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("  - ")] == [
        "  - base.num_kv_heads: the adapter is for 2, the served base has 4",
        "  - base.vocab_size: the adapter is for 96, the served base has 95",
    ]
    assert run("check", tmp_path / "missing", "--model", "talker").exit_code == 1


def test_convert_writes_an_adapter_of_the_same_revision(run: Run, tmp_path: Path) -> None:
    result = run("convert", "adapters/sparse", tmp_path / "new", "--model", "talker")
    assert result.exit_code == 0, result.output
    first, second = (
        json.loads(run("check", folder, "--model", "talker", "--no-self-test", "--json").stdout)["revision"]
        for folder in ("adapters/sparse", tmp_path / "new")
    )
    assert first == second
    assert first in result.stdout


def test_convert_overwrites_no_strange_folder_and_needs_a_source(run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    result = run("convert", "adapters/sparse", tmp_path, "--model", "talker")
    assert result.exit_code == 1
    assert os.listdir(tmp_path) == ["thesis.tex"]
    assert run("convert", tmp_path / "missing", tmp_path / "new", "--model", "talker").exit_code == 1


def test_convert_prunes_what_is_named(run: Run, tmp_path: Path) -> None:
    """And what the server's answer suggests, from a file or a pipe, is the same as its entries by hand."""
    revision = json.loads(run("check", "adapters/sparse", "--model", "talker", "--no-self-test", "--json").stdout)["revision"]
    answer = json.dumps({"revision": revision, "prune": {"disable": ["Q@0", "*@1"]}})
    (tmp_path / "experts.json").write_text(answer)
    said = []
    for number, (prune, typed) in enumerate([("Q@0, *@1", None), (tmp_path / "experts.json", None), ("-", answer)]):
        result = run("convert", "adapters/sparse", tmp_path / str(number), "--model", "talker", "--prune", prune, stdin=typed)
        assert result.exit_code == 0, result.output
        lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
        assert next(line for line in lines if line.startswith("Q ")).split()[1] == "0-1"
        assert any(line.startswith("total 10 of 27 ") for line in lines)
        said.append(lines[-1])
        checked = run("check", tmp_path / str(number), "--model", "talker", "--json")
        assert checked.exit_code == 0, checked.output
        assert sum(len(expert["layers"]) for expert in json.loads(checked.stdout)["experts"]) == 17
    assert said[0] == said[1] == said[2]
    assert revision not in said[0]


PRUNE_BAD: dict[str, tuple[str, str, str]] = {
    # name: --prune, standard input, a part of the message
    "no such expert": ("Q/0", "", "prune has 'Q/0', but there is no such expert"),
    "no such file": ("nowhere.json", "", "nowhere.json: cannot be read (No such file"),
    "no JSON": ("-", "{", "standard input: is not valid JSON"),
    "another answer": ("-", '{"object": "list"}', "has no 'prune'; give what GET /v1/adapters/NAME/experts answered"),
    "no suggestion": ("-", '{"prune": null}', "suggests nothing yet"),
    "an empty one": ("-", '{"prune": {"disable": []}}', "higher max_selected or max_weight"),
    "a strange one": ("-", '{"prune": {"disable": "Q"}}', "has no list of experts in prune.disable"),
    "of another revision": ("-", '{"revision": "0123456789abcdef", "prune": {"disable": ["Q"]}}', "is for revision 0123456789ab, but"),
}


@pytest.mark.parametrize("case", PRUNE_BAD)
def test_what_cannot_be_pruned_is_exit_2_and_nothing_is_written(run: Run, tmp_path: Path, case: str) -> None:
    prune, typed, part = PRUNE_BAD[case]
    result = run("convert", "adapters/sparse", tmp_path / "new", "--model", "talker", "--prune", prune, stdin=typed)
    assert result.exit_code == 2, result.output
    assert part in result.stderr
    assert not (tmp_path / "new").exists()


# -- which adapters run


def test_by_default_the_base_and_all_of_the_directory_run(run: Run) -> None:
    assert columns(generate(run, "hi", "--json")) == [None, "plain", "sparse"]
    assert columns(generate(run, "hi", "--json", "--no-base")) == ["plain", "sparse"]


def test_what_is_named_runs_and_nothing_else(run: Run) -> None:
    assert columns(generate(run, "hi", "--json", "--adapter", "sparse")) == ["sparse"]
    assert columns(generate(run, "hi", "--json", "--adapter", "sparse", "--adapter", "base")) == ["sparse", None]
    assert columns(generate(run, "hi", "--json", "--adapter", "adapters/plain", "--adapter", "two=sparse:sparse_moa")) == ["plain", "two"]


def test_the_same_files_under_two_names_answer_the_same(run: Run) -> None:
    one, two = items(generate(run, "hi", "--json", "--adapter", "one=adapters/sparse", "--adapter", "two=sparse"))
    assert one | {"adapter": "two"} == two


def test_a_variant_that_the_files_deny_is_refused(run: Run) -> None:
    result = generate(run, "hi", "--adapter", "x=adapters/sparse:soft_moa")
    assert result.exit_code == 1
    assert "variant" in result.stderr


def test_a_misspelt_adapter_or_variant_gets_the_names_that_there_are(run: Run) -> None:
    result = generate(run, "hi", "--adapter", "spars")
    assert (result.exit_code, result.stderr) == (1, "error: adapter 'spars': there is no such folder, and adapters holds plain, sparse\n")
    assert "'sparce_moa' is no variant, known are soft_moa, sparse_moa" in generate(run, "hi", "--adapter", "sparse:sparce_moa").stderr


def test_a_broken_adapter_in_the_directory_is_left_out_but_not_where_it_is_named(run: Run, broken: Path) -> None:
    result = generate(run, "hi", "--json", "--adapters-dir", broken)
    assert columns(result) == [None, "good"]
    assert "warning: left out: adapter 'broken': adapter.safetensors" in result.stderr
    result = generate(run, "hi", "--adapters-dir", broken, "--adapter", "broken")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: adapter 'broken': adapter.safetensors")
    assert result.stdout == ""


def test_an_adapter_called_base_cannot_pass_for_the_base(run: Run, tmp_path: Path) -> None:
    write_family(tmp_path / "base", "soft", config=WITH_TEXT)
    result = generate(run, "hi", "--json", "--adapters-dir", tmp_path)
    assert columns(result) == [None]
    assert "adapter 'base' is left out" in result.stderr


def test_nothing_left_to_run_is_exit_2(run: Run, tmp_path: Path) -> None:
    result = generate(run, "hi", "--no-base", "--adapters-dir", tmp_path)
    assert result.exit_code == 2
    assert "argument 1: nothing is left to run it" in result.stderr


# -- prompts


def test_lines_of_a_file_choose_their_adapter(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('"all of them"\n\n{"prompt": [70, 71], "adapter": "sparse"}\n{"prompt": "b", "adapter": null}\n')
    result = generate(run, "--file", file, "--json")
    assert [(item["prompt"], item["adapter"]) for item in items(result)] == [
        ("all of them", None),
        ("all of them", "plain"),
        ("all of them", "sparse"),
        ([70, 71], "sparse"),
        ("b", None),
    ]
    assert [item["adapter"] for item in items(generate(run, "--file", file, "--json", "--adapter", "plain"))] == ["plain", "sparse", None]


def test_a_line_may_name_adapters_but_no_folders(run: Run, tmp_path: Path) -> None:
    """A file of prompts comes from others; it must not choose what is read from this machine."""
    file = tmp_path / "p.jsonl"
    for name in ("../adapters/sparse", str(tmp_path), "nothing"):
        file.write_text('"fine"\n' + json.dumps({"prompt": "a", "adapter": name}))
        result = generate(run, "--file", file)
        assert result.exit_code == 1
        assert f"{file}:2: adapter {name!r} is not named with --adapter" in result.stderr


def test_a_bad_line_is_named_by_file_and_number(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('"fine"\n{"prompt": }\n')
    result = generate(run, "--file", file)
    assert result.exit_code == 2
    assert f"error: {file}:2: is not valid JSON" in result.stderr
    assert result.stdout == ""


def test_standard_input_has_a_prompt_in_each_line(run: Run) -> None:
    for arguments in (("-",), ("--file", "-")):
        result = generate(run, *arguments, "--json", "--adapter", "base", stdin="one\n\ntwo\r\n")
        assert [item["prompt"] for item in items(result)] == ["one", "two"]


# -- what is shown


def test_json_has_what_the_model_wrote(run: Run) -> None:
    result = generate(run, "hi", "--json", "--adapter", "sparse", "--show-routing")
    (item,) = items(result)
    assert list(item) == ["prompt", "adapter", "revision", "text", "token_ids", "finish_reason", "routing"]
    assert len(item["revision"]) == 64
    assert (len(item["token_ids"]), item["finish_reason"]) == (4, "length")
    routing = item["routing"]
    assert routing["num_tokens"] == 2 + 3  # the last token is drawn and computed by nobody
    assert [list(layer) for layer in routing["layers"]] == [["Q", "K", "V", "PROMPT", "O", "UP", "GATE", "DOWN", "P_ADAPTER"]] * 3
    shares = [use["selected"] for layer in routing["layers"] for use in layer.values()]
    assert sum(shares) / 3 == pytest.approx(routing["experts_per_token"], abs=1e-3)
    assert routing["skippable"] == pytest.approx(1 - routing["experts_per_token"] / 9, abs=1e-3)


def test_equal_seeds_draw_equal_tokens(run: Run) -> None:
    arguments = ("hi", "--json", "--temperature", "1", "--seed", "7", "--top-k", "50", "--top-p", "0.9")
    assert generate(run, *arguments).stdout == generate(run, *arguments).stdout


def test_a_stop_text_ends_a_completion(run: Run) -> None:
    text = items(generate(run, "hi", "--json", "--adapter", "base"))[0]["text"]
    (item,) = items(generate(run, "hi", "--json", "--adapter", "base", "--stop", text[1]))
    assert item["finish_reason"] == "stop"
    assert text[1] not in item["text"]


def test_plain_output_is_complete_and_has_no_escape_sequences(run: Run) -> None:
    """Tiny bases write control characters; a pipe must get neither those nor colours, and every token's text."""
    prompt = "a [bold]prompt[/bold] \x1b[31m " + "that is long " * 30
    result = generate(run, prompt, "--show-routing", env={"COLUMNS": "40", "FORCE_COLOR": "1"})
    assert result.exit_code == 0
    assert all(char.isprintable() or char in "\n\t" for char in result.stdout)
    assert prompt.replace("\x1b", "\\x1b").strip() in result.stdout
    for text in ("[base] talker", "[plain] lora", "[sparse] sparse_moa", "plain lora, no router", "can be skipped"):
        assert text in result.stdout
    assert result.stderr.startswith("3 completions, ")


def test_a_base_without_a_tokenizer_shows_tokens(run: Run, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": [5, 6]}')
    arguments = ("generate", "--model", write_base(tmp_path / "mute"), "--file", tmp_path / "p.jsonl", "--adapter", "base")
    ids = items(run(*arguments, "--json"))[0]["token_ids"]
    assert f"(no text: tokens {' '.join(map(str, ids))})" in run(*arguments).stdout
    assert run("generate", "--model", tmp_path / "mute", "text", "--adapter", "base").exit_code == 2


def test_a_completion_that_ends_in_an_error_is_shown_and_is_exit_1(run: Run, tmp_path: Path) -> None:
    """The others' answers are worth as much as ever."""
    config = TINY | {"vocab_size": 20}
    write_base(tmp_path / "base", config)
    write_overflowing(tmp_path / "adapters" / "hot", config, token=7)
    (tmp_path / "p.jsonl").write_text('{"prompt": [7]}\n{"prompt": [1], "adapter": null}\n')
    arguments = ("generate", "--model", tmp_path / "base", "--adapter", tmp_path / "adapters" / "hot", "--file", tmp_path / "p.jsonl")
    result = run(*arguments, "--json", "--show-routing")
    assert result.exit_code == 1, result.output
    hot, base = items(result)
    assert (hot["finish_reason"], base["finish_reason"]) == ("error", "length")
    assert "NaN or infinity" in hot["error"]
    assert "error" not in base
    plain = run(*arguments)
    assert plain.exit_code == 1
    assert "error: " in plain.stdout


# -- serve


def test_settings_are_printed_as_a_file_that_gives_the_same_settings(run: Run, tmp_path: Path) -> None:
    """With their sources, and without what is secret."""
    env = {"MOA_API_KEY": "sk-secret", "MOA_MAX_WAITING": "7"}
    result = run("serve", "--print-settings", "--max-n", "4", "--allowed-hosts", 'a"b\\c', "--header-timeout-seconds", "2.5", env=env)
    assert result.exit_code == 0, result.output
    assert "sk-secret" not in result.output
    for line in (
        '# api_key = ["(hidden)"]  # MOA_API_KEY',
        "max_n = 4  # flag",
        "max_waiting = 7  # MOA_MAX_WAITING",
        "# model is not set",
    ):
        assert line in result.stdout.splitlines()
    assert "port = 8000  # default" in result.stdout.splitlines()
    file = tmp_path / "moa.toml"
    file.write_text(result.stdout)
    again = run("serve", "--config", file, "--print-settings")
    assert again.exit_code == 0, again.output

    def values(text: str) -> set[str]:
        return {line.partition("  # ")[0] for line in text.splitlines() if not line.startswith("#")} - {"api_key = []"}

    assert values(again.stdout) == values(result.stdout)


def test_secrets_that_a_list_of_processes_would_show_are_no_flags(run: Run) -> None:
    help_text = run("serve", "--help").stdout
    assert "--tls-cert" in help_text
    assert "tls-key-password" not in help_text
    assert run("serve", "--tls-key-password", "x").exit_code == 2
