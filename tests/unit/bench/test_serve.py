"""The load generator against servers whose answers are known: it counts what came, sends what it says, and stops at the first failure."""

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any

import pytest
from families import write_family
from serving import CONFIG, start_serving, write_talker
from typer.testing import CliRunner, Result

from moa_serve.__main__ import app
from moa_serve.bench.serve import Answer, Load, Measured, Report, Served, Target, Transcript, Wave, measure
from moa_serve.bench.timing import Spread
from moa_serve.errors import InvalidRequest, MoaError
from moa_serve.shell.bench_serve import show

SMALL = Load(prompt_words=8, max_tokens=3)
USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}}
Reply = Callable[[dict[str, Any]], tuple[int, bytes]]


def chunk(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": None}], **more}


def sse(*events: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def refusal(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": "x"}}).encode()


ANSWER = sse(chunk(" a", usage=None), chunk("", usage=None), chunk(" b", usage=None), USAGE)


class Handler(BaseHTTPRequestHandler):
    """Keeps connections open, so that only the client can be why each request has its own."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Fake"

    def setup(self) -> None:
        super().setup()
        self.server.connections.append(self.client_address)

    def do_GET(self) -> None:
        self._answer(200, json.dumps({"data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["authorization"])
        self.server.journal.append(self.server.name)
        self._answer(*self.server.reply(body))

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


class Fake(ThreadingTCPServer):
    """A server that answers every completion with `reply(body)`; `journal` may be shared, to see in which order servers were asked."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, name: str, reply: Reply, journal: list[str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.reply = name, reply
        self.models = ["first", "second"]
        self.journal = [] if journal is None else journal
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.connections: list[Any] = []

    @property
    def target(self) -> Target:
        return Target(self.name, f"http://127.0.0.1:{self.server_address[1]}")


Start = Callable[..., Fake]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a server; all of them end with the test."""
    started: list[tuple[Fake, threading.Thread]] = []

    def make(reply: Reply = lambda _: (200, ANSWER), name: str = "fake", journal: list[str] | None = None) -> Fake:
        server = Fake(name, reply, journal)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((server, thread))
        return server

    yield make
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


def nobody() -> Target:
    """A port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return Target("nobody", f"http://127.0.0.1:{listener.getsockname()[1]}")


# -- reading


def transcript(*pieces: tuple[float, bytes]) -> Transcript:
    return Transcript("fake", 1.0, list(pieces))


def test_times_are_of_events_with_text_wherever_the_network_cuts_them() -> None:
    """An event that comes in two pieces is there with the second one; two that come together have no time between them."""
    whole = sse(chunk(""), chunk(" a"), chunk(" b"), chunk(" c"), USAGE)
    middle, late = whole.index(b' a"'), whole.index(b' c"')
    answer = transcript((1.5, whole[:middle]), (2.0, whole[middle:late]), (2.25, whole[late:])).read()
    assert answer == Answer(num_tokens=3, ttft_seconds=1.0, gaps_seconds=(0.0, 0.25))


def test_tokens_are_counted_by_usage_and_without_it_by_events() -> None:
    """A server may put several tokens into one event; only its usage tells."""
    events = [chunk(" several words"), chunk(""), chunk(" more")]
    usage = {"choices": [], "usage": {"completion_tokens": 7}}
    assert transcript((2.0, sse(*events, usage))).read().num_tokens == 7
    assert transcript((2.0, sse(*events))).read().num_tokens == 2
    assert transcript(
        (2.0, sse(chunk(" a", usage={"completion_tokens": 1}), chunk(" b", usage={"completion_tokens": 2})))
    ).read() == Answer(2, 1.0, (0.0,))


def test_lines_of_other_servers_are_read_too() -> None:
    """CRLF, no space behind the colon, comments, and no [DONE]."""
    text = json.dumps(chunk(" a")).encode()
    assert transcript((2.0, b": ping\r\nevent: x\r\ndata:" + text + b"\r\n\r\ndata: " + text), (3.0, b"\n")).read() == Answer(
        2, 1.0, (1.0,)
    )


def test_an_answer_without_text_has_no_times() -> None:
    assert transcript((2.0, sse(USAGE))).read() == Answer(3, None, ())
    wave = Wave.of(2.0, [Answer(3, None, ())])
    assert (wave.tokens_per_second, wave.ttft_p50_seconds, wave.gap_p99_seconds) == (1.5, None, None)
    assert Measured("fake", 1, [wave]).spread("gap_p50_seconds") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'data: {"error": {"message": "it overflowed", "code": "x"}}\n\n', "fake: the stream ended with an error: it overflowed"),
        (b"data: <html>\n\n", "no JSON object"),
        (b"data: [1]\n\n", "no JSON object"),
    ],
)
def test_an_event_that_is_no_chunk_is_an_error(content: bytes, message: str) -> None:
    with pytest.raises(MoaError, match=message):
        transcript((2.0, content)).read()


