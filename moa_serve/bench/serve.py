"""`moa-serve bench serve`: load over HTTP on one or more OpenAI-compatible servers, which take turns round by round.

The engine of this process (engine_load.py) can be one more contestant: what it does without HTTP is what a server could do at best.

A wave is one measurement: some streams at the same time, each of which sends its requests one after another, greedy, over a new connection
each, and reads the answers as they come. What comes is kept with its time and looked at after the wave: this client shares the processors
with the server that it measures, and takes no more of them than a client must. Starts no server; owns nothing but its connections.
Imports no torch.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import httpx
import numpy as np

from moa_serve.bench.goals import Judged, http_to_engine
from moa_serve.bench.timing import Spread, interleaved, quiet, ratio
from moa_serve.errors import InvalidRequest, MoaError

WARMUPS = 1  # rounds that do not count
FIGURES = ("tokens_per_second", "ttft_p50_seconds", "ttft_p99_seconds", "gap_p50_seconds", "gap_p99_seconds")
"""What a wave says, as properties or fields of `Wave`."""

TRIAL_PROMPT, TRIAL_TOKENS = "The captain looked at the sea and said", 2
"""What each model is asked once before anything is measured."""

_CONNECT_SECONDS, _SILENT_SECONDS = 10.0, 300.0
_MESSAGE_CHARS = 300  # of what a server says of an error

_NOUNS = """
    amber anchor apple arrow autumn basket bell bird blanket boat border bottle branch bread bridge brother bucket butter button cabin
    candle canyon carpet castle chair cherry circle clock cloud coat copper corner cotton country cousin crown cup dance dawn desert
    dinner dragon dream drum eagle earth engine evening farmer feather fence field finger fire flag flower forest fountain fox friend
    frost fruit garden gate ghost glass gold grain grass guitar hammer harbor harvest hat hill honey horse house ice ink iron island
    jacket journey jungle key king kitchen ladder lake lamp leaf lemon letter library light lion lock market meadow melon metal milk
    mirror moon morning mountain mouse music needle nest night north number ocean office onion orange oven owl paint palace paper parrot
    path pebble pencil pepper piano picture pillow pilot planet plate pocket poem pond potato prince pumpkin queen rabbit rain ribbon
    river road robot rock roof room rope rose sail salt sand school season shadow sheep ship shirt shoe silver sister sky snow soap song
    south spider spoon spring square stable stair star station stone storm story street sugar summer sun table tailor tea teacher tent
    thread thunder tiger tower town train tree tunnel turtle valley violin voice wagon wall water wave wheel whistle window winter wolf
    wood wool worker world yard yellow zebra
"""
WORDS = tuple(_NOUNS.split())


class RequestRefused(MoaError):
    """A server answered a request with a status other than 200; `status` is that."""

    code = "request_refused"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Target:
    """A server to load: what tables call it, and its base URL, without `/v1`."""

    name: str
    url: str

    @classmethod
    def parse(cls, text: str) -> "Target":
        """`URL` or `NAME=URL`, with `/v1` or without; a URL alone is called by its host and port.

        Raises:
            InvalidRequest: it is no http or https URL.
        """
        name, equals, url = text.partition("=")
        if not equals or "://" in name:  # the first = stands in the URL
            name, url = "", text
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL("")
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InvalidRequest(f"--url {text!r} is no URL of a server; write it as http://127.0.0.1:8000", param="url")
        return cls(name or parsed.netloc.decode(), url.rstrip("/").removesuffix("/v1"))


@dataclass(frozen=True, slots=True)
class Load:
    """What every stream sends.

    Args:
        prompt_words: words of a prompt; drawn anew for every request, so that no cache of prefixes helps.
        max_tokens: tokens to generate for each request.
        requests_per_stream: sent one after another.
        seed: of the words; another run against a server that keeps prefixes needs another one.
    """

    prompt_words: int = 64
    max_tokens: int = 64
    requests_per_stream: int = 2
    seed: int = 0

    def prompts(self, num_streams: int, turn: int) -> list[list[str]]:
        """Of each stream in one round; the same ones for all contestants."""
        return [
            [self._prompt(num_streams, turn, stream, index) for index in range(self.requests_per_stream)] for stream in range(num_streams)
        ]

    def _prompt(self, *place: int) -> str:
        return " ".join(random.Random(f"{self.seed} {place}").choices(WORDS, k=self.prompt_words))


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as its client met it.

    Args:
        num_tokens: generated, by the server's usage; where it sends none, the number of events with text.
        ttft_seconds: from sending to the first event with text, connecting included; None where no event has any.
        gaps_seconds: between one event with text and the next; 0 where they came together.

    Of the engine without HTTP an event is a token that came out of a step.
    """

    num_tokens: int
    ttft_seconds: float | None
    gaps_seconds: tuple[float, ...]

    @classmethod
    def of(cls, num_tokens: int, sent: float, times: Sequence[float]) -> "Answer":
        """From when the request was begun and when its events with text came."""
        gaps = tuple(after - before for before, after in pairwise(times))
        return cls(num_tokens, times[0] - sent if times else None, gaps)


