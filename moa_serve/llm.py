"""`LLM`: the engine as a Python object: one base, many adapters, one chosen for each prompt, all in one batch.

    with LLM("folder", adapters={"math": "adapters/math"}) as llm:
        llm.generate(["1 + 1 =", "1 + 1 ="], SamplingParams(temperature=0), adapter=["math", None])

Composition of store, engine and tokenizer for one process and one thread.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.importers import read_manifest
from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.rules import RoutingOptions, RoutingRules, rules_for
from moa_serve.adapter.store import AdapterStore
from moa_serve.config import ModelConfig
from moa_serve.engine.engine import Collected, Engine, EngineOptions, TokenEvent, plan_memory
from moa_serve.engine.guide import GrammarCompiler
from moa_serve.engine.request import Request, SamplingParams, TokenLogprob
from moa_serve.engine.routing import Routing
from moa_serve.engine.self_test import judge, read_scores, score_request, trial_prompt
from moa_serve.errors import AdapterError, AdapterNotFound, InvalidRequest, MoaError, shown
from moa_serve.gpu.available import why_no_kernels
from moa_serve.gpu.layout import SlotShape
from moa_serve.gpu.plan import FusedSizes
from moa_serve.model.backend import Backend
from moa_serve.model.counters import RoutingTotals
from moa_serve.model.devices import has_gpu, why_no_cuda
from moa_serve.model.similarity import Similarity, expert_similarity
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import Base, load_base
from moa_serve.native.library import NativeUnavailable, instruction_sets
from moa_serve.native.model import NativeModel
from moa_serve.native.packing import PAGE
from moa_serve.text import IncrementalDecoder, Tokenizer

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]
Source = str | os.PathLike[str] | AdapterSource
RoutingAsked = Mapping[str, Any]  # fields of RoutingOptions


@dataclass(frozen=True, slots=True)
class Completion:
    """What was generated for one prompt.

    Args:
        text: without the stop string; "" where the base has no tokenizer.
        token_ids: the generated tokens only, the end of text or stop token included.
        logprobs: one for each token where `SamplingParams.logprobs` asked for them, else None.
        finish_reason: stop (end of text, stop token or stop string), length, or error.
        error: why, where the reason is error: the adapter's weights overflowed for this prompt. Other prompts are not touched.
        adapter: the name that was asked for; None is the base.
        prompt_token_ids: what the prompt was encoded to.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str
    error: MoaError | None = None
    adapter: str | None = None
    prompt_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceScore:
    """How likely the model finds one continuation of a prompt.

    Args:
        token_ids: what the continuation was encoded to.
        logprob: natural logarithm of its probability behind the prompt: the sum of `token_logprobs`.
        token_logprobs: of each token, given the prompt and the tokens before it; at least -9999.
    """

    token_ids: tuple[int, ...]
    logprob: float
    token_logprobs: tuple[float, ...]


class _Job(Protocol):
    """One prompt of a call while it runs."""

    @property
    def request(self) -> Request: ...

    def take(self, event: TokenEvent, collected: Collected | None) -> bool:
        """Add one event, and with the last one what was collected; whether the request shall end now, though the engine would go on."""
        ...


class _Generation:
    """One prompt of a `generate` call while it runs."""

    def __init__(self, request: Request, adapter: str | None, tokenizer: Tokenizer | None) -> None:
        self.request, self.adapter = request, adapter
        stop = request.params.stop
        assert isinstance(stop, tuple)  # SamplingParams made it one
        self.decoder = IncrementalDecoder(tokenizer, stop=stop, min_tokens=request.params.min_tokens) if tokenizer else None
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if request.params.logprobs is None else []
        self.finish_reason = ""
        self.error: MoaError | None = None

    def take(self, event: TokenEvent, collected: Collected | None) -> bool:
        self.finish_reason, self.error = event.finish_reason or "", event.error
        if event.token_id is None:
            return False
        self.token_ids.append(event.token_id)
        if self.logprobs is not None and event.logprob is not None:
            self.logprobs.append(event.logprob)
        if self.decoder is None:
            return False
        self.text.append(self.decoder.push([event.token_id]))
        if self.decoder.stopped is not None:
            self.finish_reason = "stop"
        return self.decoder.stopped is not None

    def completion(self) -> Completion:
        rest = self.decoder.finish() if self.decoder else ""
        return Completion(
            "".join(self.text) + rest,
            self.token_ids,
            self.logprobs,
            self.finish_reason,
            self.error,
            self.adapter,
            tuple(self.request.prompt_ids),
        )


