"""The load of `moa-serve bench serve` on an engine in this process: what a server could do if HTTP, text and its own loop cost nothing.

Prompts become token ids before a wave; in it requests are added and steps are made until all have ended, in the caller's thread. Nothing
of it runs between two waves: no Python thread is started, and those of the backend sleep when a step is over. Sizes and limits are
those of `moa-serve serve` without options. Owns its engine until `close`.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.store import AdapterStore
from moa_serve.bench.serve import TRIAL_PROMPT, TRIAL_TOKENS, Answer, Computed, Served
from moa_serve.bench.step import num_threads
from moa_serve.engine.engine import Engine, EngineOptions
from moa_serve.engine.request import Request, SamplingParams
from moa_serve.engine.request import Sequence as EngineSequence
from moa_serve.errors import AdapterNotFound, InvalidRequest, MoaError
from moa_serve.llm import new_model, open_base
from moa_serve.model.backend import Backend
from moa_serve.text import Tokenizer


def computed_by(base_name: str, model: Backend) -> Computed:
    """What a report says of the engine in this process."""
    return Computed(base_name, model.name, str(model.device), model.base_dtype, num_threads(model))


@dataclass(frozen=True, slots=True)
class _Model:
    """What a stream asks for; the base where `revision` is None."""

    name: str
    revision: str | None = None
    is_pooled: bool = False


@dataclass(slots=True)
class _Running:
    """A request in the engine, and those that its stream sends behind it; times by `time.perf_counter`, in seconds."""

    behind: Iterator[Request]
    sent: float
    times: list[float] = field(default_factory=list)  # one a token: when the step was over that it came out of

    @property
    def answer(self) -> Answer:
        return Answer.of(len(self.times), self.sent, self.times)


class EngineLoad:
    """An engine as a contestant of bench/serve.py. Arguments are as those of `LLM`.

    Args:
        adapters_dir: as a server has it: folders are the names that streams may ask for.
    Raises:
        ModelError, InvalidRequest: the base cannot be served, or has no tokenizer.
    """

    name = "engine"

    def __init__(
        self,
        base: str | None = None,
        *,
        adapters_dir: Path | None = None,
        backend: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        base_dtype: str = "auto",
    ) -> None:
        loaded, resolved = open_base(base, backend=backend, device=device, dtype=dtype, base_dtype=base_dtype)
        tokenizer = Tokenizer.from_folder(loaded.folder) if loaded.folder else None
        if tokenizer is None:
            raise InvalidRequest(f"base {loaded.name!r} has no tokenizer, and prompts are text; take one with tokenizer.json", param="base")
        self._tokenizer, self._base_name = tokenizer, loaded.name
        self._store = AdapterStore(loaded.config, base_name=loaded.name, base_digest=loaded.digest, adapters_dir=adapters_dir)
        self._known = {loaded.name: _Model(loaded.name)}
        self._asked: list[_Model] = []
        self.engine = Engine(new_model(resolved, loaded, base_dtype), EngineOptions(), lease=self._lease, base_digest=loaded.digest)

    def close(self) -> None:
        self.engine.close()

    @property
    def served(self) -> Served:
        return Served(self.name, None, [model.name for model in self._asked], has_ignore_eos=True, computed=self.computed)

    @property
    def computed(self) -> Computed:
        return computed_by(self._base_name, self.engine.model)

    # -- models

    def prepare(self, models: Sequence[str]) -> None:
        """Load the adapters among `models` and ask each for a little; the base where there are none.

        Raises:
            AdapterNotFound: a name is neither the base's nor an adapter's. AdapterError: an adapter cannot be used.
        """
        self._asked = [self._model(name) for name in models or [self._base_name]]
        for model in self._asked:
            run_streams(self.engine, [iter([self._request(model, TRIAL_PROMPT, TRIAL_TOKENS)])], self._told)

    def _model(self, name: str) -> _Model:
        if name not in self._known:
            if name not in self._store.scan():
                raise AdapterNotFound(f"{self.name}: there is no model {name!r}: {self._holdings()}", param="model")
            adapter = self._store.read(name, AdapterSource(name))
            self._store.publish(name, AdapterSource(name), adapter)
            self._known[name] = _Model(name, adapter.revision, adapter.manifest.is_pooled)
        return self._known[name]

    def _holdings(self) -> str:
        base, folder = f"the base is {self._base_name!r}", self._store.adapters_dir
        if folder is None:
            return f"{base}, and there is no adapters directory; name the server's with --adapters-dir"
        return f"{base}, and {folder} holds {', '.join(self._store.scan()) or 'no adapter'}; correct --model, --base or --adapters-dir"

    def _lease(self, revision: str) -> AbstractContextManager[Adapter]:
        return self._store.lease(self._name_of(revision))

    def _name_of(self, revision: str | None) -> str:
        return next(model.name for model in self._known.values() if model.revision == revision)

    # -- waves

    def run(self, streams: Sequence[Sequence[str]], max_tokens: int) -> tuple[float, list[Answer]]:
        requests = [
            [self._request(self._asked[stream % len(self._asked)], prompt, max_tokens) for prompt in prompts]
            for stream, prompts in enumerate(streams)
        ]
        gc.collect()  # what the client of a server left; from here on the collector runs as it does in a server's process
        return run_streams(self.engine, [iter(behind) for behind in requests], self._told)

    def _request(self, model: _Model, prompt: str, max_tokens: int) -> Request:
        """As a server makes it of the body that `Client.content` sends."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        ids = self._tokenizer.encode(prompt, parse_special=False)
        return Request(tuple(ids), params, model.revision, is_pooled=model.is_pooled)

    def _told(self, request: Request, error: MoaError) -> MoaError:
        model = self._name_of(request.adapter)
        return type(error)(f"{self.name}: model {model!r}: {error}", param=error.param)


def run_streams(
    engine: Engine, streams: Sequence[Iterator[Request]], told: Callable[[Request, MoaError], MoaError] = lambda _, error: error
) -> tuple[float, list[Answer]]:
    """Seconds of one wave and its answers: all streams at the same time, the requests of each one after another.

    Args:
        engine: without work; it has none afterwards, whatever happens.
        told: the error to raise where a request ended with one.
    """
    running: dict[EngineSequence, _Running] = {}
    ended: list[_Running] = []

    def send_next(requests: Iterator[Request]) -> None:
        if (request := next(requests, None)) is not None:
            sent = time.perf_counter()
            running[engine.add(request)] = _Running(requests, sent)

    start = time.perf_counter()
    try:
        for requests in streams:
            send_next(requests)
        while running:
            events = engine.step()
            now = time.perf_counter()
            for event in events:
                one = running[event.sequence]
                if event.error is not None:
                    raise told(event.sequence.request, event.error)
                one.times.append(now)
                if event.finish_reason is not None:
                    ended.append(running.pop(event.sequence))
                    send_next(one.behind)
        seconds = time.perf_counter() - start
    finally:
        for sequence in running:
            engine.end(sequence, "abort")
    return seconds, [one.answer for one in ended]