def test_a_wave_is_summed_up() -> None:
    answers = [Answer(4, 0.1, (0.01, 0.03)), Answer(6, 0.3, (0.02,))]
    wave = Wave.of(2.0, answers)
    assert (wave.num_requests, wave.num_tokens, wave.tokens_per_second) == (2, 10, 5.0)
    assert wave.ttft_p50_seconds == pytest.approx(0.2)
    assert wave.ttft_p99_seconds == pytest.approx(0.298)
    assert wave.gap_p50_seconds == pytest.approx(0.02)


# -- what is sent


def test_a_url_has_a_name() -> None:
    assert Target.parse("http://127.0.0.1:8000") == Target("127.0.0.1:8000", "http://127.0.0.1:8000")
    assert Target.parse("ours=http://localhost:8000/v1/") == Target("ours", "http://localhost:8000")
    assert Target.parse("https://host/proxy?to=x").name == "host"
    for text in ("localhost:8000", "ours=", "", "ftp://host", "http://", "http://host:port"):
        with pytest.raises(InvalidRequest, match="no URL of a server"):
            Target.parse(text)


def test_prompts_are_distinct_and_the_same_in_every_run() -> None:
    """A prompt that came before would be answered from a cache."""
    found = [prompt for turn in range(3) for streams in (1, 4) for prompts in Load().prompts(streams, turn) for prompt in prompts]
    assert len(set(found)) == len(found) == 3 * (2 + 8)
    assert len({" ".join(prompt.split()[:4]) for prompt in found}) == len(found)
    assert all(len(prompt.split()) == 64 for prompt in found)
    assert Load().prompts(4, 1) == Load().prompts(4, 1) != Load(seed=1).prompts(4, 1)