class _Scoring:
    """One prompt of a `score_choices` call while it runs; `place` says in a message which."""

    def __init__(self, request: Request, place: str, on_error: Callable[[MoaError], None] | None) -> None:
        self.request, self._place, self._on_error = request, place, on_error
        self.scores: list[ChoiceScore] = []

    def take(self, event: TokenEvent, collected: Collected | None) -> bool:
        if event.error is not None:
            if self._on_error is None:
                raise type(event.error)(f"{self._place}{event.error}", param=event.error.param) from event.error
            self._on_error(event.error)
        elif collected is not None:
            for ids, logprobs in zip(self.request.branches, collected.branch_logprobs, strict=True):
                self.scores.append(ChoiceScore(ids, sum(logprobs), tuple(logprobs)))
        return False


class LLM:
    """One base and its adapters.

    Args:
        model: a folder, a GGUF file, a hub id, or None for the default base.
        adapters: name -> folder, or AdapterSource where the files alone cannot tell the variant.
        backend: "auto" (native on a CPU where the library was built, triton on a GPU, else torch), "native", "triton" or "torch".
        device: "auto" (CUDA where there is a device), "cpu" or "cuda".
        dtype: "auto" (bfloat16 for native and on CUDA, float32 for torch on a CPU), "float32" or "bfloat16".
        base_dtype: "auto" (the base's weights are kept in `dtype`), or "int8": in eight bits with scales, computed in bfloat16 by the
            native backend; half the memory, and faster in small batches, for small differences (`moa-serve bench quality`).
        engine_options: fields of `EngineOptions`.
    Raises:
        ModelError, AdapterError, InvalidRequest: what is wrong and what to do; nothing is half loaded.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        adapters: Mapping[str, Source] | None = None,
        backend: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        base_dtype: str = "auto",
        **engine_options: Any,
    ) -> None:
        self._is_open = False
        self._running = threading.Lock()
        self._is_freed = False
        self.device = resolve_device(device)
        options = _options(engine_options)
        sources = _sources(adapters)
        base, resolved = open_base(
            _path("model", model), backend=backend, device=device, dtype=dtype, base_dtype=base_dtype, block_size=options.block_size
        )
        self.config, self.name, self.base_digest, self.folder = base.config, base.name, base.digest, base.folder
        self.tokenizer = Tokenizer.from_folder(base.folder) if base.folder else None
        self._store = AdapterStore(base.config, base_name=base.name, base_digest=base.digest, max_bytes=options.adapter_cache_bytes)
        self._manifests: dict[str, Manifest] = {}  # by name; tensors may leave memory, these stay
        self._on_trial: dict[str, Adapter] = {}
        computing = new_model(resolved, base, base_dtype, options=options, adapters=sources.values(), may_fall_back=backend == "auto")
        self.backend = computing.name
        self._engine = Engine(computing, options, lease=self._lease, base_digest=base.digest)
        self._is_open = True
        try:
            for name, source in sources.items():
                self.load_adapter(name, source)
        except BaseException:
            self.close()
            raise

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        if self.tokenizer is None:
            raise InvalidRequest("guide: the base has no tokenizer, so there is no text to guide", param="guide")
        return GrammarCompiler(self.tokenizer, self.config.vocab_size, self.config.eos_token_ids)

    # -- life

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free weights, KV cache and adapters, at once or when the call that runs has ended; twice is as good as once."""
        self._is_open = False
        self._free()

    def _free(self) -> None:
        """What is closed and not in use; whoever still uses it comes here when it ends."""
        if self._is_open or not self._running.acquire(blocking=False):
            return
        try:
            if not self._is_freed:
                self._is_freed = True
                self._engine.close()
                del self._engine, self._store
        finally:
            self._running.release()

    def _check_open(self) -> None:
        if not self._is_open:
            raise InvalidRequest("this LLM is closed; make a new one")

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One call at a time: a second thread, or a call from within a call, is told so instead of mixing with the first."""
        self._check_open()
        if not self._running.acquire(blocking=False):
            raise InvalidRequest("an LLM runs one call at a time; use one LLM per thread, or give all prompts to one call")
        try:
            yield
        finally:
            self._running.release()
            self._free()

    @property
    def dtype(self) -> torch.dtype:
        """What the base computes in."""
        self._check_open()
        return self._engine.model.dtype

    @property
    def base_dtype(self) -> str:
        """In what the base's weights are kept: "float32", "bfloat16" or "int8"."""
        self._check_open()
        return self._engine.model.base_dtype

    @property
    def max_model_len(self) -> int:
        """The served context: tokens of prompt and completion together."""
        self._check_open()
        return self._engine.max_model_len

    # -- adapters

    def load_adapter(self, name: str, source: Source) -> Adapter:
        """Read, validate, try and publish an adapter under `name`; what comes back tells its revision, variant and warnings.

        Raises:
            AdapterError: what is wrong with it; nothing has changed then.
        """
        self._check_open()
        source = _source(name, source)
        adapter = self._store.read(name, source)
        try:
            adapter = self._self_test(name, adapter)
            self._store.publish(name, source, adapter)
        except BaseException:
            if adapter.revision not in self._revisions():
                self._engine.drop(adapter.revision, "failed")
            raise
        self._manifests[name] = adapter.manifest
        self._engine.pardon(adapter.revision)
        return adapter

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter and free its memory. Raises AdapterNotFound."""
        self._check_open()
        revision, _ = self._resolve(name)
        if revision is None:
            raise InvalidRequest("name: the base cannot be unloaded", param="name")
        self._store.remove(name)
        del self._manifests[name]
        if revision not in self._revisions():
            self._engine.drop(revision)

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        self._check_open()
        return self._store.names()

    def routing_totals(self, adapter: str, moa: RoutingAsked | None = None) -> RoutingTotals | None:
        """What the adapter's routers decided since it was loaded; None before its first token.

        Args:
            moa: routing options: of the requests with these, from the first call with them on. Without options, of those that follow the
                adapter's own way.
        """
        self._check_open()
        revision, manifest = self._resolve(adapter)
        if revision is None or manifest is None:
            return None
        rules = _rules(moa, manifest)
        if rules is None:
            return self._engine.routing_totals(revision)
        self._engine.count_apart(revision, manifest, rules)
        return self._engine.apart_totals(revision, rules)

    def _revisions(self) -> dict[str, str]:
        """revision -> one of its names."""
        return {self._store.get(name).revision: name for name in self._store.names()}

    def _lease(self, revision: str) -> AbstractContextManager[Adapter]:
        if revision in self._on_trial:
            return nullcontext(self._on_trial[revision])
        return self._store.lease(self._revisions()[revision])

    def _self_test(self, name: str, adapter: Adapter) -> Adapter:
        """An adapter proves on a short prompt that it computes finite logits and changes the base's.

        One that does nothing is served with a warning where that is its honest state (fresh, or nothing selected), else refused.
        """
        prompt = trial_prompt(self.config.vocab_size, self._engine.max_model_len)
        self._on_trial[adapter.revision] = adapter
        try:
            base, _ = self._score(prompt, None, None, routing=False)
            logits, routing = self._score(prompt, adapter.revision, adapter.manifest)
        finally:
            del self._on_trial[adapter.revision]
            if adapter.revision not in self._revisions():
                self._engine.forget_routing(adapter.revision)
        assert base is not None
        assert logits is not None
        return judge(name, adapter, base, logits, routing)

    # -- requests

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        moa: RoutingAsked | Sequence[RoutingAsked | None] | None = None,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Complete every prompt, all of them in one mixed batch.

        Args:
            prompts: strings, which the tokenizer's defaults encode, or token ids, which are taken as they are; no chat template.
            params: one for all prompts, or one for each; None is temperature 1 and 16 tokens.
            adapter: a name, None for the base, or a list with one of these for each prompt.
            moa: routing options, the fields of `RoutingOptions` by name, None for the adapter's own way, or a list with one of these for
                each prompt.
            on_finished: called as each prompt ends, with how many have ended; it cannot call this LLM.
        Returns:
            One completion for each prompt, in their order.
        Raises:
            InvalidRequest, AdapterNotFound: one prompt is not valid; then none has run.
        """
        self._check_open()
        _check_prompts(prompts)
        chosen = _spread("params", SamplingParams() if params is None else params, SamplingParams, len(prompts))
        names = _spread("adapter", adapter, str, len(prompts), optional=True)
        asked = _spread("moa", moa, Mapping, len(prompts), optional=True)
        jobs = []
        for index, (prompt, one, name, options) in enumerate(zip(prompts, chosen, names, asked, strict=True)):
            with _placed(index, len(prompts)):
                jobs.append(self._generation(prompt, one, name, options))
                self._engine.check(jobs[-1].request)
        self._run(jobs, on_finished)
        return [job.completion() for job in jobs]

    def score_choices(
        self,
        prompts: Sequence[Prompt],
        choices: Sequence[Sequence[Prompt]],
        *,
        adapter: str | Sequence[str | None] | None = None,
        moa: RoutingAsked | Sequence[RoutingAsked | None] | None = None,
        on_finished: Callable[[int], None] | None = None,
        on_error: Callable[[int, MoaError], None] | None = None,
    ) -> list[list[ChoiceScore]]:
        """How likely each of several continuations of each prompt is. A prompt is computed once for all its choices.

        A choice sees its prompt and nothing of the other choices. Instance-level adapters weigh their experts by the prompt alone, as when
        they generate. A prompt and its choices are computed in one step, so `max_scored_tokens` bounds them together.

        Args:
            prompts: as in `generate`.
            choices: for each prompt the continuations, at least one, strings or token ids. A string is encoded by itself, without the
                tokenizer's own tokens around it, and its ids are put behind the prompt's: as in training, no token spans both. So a space
                between the two belongs to one of the strings, and an end of text is scored where it is written.
            adapter: a name, None for the base, or a list with one of these for each prompt.
            moa: routing options, as in `generate`.
            on_finished: called as each prompt ends, with how many have ended; it cannot call this LLM.
            on_error: called with the index of a prompt that ended with an error, and the error; the prompt then has no scores, and the
                others go on. Without it the error is raised.
        Returns:
            For each prompt one score for each choice, in their order.
        Raises:
            InvalidRequest, AdapterNotFound: one prompt or choice is not valid; then none has run.
            MoaError: without `on_error`, a prompt ended with an error, such as an adapter whose weights overflow; the others are given up.
        """
        self._check_open()
        _check_prompts(prompts)
        names = _spread("adapter", adapter, str, len(prompts), optional=True)
        if not isinstance(choices, list | tuple) or len(choices) != len(prompts):
            raise InvalidRequest(f"choices must be a list with the choices of each of the {len(prompts)} prompts", param="choices")
        asked = _spread("moa", moa, Mapping, len(prompts), optional=True)
        jobs = []
        for index, (prompt, ends, name, options) in enumerate(zip(prompts, choices, names, asked, strict=True)):
            with _placed(index, len(prompts)):
                request = self._scoring_request(prompt, ends, name, options)
                self._engine.check(request)
                jobs.append(_Scoring(request, _place(index, len(prompts)), None if on_error is None else partial(on_error, index)))
        self._run(jobs, on_finished)
        return [job.scores for job in jobs]

    def logits(self, token_ids: Sequence[int], *, adapter: str | None = None, moa: RoutingAsked | None = None) -> Tensor:
        """(T, V) float32 on the CPU: what the model expects after each token. `moa`: routing options, as in `generate`."""
        self._check_open()
        revision, manifest = self._resolve(adapter)
        logits, _ = self._score(token_ids, revision, manifest, rules=_rules(moa, manifest), routing=False)
        assert logits is not None
        return logits

    def route(self, token_ids: Sequence[int], *, adapter: str, moa: RoutingAsked | None = None) -> Routing:
        """What the adapter's routers say of each token. `moa`: routing options, as in `generate`.

        Raises:
            InvalidRequest: the adapter has no router.
        """
        self._check_open()
        revision, manifest = self._resolve(adapter)
        if manifest is None or manifest.router.site == "none":
            raise InvalidRequest(f"adapter {adapter!r} has no router that weighs its experts: all of them always count", param="adapter")
        _, routing = self._score(token_ids, revision, manifest, rules=_rules(moa, manifest), logits=False)
        assert routing is not None
        return routing

    def similarity(self, prompts: Sequence[Sequence[int]], *, adapter: str) -> tuple[list[Similarity | None], int]:
        """How alike the outputs of an adapter's experts are on some prompts, in each layer; see `model.similarity.expert_similarity`."""
        self._check_open()
        revision, manifest = self._resolve(adapter)
        if revision is None:
            raise InvalidRequest("adapter: the base alone has no experts", param="adapter")
        requests = [score_request(_token_ids(prompt), revision, manifest) for prompt in prompts]
        if not requests:
            raise InvalidRequest("prompts is empty; experts are compared by what they add for a prompt", param="prompts")
        for request in requests:
            self._engine.check(request)
        model = self._engine.model
        if not isinstance(model, Transformer):
            raise InvalidRequest(
                "expert outputs are compared inside of the torch backend; make the LLM with backend='torch'", param="backend"
            )
        with self._exclusive(), self._lease(revision) as found:
            weights = model.prepare(found)
            return expert_similarity(model, weights, [request.prompt_ids for request in requests])

    def _score(
        self,
        token_ids: Sequence[int],
        revision: str | None,
        manifest: Manifest | None,
        *,
        rules: RoutingRules | None = None,
        logits: bool = True,
        routing: bool = True,
    ) -> tuple[Tensor | None, Routing | None]:
        """What was asked for of every token, through the same step that serves."""
        request = score_request(_token_ids(token_ids), revision, manifest, rules=rules, logits=logits, routing=routing)
        with self._exclusive():
            sequence = self._engine.add(request)
            try:
                while self._engine.has_work:
                    for event in self._engine.step():
                        if event.error is not None:
                            raise event.error
            finally:
                self._engine.end(sequence, "abort")
                collected = self._engine.collected.pop(request.request_id)
        return read_scores(collected, manifest, len(request.prompt_ids), rules)

    def _resolve(self, adapter: str | None) -> tuple[str | None, Manifest | None]:
        """(revision, manifest) of a name; (None, None) for the base."""
        if adapter is None:
            return None, None
        if not isinstance(adapter, str):
            raise InvalidRequest(f"adapter must be the name of an adapter or None, not {shown(adapter)}", param="adapter")
        if adapter not in self._store:
            loaded = ", ".join(self._store.names()) or "none"
            raise AdapterNotFound(f"adapter {shown(adapter)} is not loaded; loaded are: {loaded}", param="adapter")
        return self._store.get(adapter).revision, self._manifests[adapter]

    def _generation(self, prompt: Prompt, params: SamplingParams, adapter: str | None, moa: RoutingAsked | None) -> _Generation:
        if params.stop and self.tokenizer is None:
            raise InvalidRequest("stop: the base has no tokenizer, so there is no text to stop at; use stop_token_ids", param="stop")
        revision, manifest = self._resolve(adapter)
        request = Request(
            self._prompt_ids(prompt),
            params,
            revision,
            is_pooled=manifest is not None and manifest.is_pooled,
            rules=_rules(moa, manifest),
            grammar=None if params.guide is None else self._grammars.compile(params.guide),
        )
        return _Generation(request, adapter, self.tokenizer)

    def _scoring_request(self, prompt: Prompt, choices: Any, adapter: str | None, moa: RoutingAsked | None = None) -> Request:
        if not isinstance(choices, list | tuple) or not choices:
            raise InvalidRequest(f"choices must be a list of at least one for each prompt, not {shown(choices)}", param="choices")
        revision, manifest = self._resolve(adapter)
        return Request(
            self._prompt_ids(prompt),
            SamplingParams(max_tokens=0),
            revision,
            is_pooled=manifest is not None and manifest.is_pooled,
            rules=_rules(moa, manifest),
            branches=tuple(self._choice_ids(choice) for choice in choices),
        )

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return _token_ids(prompt)
        if self.tokenizer is None:
            raise InvalidRequest("a prompt is text, but the base has no tokenizer; give token ids", param="prompts")
        return tuple(self.tokenizer.encode(prompt, parse_special=True))

    def _choice_ids(self, choice: Prompt) -> tuple[int, ...]:
        if not isinstance(choice, str):
            return _token_ids(choice, "choice")
        if self.tokenizer is None:
            raise InvalidRequest("a choice is text, but the base has no tokenizer; give token ids", param="choices")
        return tuple(self.tokenizer.encode(choice, parse_special=True, add_special=False))

    def _run(self, jobs: Sequence[_Job], on_finished: Callable[[int], None] | None) -> None:
        running = {}
        num_finished = 0
        with self._exclusive():
            try:
                for job in jobs:
                    running[self._engine.add(job.request)] = job
                while self._engine.has_work:
                    for event in self._engine.step():
                        sequence = event.sequence
                        job = running[sequence]
                        if job.take(event, self._engine.collected.pop(job.request.request_id, None)):
                            self._engine.end(sequence, "stop")
                        if sequence.finish_reason is not None:
                            num_finished += 1
                            if on_finished is not None:
                                on_finished(num_finished)
            finally:
                for sequence, job in running.items():
                    self._engine.end(sequence, "abort")
                    self._engine.collected.pop(job.request.request_id, None)


