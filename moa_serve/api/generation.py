"""Generation: one HTTP request for tokens, from its body to the last byte of its answer.

What every route that generates has in common: admission, the adapter's lease, tokenising off the loop, one engine stream for each row, and
the answer as one body or as server-sent events. How an answer looks is its dialect's matter; what happens around all of it is in work.py.
All that a request holds is given back in `_serve`, whatever the exit. Belongs to the event loop.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.types import Send

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.manifest import RequestDefaults
from moa_serve.adapter.rules import RoutingOptions, RoutingRules, echo, rules_for, yields
from moa_serve.api.auto import AUTO, AutoPicker, Picked
from moa_serve.api.choice import Choice, Delta, Prompt
from moa_serve.api.context import Server
from moa_serve.api.errors import dump_json
from moa_serve.api.routing import MAX_BYTES, RoutingText
from moa_serve.api.schemas import GenerationRequest, named
from moa_serve.api.tools import ToolReader
from moa_serve.api.work import JSON_HEADERS, Progress, Work
from moa_serve.engine.async_engine import PAUSE_AT, Stream
from moa_serve.engine.engine import TokenEvent
from moa_serve.engine.request import Request, SamplingParams
from moa_serve.errors import InvalidRequest, RevisionNotFound
from moa_serve.metrics.record import RequestRecord, timings

MAX_GAPS = 64  # between tokens, that are handed to the metrics at once
MAX_SCORED_CONTEXTS = 4  # prompt tokens that one request may have scored, in contexts

THRESHOLD_SCALE = b"x-moa-threshold-scale"
"""Header of an answer whose experts had to reach more than the adapter asks for."""

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]


class Dialect(Protocol):
    """How one route reads its body and shapes its answer. `chunk` objects of a stream are like whole ones, but partial.

    `encode`, `asked` and `params` run in a worker thread; `asked` is the tokens of what the client wrote, whatever the adapter. `whole` and
    `chunks` get a choice and what of it the client has not got yet; `more` stands beside the choices of a whole answer.
    """

    endpoint: str
    schema: Any  # the GenerationRequest that the methods below get
    id_prefix: str
    kind: str
    chunk_kind: str

    def num_prompts(self, body: Any) -> int: ...
    def encode(self, server: Server, body: Any, adapter: Adapter | None) -> list[Prompt]: ...
    def asked(self, server: Server, body: Any) -> list[Sequence[int]]: ...
    def params(self, server: Server, body: Any, prompt: Prompt, adapter: Adapter | None) -> SamplingParams: ...
    def guide_param(self, body: Any) -> str: ...
    def reader(self, server: Server, body: Any, adapter: Adapter | None) -> ToolReader | None: ...
    def prompt_logprobs(self, body: Any) -> int | None: ...
    def echoes(self, body: Any) -> bool: ...
    def whole(self, choice: Choice, delta: Delta) -> dict[str, Any]: ...
    def chunks(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]: ...
    def more(self, choices: list[Choice]) -> dict[str, Any]: ...


@dataclass(slots=True)
class _Progress(Progress):
    body: GenerationRequest | None = None  # with the model that was picked
    picked: Picked | None = None  # where the model was `auto`
    adapter_name: str | None = None
    adapter: Adapter | None = None
    asked: RoutingOptions | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of routing, as they were resolved
    rules: RoutingRules | None = None
    threshold_scale: float | None = None  # that the server put on the adapter's own thresholds
    defaults: dict[str, Any] = field(default_factory=dict)  # fields that the adapter gave, and not the client
    prompts: list[Prompt] = field(default_factory=list)
    max_tokens: int | None = None
    routing: RoutingText | None = None  # where it was asked for
    choices: list[Choice] = field(default_factory=list)

    @property
    def finish_reason(self) -> str:
        """Of the whole request: the worst of its choices."""
        if self.is_cancelled:
            return "abort"
        reasons = {choice.finish_reason for choice in self.choices}
        if self.error is not None or not reasons or not reasons <= {"stop", "length"}:
            return "error"
        return "length" if "length" in reasons else "stop"

    @property
    def completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts' tokens, those that none of the prompt's rows had to compute."""
        fewest: dict[int, int] = {}
        for choice in self.choices:
            sequence = choice.stream.sequence
            num_cached = sequence.num_cached if sequence is not None else 0
            prompt = id(choice.prompt)
            fewest[prompt] = min(num_cached, fewest.get(prompt, num_cached))
        return sum(fewest.values())