def test_every_request_is_counted_and_has_its_own_connection(start: Start) -> None:
    server = start()
    report = measure([server.target], SMALL, streams=[1, 3], rounds=2, api_key="secret")
    waves = 1 + 2
    assert len(server.bodies) == 1 + waves * (1 * 2) + waves * (3 * 2)
    assert len(server.connections) == 1 + len(server.bodies)  # one for the list of models
    trial, *sent = server.bodies
    assert trial["max_tokens"] == 2
    assert len({body["prompt"] for body in sent}) == len(sent)
    expected = {"model": "first", "max_tokens": 3, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    for body in sent:
        assert body == expected | {"ignore_eos": True, "prompt": body["prompt"]}
    assert set(server.keys) == {"Bearer secret"}

    assert report.servers == [Served("fake", server.target.url, ["first"], True)]
    assert [(found.num_streams, len(found.waves)) for found in report.measured] == [(1, 2), (3, 2)]
    assert [[wave.num_tokens for wave in found.waves] for found in report.measured] == [[6, 6], [18, 18]]
    assert report.against == []
    for found in report.measured:
        for wave in found.waves:
            assert wave.num_requests == found.num_streams * 2
            assert wave.tokens_per_second == wave.num_tokens / wave.seconds
            assert wave.ttft_p50_seconds is not None
            assert 0 < wave.ttft_p50_seconds < wave.seconds


def test_without_usage_events_with_text_are_counted(start: Start) -> None:
    server = start(lambda _: (200, sse(chunk(" a"), chunk(""), chunk(" b"))))
    (found,) = measure([server.target], SMALL, streams=[2], rounds=1).measured
    assert found.waves[0].num_tokens == 2 * 2 * 2


def test_models_are_asked_for_in_turn(start: Start) -> None:
    server = start()
    report = measure([server.target], SMALL, streams=[3], models=["a", "b"], rounds=1)
    assert [body["model"] for body in server.bodies[:2]] == ["a", "b"]  # each once, so that both are loaded
    assert Counter(body["model"] for body in server.bodies[2:]) == {"a": 2 * 2 * 2, "b": 2 * 1 * 2}
    assert len(server.connections) == len(server.bodies)
    assert report.servers[0].models == ["a", "b"]


@pytest.mark.parametrize("status", [400, 422])
def test_ignore_eos_is_only_for_who_takes_it(start: Start, status: int) -> None:
    server = start(lambda body: (status, refusal("ignore_eos?")) if "ignore_eos" in body else (200, ANSWER))
    report = measure([server.target], SMALL, streams=[1], rounds=1)
    assert ["ignore_eos" in body for body in server.bodies] == [True] + [False] * (1 + 2 * 2)
    assert not report.servers[0].has_ignore_eos


def test_servers_take_turns_and_the_first_is_compared_with_each_other(start: Start) -> None:
    journal: list[str] = []
    servers = [start(name=name, journal=journal) for name in ("a", "b", "c")]
    report = measure(
        [server.target for server in servers], Load(prompt_words=4, max_tokens=3, requests_per_stream=1), streams=[1], rounds=3
    )
    assert "".join(journal) == "abc" + "cab" + "abc" + "bca" + "cab"
    prompts = [[body["prompt"] for body in server.bodies] for server in servers]
    assert prompts[0] == prompts[1] == prompts[2]
    speeds = {found.server: [wave.tokens_per_second for wave in found.waves] for found in report.measured}
    assert [(found.first, found.other, found.num_streams) for found in report.against] == [("a", "b", 1), ("a", "c", 1)]
    for found in report.against:
        spread = Spread.of([ours / theirs for ours, theirs in zip(speeds["a"], speeds[found.other], strict=True)])
        assert (found.ratio.found, found.ratio.goal, found.ratio.is_met) == (spread, None, None)


# -- what goes wrong


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (
            404,
            refusal("The model `first` does not exist"),
            "fake: POST /v1/completions was answered with status 404: The model `first` does",
        ),
        (400, refusal("stream_options is unknown"), "status 400: stream_options is unknown"),
        (422, b'{"detail": "a field is missing"}', "status 422: a field is missing"),
        (500, b"Internal Server Error", "status 500: Internal Server Error"),
        (500, b'"out of memory"', "status 500: out of memory"),
        (401, refusal("no key"), "status 401: no key; give its key with --api-key"),
    ],
)
def test_a_refused_request_ends_the_bench_with_its_status_and_message(start: Start, status: int, content: bytes, message: str) -> None:
    server = start(lambda _: (status, content))
    with pytest.raises(MoaError) as caught:
        measure([server.target], SMALL, streams=[1])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_failure_among_many_streams_is_one_error(start: Start) -> None:
    """Streams run as a group, whose errors come as a group too."""
    count = iter(range(1000))
    server = start(lambda _: (200, ANSWER) if next(count) < 5 else (503, refusal("too busy")))
    with pytest.raises(MoaError, match="status 503: too busy"):
        measure([server.target], SMALL, streams=[4])


def test_nobody_and_no_model_are_told(start: Start) -> None:
    server = start()
    server.models = []
    with pytest.raises(MoaError, match="lists no model; name one with --model"):
        measure([server.target], SMALL, streams=[1])
    for models in ([], ["a"]):
        with pytest.raises(MoaError, match=r"nobody: http://127.0.0.1:\d+ cannot be reached"):
            measure([nobody()], SMALL, streams=[1], models=models)


def test_a_connection_that_breaks_off_is_told(start: Start) -> None:
    def cut(_: Any) -> tuple[int, bytes]:
        raise ConnectionAbortedError

    server = start(cut)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # it would print
    with pytest.raises(MoaError, match="fake: an answer broke off"):
        measure([server.target], SMALL, streams=[1])


def test_answers_without_tokens_cannot_be_measured(start: Start) -> None:
    server = start(lambda _: (200, sse(chunk(""))))
    with pytest.raises(MoaError, match="fake: 2 answers have no token"):
        measure([server.target], SMALL, streams=[1])


def test_two_servers_need_two_names() -> None:
    with pytest.raises(InvalidRequest, match="NAME=URL"):
        measure([nobody(), nobody()], SMALL, streams=[1])


# -- the command


def bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", *map(str, arguments)])


def few(*urls: str) -> list[str]:
    named = [part for url in urls for part in ("--url", url)]
    return [*named, "--streams", "2", "--rounds", "2", "--prompt-words", "4", "--max-tokens", "3"]