def _rules(moa: RoutingAsked | None, manifest: Manifest | None) -> RoutingRules | None:
    return rules_for(RoutingOptions.of(moa), manifest)


def _place(index: int, count: int) -> str:
    return f"prompt {index} of {count}: " if count > 1 else ""


@contextmanager
def _placed(index: int, count: int) -> Iterator[None]:
    """An InvalidRequest from in here says which of several prompts it is about."""
    try:
        yield
    except InvalidRequest as error:
        if count == 1:
            raise
        raise type(error)(f"{_place(index, count)}{error}", param=error.param) from None


def _check_prompts(prompts: Any) -> None:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise InvalidRequest(f"prompts is one {type(prompts).__name__}; give a list of prompts", param="prompts")


def _token_ids(prompt: Any, name: str = "prompt") -> tuple[int, ...]:
    """Ids from a list, tuple, array or tensor; what is no whole number is left for Request to name."""
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, list | tuple):
        raise InvalidRequest(f"a {name} is of type {type(prompt).__name__}, but must be a list of token ids", param=f"{name}s")
    return tuple(int(item) if isinstance(item, np.integer) else item for item in prompt)


def _spread(param: str, value: Any, kind: type, count: int, *, optional: bool = False) -> list[Any]:
    """`count` copies of one value, or a list that has that many."""

    def fits(item: Any) -> bool:
        return isinstance(item, kind) or (optional and item is None)

    if fits(value):
        return [value] * count
    if not isinstance(value, list | tuple) or not all(map(fits, value)):
        raise InvalidRequest(f"{param} must be one {kind.__name__} or a list of them, not {shown(value)}", param=param)
    if len(value) != count:
        raise InvalidRequest(f"{param} has {len(value)} entries for {count} prompts; give one, or one for each", param=param)
    return list(value)


