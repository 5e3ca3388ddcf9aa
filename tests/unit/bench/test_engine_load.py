"""The engine as a contestant: it is asked what servers are asked, stream by stream, and a server is judged against it."""

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_base, write_family, write_overflowing, write_tokenizer
from serving import CONFIG, Serving, start_serving, write_talker
from typer.testing import CliRunner, Result

from moa_serve.__main__ import app
from moa_serve.bench.engine_load import EngineLoad
from moa_serve.bench.goals import Judged
from moa_serve.bench.serve import WARMUPS, Against, Load, Measured, Report, Served, Target, Wave, measure
from moa_serve.bench.timing import Spread
from moa_serve.engine.engine import TokenEvent
from moa_serve.engine.request import Request, SamplingParams, Sequence
from moa_serve.errors import AdapterNonfiniteOutput, AdapterNotFound, AdapterUnreadable, ContextLengthExceeded, InvalidRequest
from moa_serve.llm import LLM
from moa_serve.native.library import NativeUnavailable, instruction_sets
from moa_serve.shell.bench_serve import show

SMALL = Load(prompt_words=4, max_tokens=5)
ADAPTERS = ("soft", "sparse_fn", "instance")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a base `tiny` and adapters of three families."""
    folder = tmp_path_factory.mktemp("engine_load")
    write_talker(folder / "tiny")
    for seed, family in enumerate(ADAPTERS, start=1):
        write_family(folder / "adapters" / family, family, seed, CONFIG)
    return folder


def opened(folder: Path, backend: str = "torch", **more: Any) -> EngineLoad:
    options: dict[str, Any] = {"adapters_dir": folder / "adapters", "backend": backend, "device": "cpu", "dtype": "float32"} | more
    return EngineLoad(str(folder / "tiny"), **options)


@pytest.fixture(params=["torch", "native"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[EngineLoad]:
    if request.param == "native":
        try:
            instruction_sets()
        except NativeUnavailable as error:
            pytest.skip(f"no native backend here: {error}")
    with closing(opened(folder, request.param)) as made:
        yield made


class Journal:
    """What went into an engine and came out of it, in order."""

    def __init__(self, load: EngineLoad, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[Sequence] = []
        self.lines: list[tuple[str, int]] = []  # ("add" or "end", which request)
        self.num_open: list[int] = []  # before each step
        engine = load.engine
        add, step = engine.add, engine.step

        def journaled_add(request: Request) -> Sequence:
            sequence = add(request)
            self.begun.append(sequence)
            self.lines.append(("add", len(self.begun) - 1))
            return sequence

        def journaled_step() -> list[TokenEvent]:
            self.num_open.append(engine.scheduler.num_running + engine.scheduler.num_waiting)
            events = step()
            self.lines += [("end", self.begun.index(event.sequence)) for event in events if event.finish_reason]
            return events

        monkeypatch.setattr(engine, "add", journaled_add)
        monkeypatch.setattr(engine, "step", journaled_step)


# -- waves


def test_a_stream_sends_its_next_request_when_the_one_before_has_ended(engine: EngineLoad, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once would be another load: fewer steps, each with more rows."""
    engine.prepare(["tiny", "soft"])
    journal = Journal(engine, monkeypatch)
    prompts = SMALL.prompts(3, 0)
    seconds, answers = engine.run(prompts, SMALL.max_tokens)

    sent = [engine._tokenizer.decode(sequence.request.prompt_ids) for sequence in journal.begun]
    assert sent[:3] == [stream[0] for stream in prompts]
    assert sorted(sent[3:]) == sorted(stream[1] for stream in prompts)
    assert max(journal.num_open) == 3
    for stream in prompts:
        first, second = map(sent.index, stream)
        assert journal.lines.index(("end", first)) < journal.lines.index(("add", second))

    assert [answer.num_tokens for answer in answers] == [5] * 6
    for answer in answers:
        assert answer.ttft_seconds is not None
        assert 0 < answer.ttft_seconds < seconds
        assert len(answer.gaps_seconds) == 4
        assert min(answer.gaps_seconds) > 0  # one token a step
    assert not engine.engine.has_work


