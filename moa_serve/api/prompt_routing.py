"""/v1/moa/route: what routers say of a prompt, without generating; of one adapter or of several, whose rows share one batch.

What a prompt's routing costs beside the forward is memory: numbers for every token, expert and layer. Both that and the text of
`detail: "tokens"` are bounded before a row is opened, and made into JSON in worker threads, model by model. Belongs to the event loop.
"""

import asyncio
import math
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from starlette.requests import Request as HttpRequest
from starlette.types import Send
from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.rules import echo, rules_for
from moa_serve.api.auto import AutoPicker, Picked
from moa_serve.api.chat import encode_chat, encode_contents
from moa_serve.api.completions import encode_prompt
from moa_serve.api.context import Server
from moa_serve.api.errors import dump_json
from moa_serve.api.routing import MAX_BYTES, RoutingText
from moa_serve.api.schemas import PromptRoutingRequest
from moa_serve.api.work import JSON_HEADERS, Progress, Work
from moa_serve.chat_template import ChatTemplate
from moa_serve.engine.async_engine import Stream
from moa_serve.engine.engine import TokenEvent
from moa_serve.engine.request import Request
from moa_serve.engine.routing import Routing, expert_names
from moa_serve.engine.self_test import read_scores, score_request
from moa_serve.errors import InvalidRequest
from moa_serve.metrics.record import RequestRecord

ENDPOINT = "/v1/moa/route"
MAX_HELD_BYTES = 2**26  # of the routers' numbers, for all models of a request
_BYTES_PER_EXPERT = 9  # of a token: its score and its weight in float32, and whether it was kept


@dataclass(slots=True)
class _Row:
    """The prompt under one adapter. `model` is the name that the client gave, `name` the adapter's own."""

    model: str
    name: str
    adapter: Adapter
    options: dict[str, Any]
    request: Request | None = None  # None until its prompt is tokenised, as is `text`
    text: RoutingText | None = None
    stream: Stream | None = None
    last: TokenEvent | None = None

    @property
    def num_tokens(self) -> int:
        return 0 if self.request is None else len(self.request.prompt_ids)


@dataclass(slots=True)
class _Progress(Progress):
    body: PromptRoutingRequest | None = None
    picked: Picked | None = None  # where the model was `auto`
    rows: list[_Row] = field(default_factory=list)
    is_done: bool = False