def test_the_command_prints_one_json_document(start: Start) -> None:
    ours, theirs = start(), start()
    done = bench(*few(f"ours={ours.target.url}", f"theirs={theirs.target.url}/v1"), "--model", "m", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["load"] == {"prompt_words": 4, "max_tokens": 3, "requests_per_stream": 2, "seed": 0}
    assert [server["name"] for server in found["servers"]] == ["ours", "theirs"]
    assert [(one["server"], one["streams"], len(one["rounds"])) for one in found["measured"]] == [("ours", 2, 2), ("theirs", 2, 2)]
    assert found["measured"][0]["rounds"][0]["num_tokens"] == 12
    assert set(found["measured"][0]["ttft_p99_seconds"]) == {"median", "low", "high"}
    (against,) = found["against"]
    assert (against["first"], against["other"]) == ("ours", "theirs")
    assert against["tokens_per_second"]["median"] > 0


def test_the_table_tells_what_was_sent_and_who_is_faster(start: Start) -> None:
    ours, theirs = start(), start()
    done = bench(*few(f"ours={ours.target.url}", f"theirs={theirs.target.url}"))
    assert done.exit_code == 0, done.output
    assert "4 words in, 3 tokens out, greedy, 2 requests a stream; 2 interleaved rounds" in done.stdout
    assert "ours / it" in done.stdout
    assert done.stdout.count("x (") == 1
    assert "measuring 2 streams" in done.stderr
    assert "warning" not in done.stderr


def test_the_table_shows_medians_in_milliseconds(capsys: pytest.CaptureFixture[str]) -> None:
    waves = [Wave(2.0, 2, tokens, 0.1, 0.25, 0.0125, None) for tokens in (2000, 2400, 2800)]
    show(Report(Load(), 3, [Served("ours", "http://host", ["m"], True)], [Measured("ours", 8, waves)], []))
    cells = capsys.readouterr().out.splitlines()[-1].split()
    assert cells == ["8", "ours", "1,200.0", "1,100.0", "to", "1,300.0", "100.0", "250.0", "12.5", "-"]


def test_answers_that_end_early_are_warned_of(start: Start) -> None:
    """The speeds of two servers that generate different numbers of tokens cannot be compared."""
    server = start(lambda _: (200, sse(chunk(" a"))))
    done = bench(*few(server.target.url))
    assert done.exit_code == 0, done.output
    assert "2 streams: answers ended early, with 4 of 12 tokens" in done.stderr


def test_mistakes_are_one_line(start: Start, tmp_path: Path) -> None:
    refusing = start(lambda _: (404, refusal("The model `first` does not exist")))
    for arguments, code, message in (
        (few(refusing.target.url), 1, "status 404: The model `first` does not exist"),
        (few(nobody().url), 1, "cannot be reached"),
        (few("localhost"), 2, "no URL of a server"),
        ([*few(refusing.target.url), "--plot", str(tmp_path / "plot.svg")], 2, "only PNG"),
        ([*few(refusing.target.url), "--plot", str(tmp_path / "none" / "plot.png")], 2, "there is no folder"),
    ):
        done = bench(*arguments)
        assert done.exit_code == code, done.output
        assert done.stdout == ""
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert message in errors[0]


def test_the_plot_is_a_png(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ours, theirs = start(), start()
    done = bench(*few(f"ours={ours.target.url}", f"$x^$={theirs.target.url}"), "--streams", "1", "--plot", tmp_path / "plot.png")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")


# -- our own server


def test_our_own_server_takes_the_load(tmp_path: Path) -> None:
    """Every field that is sent is one that it accepts, adapters are models, and its usage is what was asked for."""
    write_family(tmp_path / "adapters" / "soft", "soft", config=CONFIG)
    serving = start_serving(write_talker(tmp_path / "base"), tmp_path / "adapters")

    def load(url: str) -> Report:
        small = Load(prompt_words=4, max_tokens=5)
        return measure([Target("ours", url)], small, streams=[2], models=["tiny", "soft"], rounds=1)

    try:
        report = serving.over_http(load)
    finally:
        serving.stop()
    assert report.servers[0].has_ignore_eos
    assert [wave.num_tokens for wave in report.measured[0].waves] == [2 * 2 * 5]