def test_tokens_are_those_of_the_models_that_streams_ask_for_in_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base in place of an adapter would be faster, and nobody would see it. The end of a text does not count."""
    models = ["soft", "tiny", "instance"]
    prompts = Load(prompt_words=4, requests_per_stream=1).prompts(4, 0)
    with closing(opened(folder)) as engine:
        engine.prepare(models)
        assert engine.served.models == models
        journal = Journal(engine, monkeypatch)
        engine.run(prompts, 5)
        found = [sequence.token_ids[sequence.num_prompt :] for sequence in journal.begun]
    adapters = {name: folder / "adapters" / name for name in ADAPTERS}
    with LLM(folder / "tiny", adapters=adapters, backend="torch", device="cpu", dtype="float32") as llm:
        names = [None if name == "tiny" else name for name in [*models, models[0]]]
        params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
        expected = llm.generate([prompt for (prompt,) in prompts], params, adapter=names)
    assert found == [completion.token_ids for completion in expected]
    assert len(set(map(tuple, found))) > 1


def test_without_a_model_the_base_is_asked_for(engine: EngineLoad) -> None:
    engine.prepare([])
    assert engine.served == Served("engine", None, ["tiny"], True, engine.computed)
    assert (engine.computed.base, engine.computed.dtype, engine.computed.device) == ("tiny", "float32", "cpu")
    assert len(engine.run([["a"]], 3)[1]) == 1


def test_it_starts_no_python_thread(folder: Path) -> None:
    """A server that is measured in between must have the processors for itself."""
    before = threading.enumerate()
    with closing(opened(folder)) as engine:
        engine.prepare(["soft"])
        engine.run([["a"], ["b"]], 3)
        assert threading.enumerate() == before


# -- what goes wrong


def test_an_unknown_model_is_told_with_what_there_is(folder: Path) -> None:
    with closing(opened(folder)) as engine:
        with pytest.raises(AdapterNotFound) as caught:
            engine.prepare(["soft", "none"])
        assert str(caught.value) == (
            f"engine: there is no model 'none': the base is 'tiny', and {folder / 'adapters'} holds instance, soft, sparse_fn; "
            f"correct --model, --base or --adapters-dir"
        )
        with pytest.raises(AdapterNotFound, match=r"no model '\.\./adapters/soft'"):
            engine.prepare(["../adapters/soft"])
    with (
        closing(opened(folder, adapters_dir=None)) as engine,
        pytest.raises(AdapterNotFound, match=r"no adapters directory; .*--adapters-dir"),
    ):
        engine.prepare(["soft"])
    with closing(opened(folder, adapters_dir=folder / "nowhere")) as engine, pytest.raises(AdapterUnreadable, match="cannot be listed"):
        engine.prepare(["soft"])


def test_a_base_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "tiny")
    with pytest.raises(InvalidRequest, match="base 'tiny' has no tokenizer"):
        opened(tmp_path)


def test_an_adapter_that_overflows_is_told_by_its_name_and_nothing_is_left_behind(tmp_path: Path) -> None:
    config = CONFIG | {"hidden_size": 264}  # wider than the vocabulary, as `write_overflowing` needs it
    write_base(tmp_path / "tiny", config)
    write_tokenizer(tmp_path / "tiny")
    with closing(opened(tmp_path)) as engine:
        (letter,) = engine._tokenizer.encode("%", parse_special=False)
        write_overflowing(tmp_path / "adapters" / "hot", config, token=letter)
        engine.prepare(["hot", "tiny"])
        with pytest.raises(AdapterNonfiniteOutput, match="engine: model 'hot': "):
            engine.run([["a %"], ["a"]], 5)
        assert not engine.engine.has_work
        assert engine.engine.block_pool.num_held == 0


def test_what_is_longer_than_the_context_is_told(folder: Path) -> None:
    with closing(opened(folder)) as engine:
        engine.prepare([])
        with pytest.raises(ContextLengthExceeded, match="5000 to generate are more than the served context"):
            engine.run([["a"]], 5000)
        assert not engine.engine.has_work


# -- against a server


@pytest.fixture
def serving(folder: Path) -> Iterator[Serving]:
    started = start_serving(folder / "tiny", folder / "adapters")
    yield started
    started.stop()


def test_our_server_and_the_engine_take_turns_with_the_same_requests(
    folder: Path, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same tokens in, same adapters, same tokens out; the ratio is the server's speed over the engine's, judged at 8 streams."""
    server = serving.server.engine.engine
    served: list[Sequence] = []
    add = server.add

    def journaled(request: Request) -> Sequence:
        served.append(add(request))
        return served[-1]

    monkeypatch.setattr(server, "add", journaled)
    with closing(opened(folder)) as engine:
        journal = Journal(engine, monkeypatch)
        models = ["tiny", "soft"]
        report = serving.over_http(
            lambda url: measure([Target("ours", url)], SMALL, streams=[2, 8], models=models, rounds=1, engine=engine)
        )

    def seen(sequences: list[Sequence]) -> list[Any]:
        requests = [(one.request, tuple(one.token_ids)) for one in sequences if one.request.params.max_tokens == SMALL.max_tokens]
        return sorted((tokens, one.prompt_ids, one.adapter or "", one.params.is_greedy, one.params.ignore_eos) for one, tokens in requests)

    assert len(journal.begun) == 2 + (WARMUPS + 1) * (2 + 8) * 2
    assert seen(served) == seen(journal.begun)

    assert [one.name for one in report.servers] == ["ours", "engine"]
    assert report.servers[1].models == models
    assert [(one.server, one.num_streams, [wave.num_tokens for wave in one.waves]) for one in report.measured] == [
        (name, count, [count * 2 * 5]) for count in (2, 8) for name in ("ours", "engine")
    ]
    speeds = {(one.server, one.num_streams): [wave.tokens_per_second for wave in one.waves] for one in report.measured}
    assert [(one.first, one.other, one.ratio.goal) for one in report.against] == [("ours", "engine", None), ("ours", "engine", 0.92)]
    for one in report.against:
        ours, alone = speeds["ours", one.num_streams], speeds["engine", one.num_streams]
        assert one.ratio.found == Spread.of([a / b for a, b in zip(ours, alone, strict=True)])
        assert one.ratio.is_floor