@dataclass(slots=True)
class Transcript:
    """What came in answer to one request, piece by piece as the network gave it.

    Args:
        server: name for messages.
        sent: when the request was begun; this and the times of the pieces by `time.perf_counter`, in seconds.
        pieces: (time, bytes); the last one ends its line.
    """

    server: str
    sent: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    def read(self) -> Answer:
        """
        Raises:
            MoaError: an event tells of an error, or is no JSON object.
        """
        times: list[float] = []
        num_tokens: int | None = None
        for at, event in self._events():
            if event.get("error"):
                raise MoaError(f"{self.server}: the stream ended with an error: {_said(event['error'])}")
            if any(choice.get("text") for choice in event.get("choices") or ()):
                times.append(at)
            num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
        return Answer.of(len(times) if num_tokens is None else num_tokens, self.sent, times)

    def _events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """Each event, with the time of the piece that completed it."""
        for at, data in self._data_lines():
            try:
                event = json.loads(data)
            except ValueError:
                event = None
            if not isinstance(event, dict):
                raise MoaError(f"{self.server}: an event of the stream is no JSON object: {data[:80]!r}; is the URL an OpenAI API?")
            yield at, event

    def _data_lines(self) -> Iterator[tuple[float, bytes]]:
        rest = b""
        for at, piece in self.pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:") and (data := line[5:].strip()) not in (b"", b"[DONE]"):
                    yield at, data


@dataclass(frozen=True, slots=True)
class Wave:
    """One round of one contestant.

    Args:
        seconds: from the first request to the end of the last answer.
        num_tokens: generated in all answers.
        ttft_p50_seconds, ...: median and 99th percentile over all answers, or over all gaps; None where there are none.
    """

    seconds: float
    num_requests: int
    num_tokens: int
    ttft_p50_seconds: float | None
    ttft_p99_seconds: float | None
    gap_p50_seconds: float | None
    gap_p99_seconds: float | None

    @classmethod
    def of(cls, seconds: float, answers: Sequence[Answer]) -> "Wave":
        ttfts = [answer.ttft_seconds for answer in answers if answer.ttft_seconds is not None]
        gaps = [gap for answer in answers for gap in answer.gaps_seconds]
        quantiles = [_quantile(values, share) for values in (ttfts, gaps) for share in (0.5, 0.99)]
        return cls(seconds, len(answers), sum(answer.num_tokens for answer in answers), *quantiles)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


def _quantile(values: Sequence[float], share: float) -> float | None:
    return float(np.quantile(values, share)) if values else None


@dataclass(frozen=True, slots=True)
class Computed:
    """How the engine of this process computes; what of a server its own log says."""

    base: str
    backend: str
    device: str
    dtype: str
    threads: int


@dataclass(frozen=True, slots=True)
class Served:
    """A contestant that was measured, the models that it was asked for, and whether it was asked to ignore the end of a text.

    Args:
        url: None for the engine of this process.
        computed: None for a server.
    """

    name: str
    url: str | None
    models: list[str]
    has_ignore_eos: bool
    computed: Computed | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """The waves of one contestant under one number of streams, one a round."""

    server: str
    num_streams: int
    waves: list[Wave]

    def spread(self, figure: str) -> Spread | None:
        """Of one of FIGURES over the rounds; None where a wave does not have it."""
        values = [getattr(wave, figure) for wave in self.waves]
        return None if None in values else Spread.of(values)

    def to_json(self) -> dict[str, Any]:
        spreads = {figure: self.spread(figure) for figure in FIGURES}
        return {
            "server": self.server,
            "streams": self.num_streams,
            **{figure: None if spread is None else spread.to_json() for figure, spread in spreads.items()},
            "rounds": [wave.to_json() for wave in self.waves],
        }


@dataclass(frozen=True, slots=True)
class Against:
    """Tokens/s of the first server over another contestant's, by what each round says; judged where that is the engine alone."""

    first: str
    other: str
    num_streams: int
    ratio: Judged

    def to_json(self) -> dict[str, Any]:
        return {"first": self.first, "other": self.other, "streams": self.num_streams, "tokens_per_second": self.ratio.to_json()}