class Generation(Work):
    """The response of a route that generates."""

    _progress: _Progress

    def __init__(self, server: Server, request: HttpRequest, dialect: Dialect) -> None:
        super().__init__(server, request, dialect.schema, dialect.id_prefix, _Progress(time.monotonic()))
        self._dialect, self._created = dialect, int(time.time())
        self._gaps: list[float] = []
        self._num_charged = 0  # completion tokens

    # -- in

    async def _serve(self, body: GenerationRequest, send: Send) -> None:
        progress = self._progress
        progress.body = body
        body.check_limits(self._server.settings)
        async with AsyncExitStack() as stack:
            prepared = await self._in_time(self._prepare(body, stack))
            progress.prompts = [prompt for prompt, _ in prepared]
            self._charge(progress.prompt_tokens)
            self._check_scored(prepared)
            self._check_routing(prepared, body)
            progress.max_tokens = prepared[0][1][0].params.max_tokens
            for prompt, rows in prepared:
                for request in rows:
                    await self._open(request, prompt, stack, body)
            stack.enter_context(self._time_limits())
            if body.stream:
                await self._answer_events(body, send)
            else:
                await self._answer_whole(send)

    async def _prepare(self, body: GenerationRequest, stack: AsyncExitStack) -> list[tuple[Prompt, list[Request]]]:
        """Prompts and their rows, in a worker thread, for a prompt may be long; the adapter's lease is left on `stack`."""
        server, progress = self._server, self._progress
        num_rows = self._dialect.num_prompts(body) * body.n
        stack.enter_context(server.claim(self._key_id, num_rows))
        with server.admit(num_rows):
            level = server.sparsity.admit(server.num_waiting())
            if (picker := server.picker(body.model)) is not None:
                progress.body = body = await self._pick(picker, body)
            if body.model != server.base_name:
                lease = await server.registry.lease(body.model, revision=body.moa.revision, key=body.user or self._key_id)
                stack.callback(lease.release)
                progress.adapter_name, progress.adapter = lease.name, lease.adapter
                if progress.picked is not None:
                    server.metrics.observe_pick(lease.name)
                if lease.adapter.manifest.defaults is not None:
                    progress.defaults = self._defaults(body, lease.adapter.manifest.defaults)
                    progress.body = body = body.model_copy(update=progress.defaults)
            elif body.moa.revision is not None and not server.base_digest.startswith(body.moa.revision):
                raise RevisionNotFound(
                    f"revision {body.moa.revision[:12]} is not the base's, {server.base_digest[:12]}", param="moa.revision"
                )
            self._check_routed(body)
            return await asyncio.to_thread(self._encode, body, level)

    async def _pick(self, picker: AutoPicker, body: GenerationRequest) -> GenerationRequest:
        """The request with an adapter in place of `auto`."""
        candidates = picker.candidates(body.moa.revision)

        def pick() -> Picked:
            return picker.pick(self._dialect.asked(self._server, body), candidates)

        self._progress.picked = picked = await asyncio.to_thread(pick)
        return body.model_copy(update={"model": picked.name})

    def _check_routed(self, body: GenerationRequest) -> None:
        """Raises InvalidRequest: routing is asked of what has no router."""
        adapter = self._progress.adapter
        if body.moa.return_routing and (adapter is None or adapter.manifest.router.site == "none"):
            which = "is the base alone" if adapter is None else f"is a {adapter.manifest.variant}, all of whose experts always count"
            raise InvalidRequest(
                f"moa.return_routing needs an adapter with a router, but {body.model!a} {which}; leave it out or choose another model",
                param="moa.return_routing",
            )

    def _resolve_routing(self, body: GenerationRequest, level: int) -> None:
        """
        Args:
            level: of `SparsityPressure`, when the request was admitted.
        Raises:
            InvalidRequest: an option is not for this adapter.
        """
        adapter, name = self._progress.adapter, self._progress.adapter_name
        manifest = None if adapter is None else adapter.manifest
        self._progress.asked = options = body.moa.options()
        scale = self._server.sparsity.scale(name, level) if name is not None and yields(options, manifest) else 1.0
        self._progress.rules = rules_for(options, manifest, pressure=scale)
        self._progress.threshold_scale = scale if scale > 1 else None
        if options is not None and manifest is not None:
            self._progress.options = echo(options, manifest)

    def _defaults(self, body: GenerationRequest, defaults: RequestDefaults) -> dict[str, Any]:
        """What the request gets of its adapter's defaults."""
        found = body.left_out(defaults.model_dump(exclude_none=True, exclude={"chat_template"}))
        if self._server.tokenizer is None:
            found.pop("stop", None)  # without text there is nothing to stop at, and the client did not ask for it
        return found

    def _encode(self, body: GenerationRequest, level: int) -> list[tuple[Prompt, list[Request]]]:
        self._resolve_routing(body, level)
        if self._progress.adapter is not None:  # before it waits for a slot: no step of others is to wait for its layout
            self._server.engine.warm(self._progress.adapter)
            if body.moa.return_routing:
                self._progress.routing = RoutingText(self._progress.adapter.manifest, self._progress.rules)
        return [(prompt, self._requests(body, prompt)) for prompt in self._dialect.encode(self._server, body, self._progress.adapter)]

    def _requests(self, body: GenerationRequest, prompt: Prompt) -> list[Request]:
        """The n rows of one prompt; equal seeds would make them equal, so each has its own."""
        params = self._dialect.params(self._server, body, prompt, self._progress.adapter)
        if "max_tokens" in self._progress.defaults and params.max_tokens is not None:  # a default yields to the context
            room = max(1, self._server.max_model_len - len(prompt.ids))
            params = replace(params, max_tokens=min(params.max_tokens, room))
        if params.stop and self._server.tokenizer is None:
            raise InvalidRequest("stop: the base has no tokenizer, so there is no text to stop at; use stop_token_ids", param="stop")
        adapter, grammar = self._progress.adapter, None
        if params.guide is not None:
            with named(self._dialect.guide_param(body)):
                if self._server.grammars is None:
                    raise InvalidRequest("the base has no tokenizer, so there is no text whose form could be had")
                grammar = self._server.grammars.compile(params.guide)
        key_id = self._key_id
        rows = []
        for index in range(body.n):
            seeded = params if params.seed is None or index == 0 else replace(params, seed=_row_seed(params.seed, index))
            rows.append(
                Request(
                    tuple(prompt.ids),
                    seeded,
                    adapter.revision if adapter else None,
                    is_pooled=adapter is not None and adapter.manifest.is_pooled,
                    rules=self._progress.rules,
                    grammar=grammar,
                    prompt_logprobs=self._dialect.prompt_logprobs(body),
                    return_routing=body.moa.return_routing,
                    tenant=key_id,
                    # Two words, so that no salt that somebody chooses is another one's key.
                    salt=f"key {key_id}" if body.cache_salt is None else f"salt {body.cache_salt}",
                    arrival=self._progress.arrived,
                )
            )
        return rows

    def _check_scored(self, prepared: list[tuple[Prompt, list[Request]]]) -> None:
        """Raises InvalidRequest: more prompt tokens are to be scored than one request is worth; each costs the whole vocabulary."""
        scored = sum(len(row.prompt_ids) for _, rows in prepared for row in rows if row.prompt_logprobs is not None)
        limit = MAX_SCORED_CONTEXTS * self._server.max_model_len
        body = self._progress.body
        param = "echo" if body is not None and self._dialect.echoes(body) else "prompt_logprobs"
        if scored > limit:
            raise InvalidRequest(
                f"{param} would score {scored} prompt tokens, but at most {limit} in one request; send fewer prompts or a lower n",
                param=param,
            )

    def _check_routing(self, prepared: list[tuple[Prompt, list[Request]]], body: GenerationRequest) -> None:
        """Raises InvalidRequest: more routing might have to be held than one request is worth. A stream holds what its reader is behind."""
        if self._progress.routing is None:
            return
        held = 0
        for prompt, rows in prepared:
            for row in rows:
                room = self._server.max_model_len - len(prompt.ids)
                most = room if row.params.max_tokens is None else row.params.max_tokens
                held += min(most, PAUSE_AT) if body.stream and row.prompt_logprobs is None else most
        if (num_bytes := held * self._progress.routing.bytes_per_token) > MAX_BYTES:
            raise InvalidRequest(
                f"moa.return_routing would make up to {num_bytes} bytes for {held} tokens, but at most {MAX_BYTES} are held for a request; "
                f"lower max_tokens or n, or stream",
                param="moa.return_routing",
            )

    async def _open(self, request: Request, prompt: Prompt, stack: AsyncExitStack, body: GenerationRequest) -> None:
        stream = await stack.enter_async_context(self._server.engine.open(request, self._progress.adapter))
        index = len(self._progress.choices)
        echo, reader = self._dialect.echoes(body), self._dialect.reader(self._server, body, self._progress.adapter)
        tokenizer, scores = self._server.tokenizer, body.prompt_logprobs
        routing = self._progress.routing
        choice = Choice(index, prompt, stream, tokenizer, echo=echo, num_prompt_logprobs=scores, reader=reader, routing=routing)
        self._progress.choices.append(choice)

    # -- out

    async def _news(self) -> AsyncGenerator[list[Choice], None]:
        """Choices as they get tokens, until all are finished; those of one step come together.

        Raises:
            MoaError: a row ended with an error.
        """
        async with aclosing(_merged(self._progress.choices)) as bundles:
            last = [0.0] * len(self._progress.choices)
            async for bundle in bundles:
                now = time.monotonic()
                for choice, events in bundle:
                    self._measure(last, choice, len(events), now)
                    choice.take(events)
                    if choice.error is not None:
                        raise choice.error
                    if choice.is_finished:
                        choice.stream.close()
                yield [choice for choice, _ in bundle]

    def _measure(self, last: list[float], choice: Choice, num_tokens: int, now: float) -> None:
        """Time between tokens; what came together shares it."""
        if last[choice.index]:
            self._gaps += [(now - last[choice.index]) / num_tokens] * num_tokens
            if len(self._gaps) >= MAX_GAPS:
                self._hand_gaps()
        last[choice.index] = now

    def _hand_gaps(self) -> None:
        if self._gaps:
            self._server.metrics.observe_tokens(self._progress.adapter_name, self._gaps)
            self._gaps = []

    async def _answer_whole(self, send: Send) -> None:
        async with aclosing(self._news()) as news:
            async for _ in news:
                pass
        rest = {**self._head(self._dialect.kind), "usage": self._usage(), "moa": self._moa(), **self._dialect.more(self._progress.choices)}
        # Routing, and log-probabilities of a long echo, are megabytes of JSON: made off the loop, and choice by choice, since each holds
        # the GIL.
        choices = [await asyncio.to_thread(self._dump_whole, choice) for choice in self._progress.choices]
        payload = dump_json(rest)[:-1] + b',"choices":[' + b",".join(choices) + b"]}"
        await self._start(send, [*JSON_HEADERS, (b"content-length", str(len(payload)).encode())])
        self._progress.is_answered = True
        self._charge_completion()
        await send({"type": "http.response.body", "body": payload})

    def _dump_whole(self, choice: Choice) -> bytes:
        delta = choice.drain()
        return _with_routing([dump_json(self._dialect.whole(choice, delta))], choice, delta)[0]

    async def _answer_events(self, body: GenerationRequest, send: Send) -> None:
        """The status is sent with the first event, so that what fails before it is a status and not an event."""
        options = body.stream_options
        has_usage = options is not None and options.include_usage
        is_continuous = options is not None and options.continuous_usage_stats
        head = self._head(self._dialect.chunk_kind)
        async with aclosing(self._news()) as news:
            async for choices in news:
                is_last = all(choice.is_finished for choice in self._progress.choices)
                chunks = []
                for choice in choices:
                    # What waited for its end comes at once, and may be megabytes.
                    chunks += await asyncio.to_thread(self._chunks, choice) if choice.waits_for_end else self._chunks(choice)
                events = []
                for position, chunk in enumerate(chunks, start=1):
                    event = dict(head)
                    if has_usage or is_continuous:
                        event["usage"] = self._usage() if is_continuous else None
                    if is_last and position == len(chunks) and not has_usage:
                        event["moa"] = self._moa()
                    events.append(dump_json(event)[:-1] + b',"choices":[' + chunk + b"]}")
                if is_last and has_usage:
                    events.append(dump_json({**head, "choices": [], "usage": self._usage(), "moa": self._moa()}))
                if events:
                    await self._send_events(send, events, is_last)

    def _chunks(self, choice: Choice) -> list[bytes]:
        if choice.waits_for_end and not choice.is_finished:
            return []
        delta = choice.drain()
        return _with_routing([dump_json(chunk) for chunk in self._dialect.chunks(choice, delta)], choice, delta)

    async def _send_events(self, send: Send, events: list[bytes], is_last: bool) -> None:
        payload = b"".join(b"data: " + event + b"\n\n" for event in events)
        if is_last:
            payload += b"data: [DONE]\n\n"
        if not self._progress.is_started:
            await self._start(send, _EVENT_STREAM)
        self._progress.is_answered = is_last
        if is_last:
            self._charge_completion()
        await send({"type": "http.response.body", "body": payload, "more_body": not is_last})

    async def _start(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        if (scale := self._progress.threshold_scale) is not None:
            headers = [*headers, (THRESHOLD_SCALE, f"{scale:.10g}".encode())]
        await super()._start(send, headers)

    # -- what is said of it

    @property
    def _streams(self) -> list[Stream]:
        return [choice.stream for choice in self._progress.choices]

    @property
    def _revision(self) -> str:
        adapter = self._progress.adapter
        return adapter.revision if adapter else self._server.base_digest

    def _head(self, kind: str) -> dict[str, Any]:
        assert self._progress.body is not None
        fingerprint = f"moa-{self._revision[:12]}"
        model = self._progress.body.model
        return {"id": self._id, "object": kind, "created": self._created, "model": model, "system_fingerprint": fingerprint}

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self._progress.prompt_tokens, self._progress.completion_tokens
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._progress.cached_tokens},
        }
        if (routing := self._progress.routing) is not None:
            done = sum(choice.num_evaluations for choice in self._progress.choices)
            met = sum(choice.num_traced for choice in self._progress.choices) * routing.num_experts
            usage["moa"] = {"evaluations_done": done, "evaluations_skipped": met - done}
        return usage

    def _moa(self) -> dict[str, Any]:
        adapter = self._progress.adapter
        return {
            "revision": self._revision,
            "adapter": self._progress.adapter_name,
            "variant": adapter.manifest.variant if adapter else None,
            "timings": timings(self._record()),
            **({"auto": self._progress.picked.told()} if self._progress.picked is not None else {}),
            **({"options": self._progress.options} if self._progress.options else {}),
            **({"threshold_scale": self._progress.threshold_scale} if self._progress.threshold_scale is not None else {}),
            **({"defaults": self._progress.defaults} if self._progress.defaults else {}),
        }

    def _record(self) -> RequestRecord:
        progress = self._progress
        scheduled, first_token = self._started
        return RequestRecord(
            model="" if progress.body is None else AUTO if progress.picked is not None else progress.body.model,
            adapter=progress.adapter_name,
            revision=progress.adapter.revision if progress.adapter else None,
            request_id=self._request_id,
            endpoint=self._dialect.endpoint,
            prompt_tokens=progress.prompt_tokens,
            completion_tokens=progress.completion_tokens,
            cached_tokens=progress.cached_tokens,
            longest_completion=max((choice.num_tokens for choice in progress.choices), default=0),
            finish_reason=progress.finish_reason,
            arrived=progress.arrived,
            scheduled=scheduled,
            first_token=first_token,
            finished=time.monotonic(),
            n=progress.body.n if progress.body else 1,
            max_tokens=progress.max_tokens,
            threshold_scale=progress.threshold_scale,
            status=self._status,
        )

    def _charge_completion(self) -> None:
        """Before the last byte is sent: who has it may ask for more at once. What is generated after a client left comes on top."""
        self._charge(self._progress.completion_tokens - self._num_charged)
        self._num_charged = self._progress.completion_tokens

    def _observe(self) -> None:
        self._hand_gaps()
        self._charge_completion()
        super()._observe()
        self._offer_to_shadow()

    def _offer_to_shadow(self) -> None:
        """Where answers are sampled for the shadow check: those of a request that ended well."""
        progress, shadow = self._progress, self._server.shadow
        if shadow is None or progress.body is None or progress.adapter is None or progress.finish_reason not in ("stop", "length"):
            return
        assert progress.adapter_name is not None
        answers = []
        for choice in progress.choices:
            prompt_ids, sequence = choice.prompt.ids, choice.stream.sequence
            if sequence is not None and choice.num_tokens:
                answers.append((prompt_ids, sequence.token_ids[len(prompt_ids) : len(prompt_ids) + choice.num_tokens]))
        shadow.offer(progress.adapter_name, progress.adapter, progress.rules, progress.asked, answers)