def _path(param: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, os.PathLike) and isinstance(path := os.fspath(value), str):
        return path
    raise InvalidRequest(f"{param} must be a path or a name, not {shown(value)}", param=param)


def _source(name: Any, source: Any) -> AdapterSource:
    if isinstance(source, AdapterSource):
        return source
    path = _path(f"adapter {shown(name)}", source)
    if path is None:
        raise InvalidRequest(f"adapter {shown(name)}: must be a folder or an AdapterSource, not None", param="adapters")
    return AdapterSource(path)


def _sources(adapters: Any) -> dict[str, AdapterSource]:
    if adapters is None:
        return {}
    if not isinstance(adapters, Mapping):
        raise InvalidRequest(f"adapters must map names to folders, not be {shown(adapters)}", param="adapters")
    return {name: _source(name, source) for name, source in adapters.items()}


def _options(given: Mapping[str, Any]) -> EngineOptions:
    known = [field.name for field in fields(EngineOptions)]
    for name in given:
        if name not in known:
            raise InvalidRequest(f"unknown engine option {name!r}; known are {', '.join(known)}", param=name)
    return EngineOptions(**given)


def resolve_backend(backend: str, device: torch.device, block_size: int = PAGE) -> str:
    """ "native", "triton" or "torch". `auto` is native on a CPU that the library was built for and with pages as it has them, triton on a
    GPU whose kernels can be compiled, else torch.

    Raises:
        InvalidRequest: "native" or "triton" was asked for and cannot be had, and why.
    """
    if backend not in ("auto", "native", "torch", "triton"):
        raise InvalidRequest(f"backend {shown(backend)} is unknown; use 'auto', 'native', 'triton' or 'torch'", param="backend")
    if backend == "torch":
        return "torch"
    if backend == "triton" or (backend == "auto" and device.type != "cpu"):
        reason = why_no_kernels(device)
        if reason is None and block_size & (block_size - 1):
            reason = f"its pages hold a power of two of tokens, and block_size is {block_size}"
        if reason is None:
            return "triton"
        if backend == "triton":
            raise InvalidRequest(f"backend 'triton' cannot be used: {reason}", param="backend")
        logger.warning("the torch backend serves, because %s", reason)
        return "torch"
    try:
        if device.type != "cpu":
            raise NativeUnavailable(f"it computes on the CPU, and the device is {device}")
        if block_size != PAGE:
            raise NativeUnavailable(f"its pages hold {PAGE} tokens, and block_size is {block_size}")
        instruction_sets()
    except NativeUnavailable as error:
        if backend == "native":
            raise InvalidRequest(f"backend 'native' cannot be used: {error}", param="backend") from error
        logger.warning("the torch backend serves, because %s", error)
        return "torch"
    return "native"