@dataclass(frozen=True, slots=True)
class Report:
    """All of a run: `measured` for each number of streams and each contestant, `against` for each of them but the first server."""

    load: Load
    num_rounds: int
    servers: list[Served]
    measured: list[Measured]
    against: list[Against]

    def to_json(self) -> dict[str, Any]:
        return {
            "load": asdict(self.load),
            "rounds": self.num_rounds,
            "servers": [asdict(server) for server in self.servers],
            "measured": [found.to_json() for found in self.measured],
            "against": [found.to_json() for found in self.against],
        }


class Client:
    """Requests to one server, each over a connection of its own.

    Attributes:
        models: what streams ask for in turn, once `prepare` has run.
        has_ignore_eos: whether the server takes `ignore_eos`.
    """

    def __init__(self, target: Target, api_key: str | None = None) -> None:
        self.target = target
        self.models: list[str] = []
        self.has_ignore_eos = True
        self._headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._tls = httpx.create_ssl_context()  # made once: it reads every certificate authority, which takes longer than a request

    async def prepare(self, models: Sequence[str]) -> None:
        """Learn what the server has and takes, and ask each model for a little, so that all are loaded.

        Args:
            models: to ask for; where there are none, the first one that the server lists.
        Raises:
            MoaError: the server cannot be reached, or refuses.
        """
        self.models = list(models) or [await self._first_model()]
        try:
            await self._try(self.models[0])
        except RequestRefused as refused:
            if refused.status not in (400, 422):
                raise
            self.has_ignore_eos = False  # if it was something else, the server says so again
            await self._try(self.models[0])
        for model in self.models[1:]:
            await self._try(model)

    async def _try(self, model: str) -> None:
        (await self.complete(self.content(model, TRIAL_PROMPT, TRIAL_TOKENS))).read()

    async def _first_model(self) -> str:
        url = f"{self.target.url}/v1/models"
        try:
            async with self._http() as http:
                response = await http.get(url)
        except httpx.HTTPError as error:
            raise self._lost(error) from None
        if response.status_code != 200:
            raise self._refused("GET /v1/models", response.status_code, response.content)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise MoaError(f"{self.target.name}: {url} lists no model; name one with --model") from None

    def content(self, model: str, prompt: str, max_tokens: int) -> bytes:
        """The body of a request."""
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.has_ignore_eos:
            body["ignore_eos"] = True
        return json.dumps(body).encode()

    async def complete(self, content: bytes) -> Transcript:
        """Send one request and keep what comes.

        Raises:
            RequestRefused: another status than 200.
            MoaError: the server cannot be reached, or its answer broke off.
        """
        try:
            async with self._http() as http:
                transcript = Transcript(self.target.name, time.perf_counter())
                async with http.stream("POST", f"{self.target.url}/v1/completions", content=content) as response:
                    if response.status_code != 200:
                        raise self._refused("POST /v1/completions", response.status_code, await response.aread())
                    async for piece in response.aiter_raw():
                        transcript.pieces.append((time.perf_counter(), piece))
        except httpx.HTTPError as error:
            raise self._lost(error) from None
        transcript.pieces.append((time.perf_counter(), b"\n"))  # for a last line that the server left open
        return transcript

    def _http(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(_SILENT_SECONDS, connect=_CONNECT_SECONDS)
        return httpx.AsyncClient(headers=self._headers, verify=self._tls, timeout=timeout, trust_env=False)

    def _refused(self, what: str, status: int, content: bytes) -> RequestRefused:
        hint = "; give its key with --api-key" if status in (401, 403) else ""
        return RequestRefused(f"{self.target.name}: {what} was answered with status {status}: {_message(content)}{hint}", status)

    def _lost(self, error: httpx.HTTPError) -> MoaError:
        name, detail = self.target.name, str(error) or type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return MoaError(f"{name}: {self.target.url} cannot be reached ({detail}); start the server, or correct --url", param="url")
        return MoaError(f"{name}: an answer broke off ({detail}); the server's log may say why")


def _message(content: bytes) -> str:
    """What the body of a refusal says, in whichever shape."""
    try:
        body = json.loads(content)
    except ValueError:
        return content.decode(errors="replace").strip()[:_MESSAGE_CHARS]
    return _said(body.get("error") or body if isinstance(body, dict) else body)


def _said(error: Any) -> str:
    """OpenAI's and vLLM's errors have a `message`, FastAPI's a `detail`."""
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error)[:_MESSAGE_CHARS]