def _with_routing(pieces: list[bytes], choice: Choice, delta: Delta) -> list[bytes]:
    """Pieces of a choice as JSON, with `moa.routing` where it was asked for: the tokens in the last one, the names in the very first."""
    if choice.routing is None:
        return pieces
    told = []
    for place, piece in enumerate(pieces):
        tokens = delta.routed if place == len(pieces) - 1 else []
        routing = choice.routing.write(tokens, choice.tokenizer, has_names=delta.is_first and place == 0)
        told.append(piece[:-1] + b',"moa":' + routing + b"}")
    return told


_Bundle = list[tuple[Choice, list[TokenEvent]]]


async def _merged(choices: list[Choice]) -> AsyncGenerator[_Bundle, None]:
    """The events of all streams until each is finished; those that are there at the same time come together."""
    if len(choices) == 1:
        choice = choices[0]
        async for events in choice.stream:
            yield [(choice, events)]
            if choice.is_finished:
                return
        return
    waiting = {asyncio.ensure_future(choice.stream.__anext__()): choice for choice in choices}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            bundle = sorted(((waiting.pop(task), task.result()) for task in done), key=lambda pair: pair[0].index)
            yield bundle
            waiting |= {asyncio.ensure_future(choice.stream.__anext__()): choice for choice, _ in bundle if not choice.is_finished}
    finally:
        for task in waiting:
            task.cancel()


def _row_seed(seed: int, index: int) -> int:
    """A hash, so that the second answer to seed 1 is not the first one to seed 2."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "big")