class PromptRouting(Work):
    """The response of /v1/moa/route."""

    _progress: _Progress

    def __init__(self, server: Server, request: HttpRequest) -> None:
        super().__init__(server, request, PromptRoutingRequest, "route-", _Progress(time.monotonic()))

    # -- in

    async def _serve(self, body: PromptRoutingRequest, send: Send) -> None:
        progress = self._progress
        progress.body = body
        if body.models is not None:
            self._model_param = "models"
        async with AsyncExitStack() as stack:
            requests = await self._in_time(self._prepare(body, stack))
            self._charge(self._num_tokens)
            self._check_size(body)
            for row, request in zip(progress.rows, requests, strict=True):
                row.stream = await stack.enter_async_context(self._server.engine.open(request, row.adapter))
            with self._time_limits():
                for row in progress.rows:
                    await self._wait_for(row)
            progress.is_done = True
            await self._answer(body, send)

    async def _prepare(self, body: PromptRoutingRequest, stack: AsyncExitStack) -> list[Request]:
        """The leases, which are left on `stack`, and a row for each model, tokenised in a worker thread."""
        server = self._server
        stack.enter_context(server.claim(self._key_id, len(body.names)))
        with server.admit(len(body.names), what="models", param="models"):
            names = body.names
            if (picker := server.picker(body.model)) is not None:
                names = [await self._pick(picker, body)]
            for name in names:
                self._progress.rows.append(await self._lease(name, body, stack))
            return await asyncio.to_thread(self._encode, body)

    async def _pick(self, picker: AutoPicker, body: PromptRoutingRequest) -> str:
        candidates = picker.candidates(body.moa.revision)

        def pick() -> Picked:
            ids = self._ids(body, None) if body.messages is None else encode_contents(self._server, body.messages)
            return picker.pick([ids], candidates)

        self._progress.picked = picked = await asyncio.to_thread(pick)
        return picked.name

    async def _lease(self, name: str, body: PromptRoutingRequest, stack: AsyncExitStack) -> _Row:
        if name == self._server.base_name:
            raise InvalidRequest(f"{name!a} is the base alone, which has no router; name an adapter that has one", param="model")
        lease = await self._server.registry.lease(name, revision=body.moa.revision, key=body.user or self._key_id)
        stack.callback(lease.release)
        if self._progress.picked is not None:
            self._server.metrics.observe_pick(lease.name)
        manifest = lease.adapter.manifest
        if manifest.router.site == "none":
            raise InvalidRequest(
                f"{name!a} is a {manifest.variant} without a router: all of its experts always count; name an adapter that has one",
                param="model",
            )
        options = body.moa.options()
        return _Row(name, lease.name, lease.adapter, {} if options is None else echo(options, manifest))

    def _encode(self, body: PromptRoutingRequest) -> list[Request]:
        options = body.moa.options()
        usual: list[int] | None = None  # by the base's template, which most adapters have: made once
        found = []
        for row in self._progress.rows:
            self._server.engine.warm(row.adapter)  # before it waits for a slot: no step of others is to wait for its layout
            template = self._server.chat_template if body.messages is None else self._server.template_of(row.adapter)
            if template is not self._server.chat_template:
                ids = self._ids(body, template)
            else:
                ids = usual = usual or self._ids(body, template)
            try:
                rules = rules_for(options, row.adapter.manifest)
            except InvalidRequest as error:
                if body.models is not None:
                    raise type(error)(f"{row.model!a}: {error}", param=error.param) from None
                raise
            request = score_request(ids, row.adapter.revision, row.adapter.manifest, rules=rules, logits=False)
            row.request = replace(request, return_routing=True, tenant=self._key_id, arrival=self._progress.arrived)
            row.text = RoutingText(row.adapter.manifest, rules)
            found.append(row.request)
        return found

    def _ids(self, body: PromptRoutingRequest, template: ChatTemplate | None) -> list[int]:
        if body.messages is not None:
            return encode_chat(self._server, template, body.messages)
        assert body.prompt is not None, "the schema takes one of the two"
        return list(encode_prompt(self._server, body.prompt, body.moa.parse_special, echo=False).ids)

    def _check_size(self, body: PromptRoutingRequest) -> None:
        """Raises InvalidRequest: more would have to be held than one request is worth."""
        less = "send a shorter prompt" + (" or fewer models" if len(body.names) > 1 else "")
        texts = [(row.num_tokens, row.text) for row in self._progress.rows if row.text is not None]
        held = sum(num_tokens * text.num_experts * _BYTES_PER_EXPERT for num_tokens, text in texts)
        if held > MAX_HELD_BYTES:
            raise InvalidRequest(
                f"the routing of {self._num_tokens} tokens, of all models together, has {held} bytes, but at most {MAX_HELD_BYTES} are "
                f"held for a request; {less}",
                param="messages" if body.prompt is None else "prompt",
            )
        shown = sum(num_tokens * text.bytes_per_token for num_tokens, text in texts)
        if body.detail == "tokens" and shown > MAX_BYTES:
            raise InvalidRequest(
                f"detail 'tokens' would make about {shown} bytes for {self._num_tokens} tokens, of all models together, but at most "
                f"{MAX_BYTES} are made for a request; {less}, or ask for detail 'summary'",
                param="detail",
            )

    async def _wait_for(self, row: _Row) -> None:
        assert row.stream is not None
        async for events in row.stream:
            row.last = events[-1]
            if row.last.error is not None:
                raise row.last.error

    # -- out

    async def _answer(self, body: PromptRoutingRequest, send: Send) -> None:
        pieces = [await asyncio.to_thread(self._dump, row, body.detail == "tokens") for row in self._progress.rows]
        num_tokens = self._num_tokens
        usage = {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens}
        head = {"id": self._id, "object": "moa.route", "usage": usage | {"prompt_tokens_details": {"cached_tokens": 0}}}
        payload = dump_json(head)[:-1] + b',"data":[' + b",".join(pieces) + b"]}"
        await self._start(send, [*JSON_HEADERS, (b"content-length", str(len(payload)).encode())])
        self._progress.is_answered = True
        await send({"type": "http.response.body", "body": payload})

    def _dump(self, row: _Row, has_tokens: bool) -> bytes:
        """In a worker thread; of the routers' numbers nothing is left then."""
        assert row.stream is not None
        assert row.stream.collected is not None, "a row that ended well has what it collected"
        assert row.request is not None
        assert row.text is not None
        assert row.last is not None
        assert row.last.routing is not None, "the request asks for it"
        manifest, ids = row.adapter.manifest, row.request.prompt_ids
        _, routing = read_scores(row.stream.collected, manifest, len(ids), row.request.rules)
        row.stream.collected = None
        assert routing is not None, "the adapter has a router"
        text = row.text
        done, met = row.last.routing.num_evaluations, row.last.routing.num_tokens * text.num_experts
        shown = {
            "model": row.model,
            "adapter": row.name,
            "revision": row.adapter.revision,
            "variant": manifest.variant,
            **({"auto": self._progress.picked.told()} if self._progress.picked is not None else {}),
            **({"options": row.options} if row.options else {}),
            "prompt_tokens": len(ids),
            **summary(manifest, routing),
            "evaluations_done": done,
            "evaluations_skipped": met - done,
        }
        if not has_tokens:
            return dump_json(shown)
        words = words_of(manifest, routing).numpy()
        tokens = ((token_id, text.pack(row_words)) for token_id, row_words in zip(ids, words, strict=True))
        return dump_json(shown)[:-1] + b',"tokens":' + text.write_tokens(tokens, self._server.tokenizer) + b"}"

    # -- what is said of it

    @property
    def _num_tokens(self) -> int:
        return sum(row.num_tokens for row in self._progress.rows)

    @property
    def _streams(self) -> list[Stream]:
        return [row.stream for row in self._progress.rows if row.stream is not None]

    def _record(self) -> RequestRecord:
        progress, (scheduled, first_token) = self._progress, self._started
        one = progress.rows[0] if len(progress.rows) == 1 else None
        return RequestRecord(
            model="" if progress.body is None else ", ".join(progress.body.names),
            adapter=None if one is None else one.name,
            revision=None if one is None else one.adapter.revision,
            request_id=self._request_id,
            endpoint=ENDPOINT,
            prompt_tokens=self._num_tokens,
            completion_tokens=0,
            cached_tokens=0,
            longest_completion=0,
            finish_reason="abort" if progress.is_cancelled else "length" if progress.is_done and progress.error is None else "error",
            arrived=progress.arrived,
            scheduled=scheduled,
            first_token=first_token,
            finished=time.monotonic(),
            n=1,
            max_tokens=0,
            status=self._status,
        )

    def _count(self, record: RequestRecord) -> None:
        """A request for several adapters is one of each: so many tokens of a prompt went through each."""
        rows = self._progress.rows
        if len(rows) < 2:
            super()._count(record)
        for row in rows if len(rows) > 1 else []:
            super()._count(replace(record, model=row.model, adapter=row.name, revision=row.adapter.revision, prompt_tokens=row.num_tokens))