class Contestant(Protocol):
    """Who has a turn in every round. Between its turns it takes no time of a processor."""

    @property
    def name(self) -> str: ...

    @property
    def served(self) -> Served: ...

    def prepare(self, models: Sequence[str]) -> None:
        """Get ready what streams will ask for; a model of its own choice where there is none. Raises MoaError."""
        ...

    def run(self, streams: Sequence[Sequence[str]], max_tokens: int) -> tuple[float, list[Answer]]:
        """Seconds of one wave and its answers: all streams at the same time, the prompts of each one after another. Raises MoaError."""
        ...


class _OverHttp:
    """A server as a contestant; its client's requests run in the loop of `runner`."""

    def __init__(self, runner: asyncio.Runner, client: Client) -> None:
        self._runner, self._client = runner, client

    @property
    def name(self) -> str:
        return self._client.target.name

    @property
    def served(self) -> Served:
        return Served(self.name, self._client.target.url, self._client.models, self._client.has_ignore_eos)

    def prepare(self, models: Sequence[str]) -> None:
        self._runner.run(self._client.prepare(models))

    def run(self, streams: Sequence[Sequence[str]], max_tokens: int) -> tuple[float, list[Answer]]:
        models = self._client.models
        contents = [
            [self._client.content(models[stream % len(models)], prompt, max_tokens) for prompt in prompts]
            for stream, prompts in enumerate(streams)
        ]
        with quiet():
            seconds, transcripts = self._runner.run(_wave(self._client, contents))
        return seconds, [transcript.read() for transcript in transcripts]


def measure(
    targets: Sequence[Target],
    load: Load,
    *,
    streams: Sequence[int],
    models: Sequence[str] = (),
    rounds: int = 3,
    api_key: str | None = None,
    engine: Contestant | None = None,
    on_streams: Callable[[int], None] | None = None,
) -> Report:
    """Measure every server, and the engine where there is one, under every number of streams, after one wave of each to warm up.

    Args:
        streams: numbers of streams, one after another; within each the contestants take turns.
        models: what streams ask for in turn, of every contestant; the first one that a server lists where there are none.
        engine: of this process. The first server is judged against it.
        on_streams: called with each number of streams before its waves.
    Raises:
        InvalidRequest: two contestants have one name, or there is no server.
        MoaError: a request failed; nothing goes on then.
    """
    names = [target.name for target in targets] + ([] if engine is None else [engine.name])
    if not targets or len(set(names)) < len(names):
        raise InvalidRequest(f"--url must be given once for each server, but they are {names}; use NAME=URL to tell two apart", param="url")
    measured: list[Measured] = []
    against: list[Against] = []
    with asyncio.Runner() as runner:
        contestants: list[Contestant] = [_OverHttp(runner, Client(target, api_key)) for target in targets]
        if engine is not None:
            contestants.append(engine)
        for contestant in contestants:
            contestant.prepare(models)
        for num_streams in streams:
            if on_streams is not None:
                on_streams(num_streams)
            waves: dict[str, list[Wave]] = {name: [] for name in names}
            cases = {one.name: partial(_measure_wave, one, load, num_streams, waves[one.name]) for one in contestants}
            interleaved(cases, rounds, warmups=WARMUPS)
            found = [Measured(name, num_streams, waves[name][WARMUPS:]) for name in names]
            measured += found
            for other in found[1:]:
                is_engine = engine is not None and other.server == engine.name
                against.append(_against(found[0], other, http_to_engine(num_streams) if is_engine else None))
    return Report(load, rounds, [contestant.served for contestant in contestants], measured, against)


def _against(first: Measured, other: Measured, goal: float | None) -> Against:
    speeds = [[wave.tokens_per_second for wave in one.waves] for one in (first, other)]
    return Against(first.server, other.server, first.num_streams, Judged(ratio(*speeds), goal, is_floor=True))


def _measure_wave(contestant: Contestant, load: Load, num_streams: int, waves: list[Wave]) -> float:
    """Add the contestant's next wave to `waves`; its seconds."""
    seconds, answers = contestant.run(load.prompts(num_streams, len(waves)), load.max_tokens)
    wave = Wave.of(seconds, answers)
    if not wave.num_tokens:
        raise MoaError(f"{contestant.name}: {wave.num_requests} answers have no token, so there is nothing to measure; try one by hand")
    waves.append(wave)
    return seconds


async def _wave(client: Client, contents: Sequence[Sequence[bytes]]) -> tuple[float, list[Transcript]]:
    """(seconds, what came) of streams that all run at once; each sends its own bodies one after another."""
    transcripts: list[Transcript] = []

    async def send_all(bodies: Sequence[bytes]) -> None:
        for body in bodies:
            transcripts.append(await client.complete(body))

    start = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:  # the first request that fails ends the others
            for bodies in contents:
                group.create_task(send_all(bodies))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return time.perf_counter() - start, transcripts
