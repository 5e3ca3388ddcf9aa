"""Traffic for a real server: random requests from a seed, clients that leave, clients that are wrong, and a ledger of how each ended.

Only what a client can see. What the server says of itself is compared with it in agreement.py.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import accumulate, count
from typing import Any

import httpx

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
READ_SECONDS = 120.0
KEEP_SECONDS = 2.0  # below the server's 5: it must never close a connection just as a request goes out on it
MAX_NEW_TOKENS = 64
TEXT = (
    "the cat sat on a mat while rain fell over quiet hills and somebody wrote letters about ships, tides; old maps? new roads! "
    "señor naïve 東京 🙂 x=1 {json} <s> tomorrow we shall see whether seven small stones make one great wall of sound or not"
)
WORDS = TEXT.split()
CANARY = "The captain looked at the sea and said"
OVERLOADED = (429, 503)  # refusals that a correct request may meet


class WrongAnswer(Exception):
    """A 200 that is not the answer to its request."""


class PlannedError(Exception):
    """An error that somebody caused on purpose, after the first event of a stream."""


class Outcome(StrEnum):
    """The four ways in which a request can end."""

    OK = "ok"
    REFUSED = "refused"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Job:
    """One request.

    Args:
        model: as asked for; `adapter` is the adapter that must answer, None the base.
        content: the body as it is sent.
        n, max_tokens: what the answer may have at most.
        max_prompt_tokens: no fewer than the prompt has.
        expected: the status that it must get.
        leave_events: the client leaves after so many events of the stream.
        leave_seconds: the client leaves after this time, whatever has come.
        pause_seconds: the client reads nothing for this time after its first event.
    """

    model: str
    adapter: str | None
    path: str
    content: bytes
    n: int = 1
    max_tokens: int = 0
    max_prompt_tokens: int = 0
    stop: tuple[str, ...] = ()
    is_stream: bool = False
    has_logprobs: bool = False
    content_type: str = "application/json"
    expected: int = 200
    leave_events: int | None = None
    leave_seconds: float | None = None
    pause_seconds: float = 0.0


@dataclass(slots=True)
class Entry:
    """What became of a job.

    Args:
        is_sent: the server has got its head, so it must know of it.
        status: of the response; None where none came.
        finish_reason: of the whole request as the server counts it: length if any choice had it.
        prompt_tokens, generated_tokens, cached_tokens: by the last usage that came; of a cancelled request the server may have made more.
        detail: of an error.
        begun: time.monotonic().
        is_planned: it failed because a fault was injected; how far the server had come with it, only the server knows.
        revision, logprobs: of the answer's first choice.
    """

    job: Job
    request_id: str
    is_sent: bool = False
    outcome: Outcome | None = None
    status: int | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    generated_tokens: int = 0
    cached_tokens: int = 0
    ttft_seconds: float | None = None
    text: str = ""
    detail: str = ""
    begun: float = field(default_factory=time.monotonic)
    is_planned: bool = False
    revision: str | None = None
    logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Ledger:
    """Every request since the first scrape, and every response by its status, those of scrapes included."""

    entries: list[Entry] = field(default_factory=list)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    gaps_seconds: list[float] = field(default_factory=list)  # between events of a stream
    generated_tokens: int = 0

    def begin(self, job: Job, request_id: str) -> Entry:
        self.entries.append(Entry(job, request_id))
        return self.entries[-1]

    def end(self, entry: Entry, outcome: Outcome, detail: str = "") -> None:
        assert entry.outcome is None, f"{entry.request_id} ended as {entry.outcome}, and now as {outcome}"
        entry.outcome, entry.detail = outcome, detail or entry.detail
        self.outcomes[outcome] += 1
        self.generated_tokens += entry.generated_tokens

    def of(self, outcome: Outcome, model: str | None = None) -> Iterator[Entry]:
        return (entry for entry in self.entries if entry.outcome is outcome and model in (None, entry.job.model))

    @property
    def ttft_seconds(self) -> list[float]:
        return [entry.ttft_seconds for entry in self.entries if entry.ttft_seconds is not None]


class Client:
    """
    Args:
        base_name: the base's model name; every other one is an adapter's.
        run: what request ids begin with.
        is_planned: whether an error with this code was caused on purpose.
    """

    def __init__(
        self, url: str, ledger: Ledger, run: str = "soak", is_planned: Callable[[Entry, str], bool] = lambda entry, code: False
    ) -> None:
        self._is_planned = is_planned
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_SECONDS)
        self._http = httpx.AsyncClient(base_url=url, limits=limits, timeout=httpx.Timeout(READ_SECONDS), trust_env=False)
        self.ledger, self._run, self._ids = ledger, run, count(1)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> str:
        """Raises httpx.HTTPError: it is no 200."""
        response = await self._http.get(path)
        self.ledger.statuses[response.status_code] += 1
        return response.raise_for_status().text

    async def count_tokens(self, **body: Any) -> int | None:
        """Tokens of a prompt or of messages; None where the base cannot say."""
        response = await self._http.post("/tokenize", json=body)
        self.ledger.statuses[response.status_code] += 1
        return int(response.json()["count"]) if response.status_code == 200 else None

    async def send(self, job: Job) -> Entry:
        """The job's entry, which has ended; whatever happens to the request, nothing is raised but the caller's own cancellation."""
        entry = self.ledger.begin(job, f"{self._run}-{next(self._ids)}")
        try:
            async with asyncio.timeout(job.leave_seconds):
                outcome = await self._converse(job, entry)
        except TimeoutError:
            self.ledger.end(entry, Outcome.CANCELLED)
        except asyncio.CancelledError:
            self.ledger.end(entry, Outcome.CANCELLED)
            raise
        except PlannedError:
            entry.is_planned = True
            self.ledger.end(entry, Outcome.REFUSED)
        except (httpx.HTTPError, WrongAnswer, ValueError, KeyError, TypeError) as error:
            self.ledger.end(entry, Outcome.ERROR, f"{type(error).__name__}: {error}")
        else:
            self.ledger.end(entry, outcome)
        return entry

    async def _converse(self, job: Job, entry: Entry) -> Outcome:
        async def trace(event: str, _: Any) -> None:
            entry.is_sent = entry.is_sent or event == "http11.send_request_headers.complete"

        headers = {"content-type": job.content_type, "x-request-id": entry.request_id}
        start = time.monotonic()
        async with self._http.stream("POST", job.path, content=job.content, headers=headers, extensions={"trace": trace}) as response:
            entry.status = response.status_code
            self.ledger.statuses[response.status_code] += 1
            if response.headers.get("x-request-id") != entry.request_id:
                raise WrongAnswer(f"x-request-id is {response.headers.get('x-request-id')!r}")
            if response.status_code != 200:
                return self._refused(job, entry, await response.aread())
            answer = _Answer(job, entry)
            if not job.is_stream:
                answer.take(json.loads(await response.aread()))
            elif not await self._read_events(response, answer, start):
                return Outcome.CANCELLED
            answer.check()
            return Outcome.OK

    def _refused(self, job: Job, entry: Entry, content: bytes) -> Outcome:
        error, status = json.loads(content)["error"], entry.status
        if set(error) != {"message", "type", "param", "code"} or not isinstance(error["code"], str):
            raise WrongAnswer(f"an error of another shape: {error}")
        entry.is_planned = self._is_planned(entry, error["code"])
        if status != job.expected and status not in OVERLOADED and not entry.is_planned:
            raise WrongAnswer(f"status {status} instead of {job.expected}: {error['code']}: {error['message'][:200]}")
        entry.detail = error["code"]
        return Outcome.REFUSED

    async def _read_events(self, response: httpx.Response, answer: "_Answer", start: float) -> bool:
        """Whether the client stayed to the end."""
        job, num_events, last = answer.job, 0, 0.0
        async for line in response.aiter_lines():
            if not line:
                continue
            if not line.startswith("data: "):
                raise WrongAnswer(f"a line of the stream is no event: {line[:100]!r}")
            if line == "data: [DONE]":
                answer.is_done = True
                continue
            event = json.loads(line[6:])
            if "error" in event and self._is_planned(answer.entry, event["error"]["code"]):
                raise PlannedError
            answer.take(event)
            if not num_events and job.pause_seconds:
                await asyncio.sleep(job.pause_seconds)
            num_events, now = num_events + 1, time.monotonic()
            if last:
                self.ledger.gaps_seconds.append(now - last)
            else:
                answer.entry.ttft_seconds = now - start
            last = now
            if job.leave_events is not None and num_events >= job.leave_events:
                return False
        return True


class _Answer:
    """An answer while it comes, whole or in events, and what must hold when it is there."""

    def __init__(self, job: Job, entry: Entry) -> None:
        self.job, self.entry, self.is_done = job, entry, False
        self._texts, self._reasons = [""] * job.n, [""] * job.n
        self._num_logprobs = 0
        self._moa: dict[str, Any] | None = None
        self._fingerprint: str | None = None

    def take(self, body: dict[str, Any]) -> None:
        if "error" in body:
            raise WrongAnswer(f"an error in the stream: {body['error']}")
        if self.job.expected != 200:
            raise WrongAnswer(f"status 200 instead of {self.job.expected}")
        self._fingerprint = self._fingerprint or body["system_fingerprint"]
        if body["system_fingerprint"] != self._fingerprint:
            raise WrongAnswer(f"an answer of two revisions: {self._fingerprint} and {body['system_fingerprint']}")
        for choice in body["choices"]:
            index, part = choice["index"], choice.get("message") or choice.get("delta") or choice
            self._texts[index] += part.get("text") or part.get("content") or ""
            self._reasons[index] = choice["finish_reason"] or self._reasons[index]
            if choice.get("logprobs"):
                self._num_logprobs += len(choice["logprobs"].get("tokens") or choice["logprobs"].get("content") or ())
                if index == 0:
                    self.entry.logprobs += choice["logprobs"].get("token_logprobs") or ()
        if usage := body.get("usage"):
            self.entry.prompt_tokens, self.entry.generated_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            self.entry.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        self._moa = body.get("moa") or self._moa

    def check(self) -> None:
        """Raises WrongAnswer."""
        job, generated = self.job, self.entry.generated_tokens
        self.entry.text = self._texts[0]
        if job.is_stream and not self.is_done:
            raise WrongAnswer("the stream ended without [DONE]")
        if not set(self._reasons) <= {"stop", "length"}:
            raise WrongAnswer(f"finish reasons {self._reasons}")
        self.entry.finish_reason = "length" if "length" in self._reasons else "stop"
        if self.entry.prompt_tokens is None or not job.n <= generated <= job.n * job.max_tokens:
            raise WrongAnswer(f"{generated} tokens for n {job.n} and max_tokens {job.max_tokens}")
        if "stop" not in self._reasons and generated != job.n * job.max_tokens:
            raise WrongAnswer(f"{generated} tokens instead of {job.n} times {job.max_tokens}, but nothing stopped")
        if job.has_logprobs and self._num_logprobs != generated:
            raise WrongAnswer(f"{self._num_logprobs} log-probabilities for {generated} tokens")
        if any(stop in text for stop in job.stop for text in self._texts):
            raise WrongAnswer(f"a stop string of {job.stop} is in the text")
        if self._moa is None or self._moa["adapter"] != job.adapter:
            raise WrongAnswer(f"{job.model} was asked, but moa is {self._moa}")
        self.entry.revision = self._moa["revision"]


class Mix:
    """Random jobs; the same seed draws the same ones.

    Args:
        models: the base's name first, then adapters'; asked for with Zipf's weights, the first one most.
        max_words: of a prompt.
        has_chat: the base has a chat template.
    """

    def __init__(self, models: Sequence[str], seed: int, *, max_words: int = 120, has_chat: bool = True) -> None:
        self._models, self._max_words, self._has_chat = list(models), max_words, has_chat
        self._weights = list(accumulate(1 / rank for rank in range(1, len(models) + 1)))
        self._random = random.Random(seed)

    def draw(self) -> Job:
        chance = self._random.random()
        if chance < 0.05:
            model = self._random.choice(self._models)
            return self._random.choice(bad_jobs(model, self._adapter(model)))
        job = self._good(is_leaving=chance < 0.13)
        if chance < 0.11:
            return replace(job, leave_events=self._random.randint(1, 12))
        if chance < 0.13:
            return replace(job, leave_seconds=self._random.uniform(0, 0.5))
        return job

    def _good(self, *, is_leaving: bool) -> Job:
        pick = self._random
        model = pick.choices(self._models, cum_weights=self._weights)[0]
        prompt = " ".join(pick.choices(WORDS, k=pick.randint(1, self._max_words)))
        stream, max_tokens, n = is_leaving or pick.random() < 0.6, pick.randint(1, MAX_NEW_TOKENS), pick.choice((1, 1, 1, 2))
        body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "n": n, "temperature": pick.choice((0, 0.8))}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": is_leaving}}
        stop = tuple(pick.choices((" the", ".", "\n", "e", "zq"), k=2)) if pick.random() < 0.2 else ()
        if stop:
            body["stop"] = list(stop)
        if pick.random() < 0.3:
            body["seed"] = pick.randrange(2**32)
        has_logprobs = pick.random() < 0.15
        # What leaves before its first event is bounded by the length of its prompt, which a template would hide.
        path = CHAT if self._has_chat and not is_leaving and pick.random() < 0.3 else COMPLETIONS
        if path == CHAT:
            body["messages"] = [{"role": "user", "content": prompt}]
            body |= {"logprobs": True, "top_logprobs": 2} if has_logprobs else {}
        else:
            body["prompt"] = prompt
            body |= {"logprobs": 2} if has_logprobs else {}
        return Job(
            model,
            self._adapter(model),
            path,
            json.dumps(body).encode(),
            n=n,
            max_tokens=max_tokens,
            max_prompt_tokens=len(prompt.encode()) + 8,  # no token is shorter than a byte, but for those that begin and end a text
            stop=stop,
            is_stream=stream,
            has_logprobs=has_logprobs,
        )

    def _adapter(self, model: str) -> str | None:
        return None if model == self._models[0] else model


def bad_jobs(model: str, adapter: str | None) -> list[Job]:
    """One request for each of some mistakes, with the status that it must get."""
    good: dict[str, Any] = {"model": model, "prompt": "hello", "max_tokens": 4}
    changes: list[dict[str, Any]] = [
        {"surprise": 1}, {"max_tokens": "ten"}, {"temperature": 3}, {"n": 1000}, {"prompt": []}, {"prompt": [10**9]}, {"suffix": "x"},
    ]  # fmt: skip
    refused = [(400, b"{"), (400, b"[]"), *((400, json.dumps(good | change).encode()) for change in changes)]
    jobs = [Job(model, adapter, COMPLETIONS, content, expected=status) for status, content in refused]
    jobs.append(Job(model, adapter, COMPLETIONS, json.dumps(good | {"model": "nobody"}).encode(), expected=404))
    jobs.append(Job(model, adapter, COMPLETIONS, json.dumps(good).encode(), expected=415, content_type="text/plain"))
    return jobs


def canary(model: str, adapter: str | None) -> Job:
    """A job whose answer may never change: greedy, from a fixed prompt."""
    body = {"model": model, "prompt": CANARY, "max_tokens": 16, "temperature": 0}
    return Job(model, adapter, COMPLETIONS, json.dumps(body).encode(), max_tokens=16, max_prompt_tokens=len(CANARY) + 8)


def last_leaver(model: str) -> Job:
    """A job that leaves a server with nothing else to do, so that no later step can tidy up for it."""
    body = {
        "model": model, "prompt": CANARY, "max_tokens": MAX_NEW_TOKENS, "ignore_eos": True,
        "stream": True, "stream_options": {"continuous_usage_stats": True},
    }  # fmt: skip
    content = json.dumps(body).encode()
    return Job(
        model, None, COMPLETIONS, content, max_tokens=MAX_NEW_TOKENS, max_prompt_tokens=len(CANARY) + 8, is_stream=True, leave_events=2
    )