def resolve(
    backend: str, device: str, dtype: str, base_dtype: str = "auto", *, block_size: int = PAGE
) -> tuple[str, torch.device, torch.dtype]:
    """What computes a base, where, and in what; arguments as those of `LLM`.

    Raises:
        InvalidRequest: what cannot be had, and why.
    """
    where = resolve_device(device)
    resolved = resolve_backend(backend, where, block_size)
    computed = resolve_dtype(dtype, where, resolved)
    _check_base_dtype(base_dtype, computed, resolved)
    return resolved, where, computed


def open_base(
    model: str | Path | None, *, backend: str, device: str, dtype: str, base_dtype: str = "auto", block_size: int = PAGE
) -> tuple[Base, str]:
    """The base in memory where and as it is wanted, and the backend that is to compute it. Arguments as those of `LLM`.

    Raises:
        ModelError, InvalidRequest: what cannot be had, and why.
    """
    resolved, where, computed = resolve(backend, device, dtype, base_dtype, block_size=block_size)
    return load_base(model, device=where, dtype=computed), resolved


def new_model(
    backend: str,
    base: Base,
    base_dtype: str = "auto",
    *,
    options: EngineOptions | None = None,
    adapters: Iterable[AdapterSource] = (),
    shape: SlotShape | None = None,
    may_fall_back: bool = False,
) -> Backend:
    """What computes the base. It takes the weights over: they are packed, and `base` has none then that another could read.

    Args:
        options: what the engine is to have: a GPU's slots are as many, and a step's buffers hold as many tokens.
        adapters: those that are known now: a GPU's slots are made as large as the largest of them, where no `shape` says it.
        may_fall_back: where the GPU's kernels fail their trial, compute by torch.
    Raises:
        InvalidRequest: a GPU has no room for what `options` ask of it; nothing was allocated.
    """
    if backend == "torch":
        return Transformer.packed(base.config, base.weights)
    if backend == "triton":
        return _fused(base, options or EngineOptions(), shape or slot_shape(adapters, base.config), may_fall_back=may_fall_back)
    return NativeModel(base.config, base.weights, digest=base.digest, is_int8=base_dtype == "int8")