def test_a_server_cannot_have_the_engines_name(folder: Path) -> None:
    with closing(opened(folder)) as engine, pytest.raises(InvalidRequest, match="NAME=URL"):
        measure([Target("engine", "http://127.0.0.1:1")], SMALL, streams=[1], engine=engine)


# -- the command


def bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", *map(str, arguments)])


def flags(folder: Path, *more: str) -> list[str]:
    engine = ["--engine", "--base", str(folder / "tiny"), "--adapters-dir", str(folder / "adapters"), "--backend", "torch"]
    return [*engine, "--device", "cpu", "--streams", "8", "--rounds", "1", "--prompt-words", "2", "--max-tokens", "2", *more]


def test_the_command_judges_the_server_against_the_engine(folder: Path, serving: Serving) -> None:
    models = ("--model", "soft", "--model", "tiny")
    done = serving.over_http(lambda url: bench("--url", f"ours={url}", *flags(folder, *models, "--json")))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    computed = {"base": "tiny", "backend": "torch", "device": "cpu", "dtype": "float32", "threads": torch.get_num_threads()}
    assert found["servers"][1] == {"name": "engine", "url": None, "models": ["soft", "tiny"], "has_ignore_eos": True, "computed": computed}
    assert found["servers"][0]["computed"] is None
    (against,) = found["against"]
    ratio = against["tokens_per_second"]
    assert (against["first"], against["other"], ratio["goal"]) == ("ours", "engine", 0.92)
    assert ratio["is_met"] == (ratio["median"] >= 0.92)
    assert "warning" not in done.stderr

    done = serving.over_http(lambda url: bench("--url", f"ours={url}", *flags(folder)))
    assert done.exit_code == 0, done.output
    assert ">= 0.92" in done.stdout
    assert "engine: tiny, torch on cpu, float32, 1 thread" in done.stdout


@pytest.mark.parametrize(("speed", "cell"), [(919, "0.919x (0.919 to 0.919) !"), (920, "0.920x (0.920 to 0.920)")])
def test_the_table_marks_a_goal_that_is_missed(speed: int, cell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rounding must not let a ratio look as good as its goal."""
    waves = {name: [Wave(1.0, 1, tokens, None, None, None, None)] for name, tokens in (("ours", speed), ("engine", 1000))}
    ratio = Judged(Spread.of([speed / 1000]), 0.92, is_floor=True)
    with closing(opened(folder)) as engine:
        engine.prepare(["soft"])
        servers = [Served("ours", "http://host", ["m"], True), engine.served]
    show(Report(Load(), 1, servers, [Measured(name, 8, one) for name, one in waves.items()], [Against("ours", "engine", 8, ratio)]))
    *_, row, last = capsys.readouterr().out.splitlines()
    assert row.endswith(f"{cell}   >= 0.92")
    assert last == "engine: tiny, torch on cpu, float32, 1 thread, asked for soft; ! misses its goal"


def test_mistakes_are_one_line(folder: Path, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*arguments: str) -> tuple[int, str]:
        done = serving.over_http(lambda url: bench("--url", url, *arguments))
        assert done.stdout == ""
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return done.exit_code, error

    nowhere = str(folder / "nowhere")
    for arguments, code, message in (
        (flags(folder, "--adapters-dir", nowhere), 2, f"--adapters-dir {nowhere}: there is no such folder; name the one of the server"),
        (flags(folder, "--base", nowhere), 2, "there is no such folder or file"),
        (flags(folder, "--backend", "gpu"), 2, "backend 'gpu' is unknown"),
        (
            flags(folder, "--adapters-dir", str(folder / "tiny"), "--model", "soft"),
            1,
            "engine: there is no model 'soft': the base is 'tiny', ",
        ),
        (["--base", str(folder / "tiny")], 2, "--base is of the engine without HTTP; give --engine too, or leave it out"),
        (["--adapters-dir", nowhere], 2, "--adapters-dir is of the engine without HTTP; give --engine too, or leave it out"),
    ):
        found = failed(*arguments)
        assert found[0] == code, found
        assert message in found[1]

    for name, value in (("MOA_MODEL", nowhere), ("MOA_ADAPTERS_DIR", nowhere), ("MOA_DTYPE", "float32")):  # a server's, in the same shell
        monkeypatch.setenv(name, value)
    done = serving.over_http(lambda url: bench("--url", url, "--streams", "1", "--rounds", "1", "--max-tokens", "2"))
    assert done.exit_code == 0, done.output