def summary(manifest: Manifest, routing: Routing) -> dict[str, Any]:
    """Means over the tokens, layer by layer."""
    weights, selected = routing.weights.mean(1), routing.selected.float().mean(1)  # (L, E)
    names = expert_names(manifest)
    thresholds = None if routing.threshold is None else routing.threshold.mean(1).tolist()
    return {
        "experts": names,
        "weights": [_numbers(layer[: len(experts)].tolist()) for layer, experts in zip(weights, names, strict=True)],
        "selected": [_numbers(layer[: len(experts)].tolist()) for layer, experts in zip(selected, names, strict=True)],
        "threshold": thresholds and [_number(value) if experts else None for value, experts in zip(thresholds, names, strict=True)],
    }


def words_of(manifest: Manifest, routing: Routing) -> Tensor:
    """(T, `RoutingText.num_experts` twice, and a threshold for each layer with experts) float32: what RoutingText packs, of every token."""
    names = expert_names(manifest)
    parts = [table[layer, :, : len(experts)] for table in (routing.weights, routing.selected) for layer, experts in enumerate(names)]
    if routing.threshold is not None:
        parts += [routing.threshold[layer, :, None] for layer, experts in enumerate(names) if experts]
    return torch.cat([part.float() for part in parts], dim=1)


def _numbers(values: list[float]) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: float) -> float | None:
    """JSON has no NaN: a router that overflows."""
    return round(value, 6) if math.isfinite(value) else None