def _fused(base: Base, options: EngineOptions, shape: SlotShape, *, may_fall_back: bool) -> Backend:
    """The GPU's own kernels, after a trial where they are new to the device; the definition where they fail it and may be replaced."""
    from moa_serve.gpu.model import FusedTransformer  # here: Triton is not everywhere, and takes a second to import
    from moa_serve.gpu.trial import what_is_wrong

    weights = base.weights.embed
    plan_memory(FusedSizes(base.config, shape, options.num_slots, options.max_batch_tokens, weights.dtype, weights.device), options)
    model = FusedTransformer(
        base.config,
        base.weights,
        num_slots=options.num_slots,
        shape=shape,
        max_tokens=options.max_batch_tokens,
        max_rows=options.max_num_seqs,
    )
    if model.device.type != "cuda":  # interpreted, for tests, which are a longer trial
        return model
    reason = what_is_wrong(model, Transformer(base.config, base.weights))
    if reason is None:
        return model
    if not may_fall_back:
        raise InvalidRequest(f"backend 'triton' cannot be used: {reason}; 'auto' and 'torch' do without", param="backend")
    logger.warning("the torch backend serves, because %s; moa-serve doctor says more", reason)
    return Transformer.packed(base.config, base.weights)


def slot_shape(adapters: Iterable[AdapterSource], config: ModelConfig) -> SlotShape:
    """Of a slot that takes each of these adapters, as far as their headers tell; the usual one where there are none that can be read."""
    found: list[SlotShape] = []
    for source in adapters:
        try:
            manifest = read_manifest(source, config)
        except AdapterError:
            continue  # who loads it is told what is wrong with it
        found.append(SlotShape.usual() if manifest is None else SlotShape.of(manifest))
    return SlotShape.union(found) if found else SlotShape.usual()


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if has_gpu():
            logger.warning("the CPU computes, because %s", why_no_cuda())
        return torch.device("cpu")
    if device == "cpu":
        return torch.device("cpu")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise InvalidRequest(f"device 'cuda' was asked for, but {why_no_cuda()}; 'cpu' and 'auto' do without", param="device")
        return torch.device("cuda")
    raise InvalidRequest(f"device {device!r} is unknown; use 'auto', 'cpu' or 'cuda'", param="device")


def resolve_dtype(dtype: str, device: torch.device, backend: str) -> torch.dtype:
    automatic = torch.bfloat16 if device.type == "cuda" or backend == "native" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": automatic}
    if not isinstance(dtype, str) or dtype not in known:
        raise InvalidRequest(f"dtype {shown(dtype)} is unknown; use 'auto', 'float32' or 'bfloat16'", param="dtype")
    return known[dtype]


def _check_base_dtype(base_dtype: str, dtype: torch.dtype, backend: str) -> None:
    """Raises InvalidRequest: the base's weights cannot be kept so by what computes them."""
    if base_dtype not in ("auto", "int8"):
        raise InvalidRequest(f"base_dtype {shown(base_dtype)} is unknown; use 'auto' or 'int8'", param="base_dtype")
    if base_dtype == "int8" and (backend, dtype) != ("native", torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise InvalidRequest(
            f"base_dtype 'int8' is computed by the native backend in bfloat16, and here the {backend} backend computes in {name}; "
            "use backend 'native' with dtype 'bfloat16', or base_dtype 'auto'",
            param="base_dtype",
        )
