"""The engine: requests in, tokens out, one step at a time.

Owns every tensor in use, the scheduler, the pools and the bank. Knows token ids, not text, and adapters by revision, not by name.
Not thread-safe: one thread calls it. A request ends exactly once, and its blocks and slot go back in one place (`_release`).
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from moa_serve import faults
from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.counts import EvictionReason
from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.rules import RoutingRules
from moa_serve.engine.pools import SLOT_BYTES, BlockPool, SlotTable, kv_cache_room
from moa_serve.engine.recovery import Chunks, Failure, Recovery
from moa_serve.engine.request import Request, SamplingParams, Sequence, TokenLogprob, kv_root
from moa_serve.engine.routing import RoutedLayers, TokenRouting
from moa_serve.engine.runner import ModelRunner, StepOutput
from moa_serve.engine.sampler import SampledTokens, Sampler, logprobs_at, token_logprobs
from moa_serve.engine.scheduler import Scheduler, SchedulerOutput
from moa_serve.engine.steps import StepTimes
from moa_serve.errors import (
    AdapterNonfiniteOutput,
    AdapterQuarantined,
    ContextLengthExceeded,
    EngineError,
    InvalidRequest,
    MoaError,
    shown,
    sized,
)
from moa_serve.model.backend import Backend, Sizes
from moa_serve.model.bank import AdapterBank
from moa_serve.model.counters import RouterCounters, RoutingTotals
from moa_serve.model.memory import available_bytes, release_memory, total_bytes

logger = logging.getLogger(__name__)

Lease = Callable[[str], AbstractContextManager[Adapter]]
INCIDENTS = (  # the kinds that `Engine.incidents` counts; base_nonfinite and rebuilt are for an alert
    "base_nonfinite", "adapter_nonfinite", "forward_error", "sampler_error", "out_of_memory", "failed_step", "rebuilt",
)  # fmt: skip
GPU_MEMORY_UTILIZATION = 0.9  # the rest is for what nobody can count: the driver, fragments, kernels that are loaded later
QUARANTINE_AFTER = 3  # requests of one revision that ended in NaN or infinity


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Sizes and limits of one engine.

    Args:
        max_num_seqs: sequences in one step.
        max_batch_tokens: tokens in one step; a longer prompt is prefilled in chunks.
        max_mixed_prefill_tokens: prompt tokens in a step that also decodes, so that running rows keep their pace.
        num_slots: adapters that one batch can mix; more of them queue.
        block_size: tokens in a page of the KV cache.
        kv_cache_bytes: memory for the KV cache; None for 25 % of what is free, and at least one full context, and on CUDA for what
            `gpu_memory_utilization` leaves.
        gpu_memory_utilization: on CUDA, the share of the device's memory that may be held, by anybody, beside which the KV cache gets
            what weights, slots and steps leave; None for `GPU_MEMORY_UTILIZATION`, and on a CPU, where it means nothing.
        max_model_len: tokens of prompt and completion together; None for the base's own, or what the KV cache holds.
        max_instance_prompt: longest prompt of an instance-level adapter, which must be prefilled in one step.
        max_scored_tokens: tokens of a prompt and all choices that are scored behind it, which are computed in one step.
        adapter_cache_bytes: host memory for adapters; the least recently used leave first.
        prefix_cache: keep full pages of the KV cache for requests that begin the same. Pages that no running request holds take up to half
            of the cache, as long as nobody else needs the room.
        max_num_seqs_per_adapter: sequences of one adapter in one step; None for no limit of its own.
        max_num_seqs_per_tenant: sequences of one tenant (API key) in one step; None for no limit of its own.
    """

    max_num_seqs: int = 32
    max_batch_tokens: int = 256
    max_mixed_prefill_tokens: int = 64
    num_slots: int = 8
    block_size: int = 16
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float | None = None
    max_model_len: int | None = None
    max_instance_prompt: int = 8192
    max_scored_tokens: int = 4096
    adapter_cache_bytes: int = 8 * 2**30
    prefix_cache: bool = True
    max_num_seqs_per_adapter: int | None = None
    max_num_seqs_per_tenant: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prefix_cache, bool):
            raise InvalidRequest(f"prefix_cache is {shown(self.prefix_cache)}, but must be true or false", param="prefix_cache")
        share = self.gpu_memory_utilization
        if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1):
            raise InvalidRequest(
                f"gpu_memory_utilization is {shown(share)}, but must be a number above 0 and at most 1", param="gpu_memory_utilization"
            )
        for name in self.__slots__:
            value = getattr(self, name)
            if name in ("prefix_cache", "gpu_memory_utilization"):
                continue
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InvalidRequest(f"{name} is {shown(value)}, but must be a whole number of at least 1", param=name)
        if self.max_batch_tokens < self.max_num_seqs:
            raise InvalidRequest(
                f"max_batch_tokens {self.max_batch_tokens} is less than max_num_seqs {self.max_num_seqs}: a step could not give each "
                f"row one token; raise max_batch_tokens",
                param="max_batch_tokens",
            )


@dataclass(eq=False, slots=True)
class TokenEvent:
    """One step's result for one sequence: a token (None where it ended without one), and how it ended if it did. `routing` where it was
    asked for."""

    sequence: Sequence
    token_id: int | None
    logprob: TokenLogprob | None = None
    finish_reason: str | None = None
    error: MoaError | None = None
    routing: TokenRouting | None = None


@dataclass(eq=False, slots=True)
class Collected:
    """What a request asked to keep of its forward: of its prompt logits or log-probabilities, and its routers' words, chunk by chunk.

    `prompt_logprobs[i]` is of prompt token i + 1, given those before it; `branch_logprobs[i][j]` of token j of branch i.
    """

    logits: list[Tensor] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    branch_logprobs: list[list[float]] = field(default_factory=list)
    is_finite: bool = True  # no NaN or infinity in the logits behind the log-probabilities
    routing: list[RoutedLayers] = field(default_factory=list)


class Engine:
    """
    Args:
        model: the base and what computes it; closed with the engine.
        lease: an adapter's tensors by revision, held in memory while its slot is filled.
        base_digest: part of the KV identity.
    """

    def __init__(self, model: Backend, options: EngineOptions, *, lease: Lease, base_digest: str) -> None:
        self.model, self.options, self.backend, self._base_digest = model, options, model.name, base_digest
        self._lease = lease
        num_blocks, self.max_model_len = plan_memory(model, options)
        self.block_pool = BlockPool(num_blocks, options.block_size, max_kept=num_blocks // 2 if options.prefix_cache else 0)
        self.slot_table = SlotTable(options.num_slots)
        self._cache = model.new_cache(num_blocks, options.block_size)
        self._bank = AdapterBank(model, options.num_slots)
        self.scheduler = Scheduler(
            self.block_pool,
            self.slot_table,
            max_num_seqs=options.max_num_seqs,
            max_batch_tokens=options.max_batch_tokens,
            max_mixed_prefill_tokens=options.max_mixed_prefill_tokens,
            max_model_len=self.max_model_len,
            max_num_seqs_per_adapter=options.max_num_seqs_per_adapter,
            max_num_seqs_per_tenant=options.max_num_seqs_per_tenant,
        )
        self._runner = ModelRunner(model, self._cache, self._bank)
        self._sampler = Sampler(model.config.vocab_size, model.device)
        # A config may name ids beyond the vocabulary; nothing can draw them, and an index there would meet a neighbour's logits.
        self._eos_token_ids = tuple(token for token in model.config.eos_token_ids if token < model.config.vocab_size)
        self._recovery = Recovery(self._run, self._sample, self._is_healthy, self.trim)
        self._nonfinite: dict[str, int] = {}
        self._faulty: set[str] = set()  # revisions that made a step fail: out of service
        self.incidents: Counter[str] = Counter()  # what went wrong, by kind
        self._dropped: set[str] = set()  # revisions that are gone for good, but still have running rows
        self.collected: dict[str, Collected] = {}
        self.num_preemptions = 0
        self.did_work = True  # whether the last step had anything to run
        self.times: StepTimes | None = None  # told of every step, where somebody wants to know

    def routing_totals(self, revision: str) -> RoutingTotals | None:
        """What the routers of an adapter decided since it was loaded; None before its first token. Left out is what requests with
        routing options had them do, which says nothing of the adapter: `altered_totals`."""
        counters = self._runner.counters.get(revision)
        return None if counters is None else counters.snapshot()

    def altered_totals(self, revision: str) -> RoutingTotals | None:
        """The same of requests with routing options that made a difference."""
        counters = self._runner.altered.get(revision)
        return None if counters is None else counters.snapshot()

    def count_apart(self, revision: str, manifest: Manifest, rules: RoutingRules) -> None:
        """From now on, keep totals of their own of requests with these `rules`; `altered_totals` is without them. For whoever compares a
        few: they stay until the revision is dropped."""
        self._runner.apart.setdefault((revision, rules.key), RouterCounters(manifest, self.model.device))

    def apart_totals(self, revision: str, rules: RoutingRules) -> RoutingTotals | None:
        """Those that are kept apart; None where they are not."""
        counters = self._runner.apart.get((revision, rules.key))
        return None if counters is None else counters.snapshot()

    def forget_routing(self, revision: str) -> None:
        """Count an adapter's routing from 0 again: what came before was its self-test, which is no traffic."""
        self._runner.counters.pop(revision, None)
        self._runner.altered.pop(revision, None)

    def drop(self, revision: str, reason: EvictionReason = "unloaded") -> None:
        """Free what a revision that is gone for good holds here, now or when its last row has ended."""
        self.slot_table.drop(revision, reason)
        self._dropped.add(revision)
        self._sweep()

    def pardon(self, revision: str) -> None:
        """The revision was loaded again: end its quarantine."""
        self._nonfinite.pop(revision, None)
        self._faulty.discard(revision)
        self._dropped.discard(revision)

    def trim(self) -> None:
        """Give back memory that is only kept for later: adapters in idle slots, what allocators hold."""
        for revision in self.slot_table.evict_idle():
            self.model.forget(revision)
        self._sweep()
        self.model.trim()
        release_memory(self.model.device)

    def rebuilt(self) -> "Engine":
        """An engine of the same sizes over the same base, with nothing in it; this one is closed, and its sequences must have ended.

        What was counted and who is in quarantine is taken over.

        Raises:
            InvalidRequest: memory has become too short for it. EngineError: the backend cannot be started again.
        """
        kv_cache_bytes = (self.block_pool.num_blocks - 1) * self.model.bytes_per_block(self.options.block_size)
        options = replace(self.options, kv_cache_bytes=kv_cache_bytes, max_model_len=self.max_model_len)
        counters, altered, apart, dropped = self._runner.counters, self._runner.altered, self._runner.apart, self._dropped
        self.slot_table.evict_idle("failed")
        self.close()
        release_memory(self.model.device)
        engine = Engine(self.model, options, lease=self._lease, base_digest=self._base_digest)
        engine._runner.counters, engine._runner.altered, engine._runner.apart = counters, altered, apart
        engine.slot_table.counts = self.slot_table.counts
        engine.block_pool.times = self.block_pool.times.renewed()
        engine._nonfinite, engine._faulty, engine._dropped = self._nonfinite, self._faulty, dropped
        engine.incidents, engine.num_preemptions, engine.times = self.incidents, self.num_preemptions, self.times
        engine._sweep()
        return engine

    def _sweep(self) -> None:
        for slot, revision in enumerate(self.slot_table.revisions):
            if revision is None:
                self._bank.clear(slot)
        for revision in [revision for revision in self._dropped if self.slot_table.find(revision) is None]:
            self._dropped.discard(revision)
            self.model.forget(revision)
            self.block_pool.forget_owner(revision)
            self._runner.forget(revision)
            self._nonfinite.pop(revision, None)
            self._faulty.discard(revision)

    def check(self, request: Request) -> None:
        """Raises InvalidRequest or AdapterError where `request` can never run; nothing is queued."""
        vocab_size, params = self.model.config.vocab_size, request.params
        named: list[tuple[str, Iterable[int]]] = [("prompt", request.prompt_ids), *(("choices", branch) for branch in request.branches)]
        for param, ids in (*named, ("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if (largest := max(ids, default=-1)) >= vocab_size:
                raise InvalidRequest(f"{param} has token id {shown(largest)}, but the vocabulary ends at {vocab_size - 1}", param=param)
        prompt, new = len(request.prompt_ids), 1 if params.max_tokens is None else params.max_tokens
        if prompt + new > self.max_model_len:
            raise ContextLengthExceeded(
                f"{prompt} prompt tokens and {shown(new)} to generate are more than the served context of {self.max_model_len}; "
                f"shorten the prompt or lower max_tokens",
                param="prompt" if prompt >= self.max_model_len else "max_tokens",
            )
        if request.branches:
            self._check_branches(request)
        if request.adapter is not None:
            self._check_adapter(request.adapter, request)

    def _check_branches(self, request: Request) -> None:
        prompt, lengths = len(request.prompt_ids), [len(branch) for branch in request.branches]
        if prompt + max(lengths) > self.max_model_len:
            raise ContextLengthExceeded(
                f"{prompt} prompt tokens and {max(lengths)} of the longest choice are more than the served context of "
                f"{self.max_model_len}; shorten the prompt or the choice",
                param="prompt" if prompt >= self.max_model_len else "choices",
            )
        total = prompt + sum(lengths)
        for name, limit in (("max_scored_tokens", self.options.max_scored_tokens), ("kv_cache_bytes", self.block_pool.max_tokens)):
            if total > limit:
                raise ContextLengthExceeded(
                    f"a prompt of {prompt} tokens and its {len(lengths)} choices are {total} tokens, which are computed in one step, but "
                    f"{name} allows {limit}; score fewer choices at a time or raise {name}",
                    param="choices",
                )

    def _check_adapter(self, revision: str, request: Request) -> None:
        if revision in self._faulty:
            raise AdapterQuarantined(
                f"adapter revision {revision[:12]} made a step fail and is out of service; the log has the details; load a mended one",
                param="adapter",
            )
        if self._nonfinite.get(revision, 0) >= QUARANTINE_AFTER:
            raise AdapterQuarantined(
                f"adapter revision {revision[:12]} gave NaN or infinity in {QUARANTINE_AFTER} requests and is out of service; "
                f"load a mended one",
                param="adapter",
            )
        if request.is_pooled and len(request.prompt_ids) > self.options.max_instance_prompt:
            raise ContextLengthExceeded(
                f"an instance-level adapter reads its prompt in one step: {len(request.prompt_ids)} tokens are more than "
                f"max_instance_prompt {self.options.max_instance_prompt}; shorten it or raise that",
                param="prompt",
            )

    def add(self, request: Request) -> Sequence:
        """Queue a request. Raises as `check`."""
        self.check(request)
        options = {} if request.rules is None else {"rules": request.rules.key.hex()}
        root = kv_root(self._base_digest, self.model.base_dtype, self.backend, request.adapter, options, request.salt)
        sequence = Sequence(request, request.given_ids, root, self._eos_token_ids)
        if request.is_collected:
            self.collected[request.request_id] = Collected()
        self.scheduler.add(sequence)
        return sequence

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def end(self, sequence: Sequence, reason: str) -> None:
        """Stop a sequence between two steps: a stop string was found, or its reader is gone. Ending twice is harmless."""
        if sequence.finish_reason is None:
            self._release(sequence, reason)

    def _release(self, sequence: Sequence, reason: str) -> None:
        sequence.finish_reason = reason
        sequence.finished_at = time.monotonic()
        if reason == "error":  # whatever was wrong with it: nobody is to meet its pages
            self.block_pool.forget(sequence.block_table)
        self.scheduler.finish(sequence)
        if self._dropped:
            self._sweep()

    def step(self) -> list[TokenEvent]:
        """Compute one batch; one event for each sequence that got a token or ended.

        An adapter that cannot be brought into its slot, or that makes the step fail, ends its own sequences with an error, and so does a
        row that cannot be computed. An exception that is nobody's fault comes out as it is, with nothing advanced: the same step can be
        tried again, or its sequences ended.
        """
        started = time.monotonic()
        if self.times is not None:
            self.times.begin(self.model)
        plan = self.scheduler.schedule()
        self.num_preemptions += len(plan.preempted)
        self.did_work = bool(plan.chunks)
        events, plan = self._upload(plan)
        if not plan.chunks:
            return events
        for sequence, _ in plan.chunks:
            sequence.scheduled_at = sequence.scheduled_at or started
        rows, tokens = len(plan.chunks), plan.num_tokens
        self._cache.zero(plan.new_blocks)
        parts, failures = self._recovery.compute(plan.chunks)
        events += [self._fail_for(failure) for failure in failures]
        plan = replace(plan, chunks=[chunk for part in parts for chunk in part.chunks])
        for part in parts:
            self._collect(part.chunks, part.output.collected_logits, part.output.collected_routing)
            for sequence, found in part.output.token_routing.items():
                sequence.num_traced += found.num_tokens
                sequence.num_evaluations += found.num_evaluations
        self.scheduler.advance(plan)
        for part in parts:
            if part.sampled is not None:
                events += self._take(part.sampled, part.output)
        for sequence, _ in plan.chunks:
            if sequence.request.params.max_tokens == 0 and not sequence.num_pending:
                events.append(self._end_scoring(sequence))
        if self.times is not None:
            self.times.end(self.model, rows, tokens)
        return events

    def _run(self, chunks: Chunks) -> StepOutput:
        if faults.active:
            requests = [sequence.request for sequence, _ in chunks]
            faults.active.strike("forward", adapter=[one.adapter for one in requests], seed=[one.params.seed for one in requests])
        output = self._runner.run(chunks)
        if faults.active:
            for row, sequence in enumerate(output.sampling):
                if faults.active.is_struck("logits", adapter=sequence.request.adapter, seed=sequence.request.params.seed):
                    with torch.inference_mode():
                        output.logits[row] = torch.nan
        return output

    def _sample(self, logits: Tensor, sequences: SequenceOf[Sequence]) -> SampledTokens:
        if faults.active:
            faults.active.strike("sample", seed=[sequence.request.params.seed for sequence in sequences])
        started = time.perf_counter()
        sampled = self._sampler.sample(logits, sequences)
        if self.times is not None:
            self.times.sampled(time.perf_counter() - started)
        return sampled

    def _is_healthy(self) -> bool:
        """Whether the base alone computes and draws a token: then what fails beside it is to blame, and not the engine."""
        blocks = self.block_pool.allocate(1)
        if blocks is None:
            return False
        probe = Sequence(Request((0,), SamplingParams(temperature=0, max_tokens=1)), [0], b"", block_table=blocks)
        try:
            self._cache.zero(blocks)
            return self._sample(self._run([(probe, 1)]).logits, [probe]).is_finite[0]
        except Exception:
            logger.exception("the base alone cannot be computed either")
            return False
        finally:
            self.block_pool.free(blocks)

    def _fail_for(self, failure: Failure) -> TokenEvent:
        self.incidents[failure.kind] += 1
        revision = failure.sequence.request.adapter
        is_held_against = failure.is_adapters and not failure.sequence.request.is_background
        if is_held_against and revision is not None and revision not in self._faulty:
            logger.error("adapter revision %s is out of service: it made a step fail", revision[:12])
            self._faulty.add(revision)
        return self._fail(failure.sequence, failure.error)

    def _end_scoring(self, sequence: Sequence) -> TokenEvent:
        collected = self.collected.get(sequence.request.request_id)
        if collected is not None and not collected.is_finite:
            return self._fail(sequence, self._overflow(sequence))
        self._release(sequence, "length")
        return TokenEvent(sequence, None, finish_reason="length", routing=_routing(sequence))

    def _upload(self, plan: SchedulerOutput) -> tuple[list[TokenEvent], SchedulerOutput]:
        """Fill the slots that the step needs; what is left of the plan when some could not be filled."""
        events: list[TokenEvent] = []
        for slot, revision in plan.uploads:
            try:
                if faults.active:
                    faults.active.strike("upload", adapter=revision)
                with self._lease(revision) as adapter:
                    self._bank.upload(slot, adapter)
            except Exception as error:
                logger.warning("adapter revision %s cannot be brought into a slot", revision[:12], exc_info=True)
                told = (
                    error if isinstance(error, MoaError) else EngineError(f"adapter revision {revision[:12]} cannot be brought into a slot")
                )
                events += [self._fail(sequence, told) for sequence, _ in plan.chunks if sequence.slot == slot]
        if not events:
            return events, plan
        left = [chunk for chunk in plan.chunks if chunk[0].finish_reason is None]
        slots = {sequence.slot for sequence, _ in left}
        return events, replace(plan, chunks=left, uploads=[upload for upload in plan.uploads if upload[0] in slots])

    def _collect(
        self,
        work: Iterable[tuple[Sequence, int]],
        logits: Iterable[tuple[Sequence, Tensor]],
        routing: Iterable[tuple[Sequence, RoutedLayers]],
    ) -> None:
        for sequence, _ in work:
            if sequence.num_computed == 0 and sequence.request.request_id in self.collected:
                self.collected[sequence.request.request_id] = Collected()  # preempted: it starts over
        for sequence, rows in logits:
            kept = self.collected[sequence.request.request_id]
            if sequence.request.branches:
                kept.is_finite = not _overflows(rows)
                kept.branch_logprobs = _branch_logprobs(rows, sequence.request.branches)
            if sequence.request.collect_logits:
                kept.logits.append(rows)
            if sequence.request.prompt_logprobs is not None:
                following = sequence.request.prompt_ids[sequence.num_computed + 1 : sequence.num_computed + 1 + len(rows)]
                wanted = [sequence.request.prompt_logprobs] * len(following)
                kept.is_finite &= not _overflows(rows)
                kept.prompt_logprobs += token_logprobs(rows[: len(following)], following, wanted)
        for sequence, layers in routing:
            self.collected[sequence.request.request_id].routing.append(layers)

    def _take(self, sampled: SampledTokens, output: StepOutput) -> list[TokenEvent]:
        now = time.monotonic()
        events = []
        for row, sequence in enumerate(output.sampling):
            if sequence.matcher is not None and sequence.matcher.error is not None:
                events.append(self._fail(sequence, sequence.matcher.error))
                continue
            if not sampled.is_finite[row]:
                is_overflow = _overflows(output.logits[row])
                events.append(self._fail(sequence, self._overflow(sequence) if is_overflow else _nothing_to_choose()))
                continue
            self.scheduler.share(sequence)
            token = sampled.ids[row]
            sequence.append(token)
            sequence.first_token_at = sequence.first_token_at or now
            reason = self._finish_reason(sequence, token)
            if reason:
                self._release(sequence, reason)
            logprob = sampled.logprobs[row] if sampled.logprobs else None
            found = output.token_routing.get(sequence)
            events.append(TokenEvent(sequence, token, logprob, reason, routing=_routing(sequence, found)))
        return events

    def _finish_reason(self, sequence: Sequence, token: int) -> str | None:
        params = sequence.request.params
        if token in sequence.stop_ids and sequence.num_generated >= params.min_tokens:
            return "stop"
        if sequence.matcher is not None and sequence.matcher.is_complete:
            return "stop"
        if len(sequence.token_ids) >= self.max_model_len or sequence.num_generated == params.max_tokens:
            return "length"
        return None

    def _fail(self, sequence: Sequence, error: MoaError) -> TokenEvent:
        """A row without a token ends its own request and nobody else's; its pages are zeroed before anyone gets them."""
        self._release(sequence, "error")
        return TokenEvent(sequence, None, finish_reason="error", error=error)

    def _overflow(self, sequence: Sequence) -> MoaError:
        """The error of a row of NaN or infinity, which counts towards its adapter's quarantine, unless a client chose the experts."""
        revision = sequence.request.adapter
        self.incidents["adapter_nonfinite" if revision else "base_nonfinite"] += 1
        if revision is None:
            return EngineError("the base gave NaN or infinity for this prompt")
        if sequence.request.rules is not None:
            return AdapterNonfiniteOutput(
                f"adapter revision {revision[:12]} gave NaN or infinity for this prompt under its routing options; leave out those that "
                f"keep experts which the adapter does not"
            )
        self._nonfinite[revision] = self._nonfinite.get(revision, 0) + 1
        return AdapterNonfiniteOutput(f"adapter revision {revision[:12]} gave NaN or infinity for this prompt; its weights overflow in use")

    def close(self) -> None:
        """Give back the KV cache and every slot; the engine is unusable afterwards. Twice is as good as once."""
        self.collected.clear()
        self.model.close()
        for part in ("_runner", "_cache", "_bank", "_sampler"):
            self.__dict__.pop(part, None)


def _routing(sequence: Sequence, step: TokenRouting | None = None) -> TokenRouting | None:
    """What goes with a sequence's event, where `step` was the last one's; None where nobody asked."""
    if not sequence.request.return_routing:
        return None
    return TokenRouting(sequence.num_traced, sequence.num_evaluations, None if step is None else step.words)


def _overflows(logits: Tensor) -> bool:
    return bool((logits.isnan() | logits.isposinf()).any())


def _branch_logprobs(rows: Tensor, branches: Iterable[tuple[int, ...]]) -> list[list[float]]:
    """Of each branch its tokens' log-probabilities. Row 0 of the logits is the prompt's last token, behind which every branch begins;
    then come the tokens of each branch but its last."""
    places, ends, row = [], [0], 0
    for first, *rest in branches:
        places += [(0, first), *((row + ahead, token) for ahead, token in enumerate(rest, 1))]
        row += len(rest)
        ends.append(len(places))
    logprobs = logprobs_at(rows, places)
    return [logprobs[start:end] for start, end in pairwise(ends)]


def _nothing_to_choose() -> MoaError:
    return InvalidRequest("logit_bias, min_tokens and stop_token_ids leave no token to choose", param="logit_bias")


def plan_memory(model: Sizes, options: EngineOptions) -> tuple[int, int]:
    """(blocks, served context in tokens) under `options` and the memory that is free now, beside the base's weights.

    Of a model that is still to be made, too: what does not fit is refused before it is allocated.

    Raises:
        InvalidRequest: the sizes that were asked for do not fit together; the message has the bytes of each part.
    """
    per_block = model.bytes_per_block(options.block_size)
    context = options.max_model_len or model.config.max_position
    if context > model.config.max_position:
        raise InvalidRequest(
            f"max_model_len {context} is more than the {model.config.max_position} tokens that the base was made for; lower it",
            param="max_model_len",
        )
    is_gpu = model.device.type == "cuda"
    if options.gpu_memory_utilization is not None and not is_gpu:
        raise InvalidRequest(
            f"gpu_memory_utilization is a share of a GPU's memory, but this engine computes on {model.device}; leave it out, or give "
            f"kv_cache_bytes",
            param="gpu_memory_utilization",
        )
    parts = {
        "max_batch_tokens": model.step_bytes(options.max_batch_tokens, context),
        "num_slots": model.slots_bytes(options.num_slots) + (0 if is_gpu else options.num_slots * SLOT_BYTES),  # the table is the host's
        "max_num_seqs": model.recorded_bytes(options.max_num_seqs, context),
    }
    free = available_bytes(model.device)
    one_context = -(-context // options.block_size)
    most = options.max_num_seqs * one_context  # more could never be used
    if options.kv_cache_bytes is not None:
        blocks = options.kv_cache_bytes // per_block
    elif is_gpu:
        room = _gpu_room(model, options, parts, free, per_block)
        blocks = min(room // per_block, most * (2 if options.prefix_cache else 1))  # half of them may be kept for who begins the same
    else:
        left = max((free - sum(parts.values())) * 3 // 4 // per_block, 1)
        blocks = min(max(free // 4 // per_block, one_context), left, most)
    parts["kv_cache_bytes"] = options.kv_cache_bytes or blocks * per_block
    if sum(parts.values()) > free:
        largest = max(parts, key=lambda name: parts[name])
        raise InvalidRequest(
            f"memory is short on {model.device}: beside the base's {sized(model.weight_bytes)} of weights {sized(free)} are free, but "
            f"{_parts_text(parts, options)}, and the KV cache {sized(parts['kv_cache_bytes'])}; lower {largest}",
            param=largest,
        )
    if blocks < 1:
        raise InvalidRequest(
            f"the KV cache has no room for a page of {options.block_size} tokens ({sized(per_block)}); raise kv_cache_bytes",
            param="kv_cache_bytes",
        )
    served = min(context, blocks * options.block_size)
    if options.max_model_len is not None and served < options.max_model_len:
        raise InvalidRequest(
            f"max_model_len {options.max_model_len} needs {sized(one_context * per_block)} of KV cache, but it has "
            f"{sized(blocks * per_block)}; lower it or raise kv_cache_bytes",
            param="max_model_len",
        )
    return blocks + 1, served  # page 0 is padding


def _gpu_room(model: Sizes, options: EngineOptions, parts: Mapping[str, int], free: int, per_block: int) -> int:
    """Bytes for the KV cache, at least a page. Raises InvalidRequest: there is no room for one."""
    total = total_bytes(model.device)
    share = GPU_MEMORY_UTILIZATION if options.gpu_memory_utilization is None else options.gpu_memory_utilization
    room = kv_cache_room(total, share, total - free, *parts.values())
    if room >= per_block:
        return room
    others = max(0, total - free - model.weight_bytes - model.beside_bytes)
    beside = f", slots and buffers {sized(model.beside_bytes)}" if model.beside_bytes else ""
    largest = max(parts, key=lambda name: parts[name])
    remedies = [f"lower {largest}"]
    if share < 1:
        remedies.append("raise gpu_memory_utilization")
    if others > parts[largest]:
        remedies.append("end who else holds the device")
    raise InvalidRequest(
        f"memory is short on {model.device}: gpu_memory_utilization {share:g} allows {sized(int(total * share))} of {sized(total)}, of "
        f"which the base's weights hold {sized(model.weight_bytes)}{beside} and all else that runs there {sized(others)}; "
        f"{_parts_text(parts, options)}, and a page of the KV cache {sized(per_block)}; {', or '.join(remedies)}",
        param=largest,
    )


def _parts_text(parts: Mapping[str, int], options: EngineOptions) -> str:
    """What there must be room for beside the KV cache."""
    slots = f", num_slots {options.num_slots} takes {sized(parts['num_slots'])}" if parts["num_slots"] else ""
    recorded = f", recorded steps of max_num_seqs {options.max_num_seqs} {sized(parts['max_num_seqs'])}" if parts["max_num_seqs"] else ""
    return f"buffers for max_batch_tokens {options.max_batch_tokens} take {sized(parts['max_batch_tokens'])}{slots}{recorded}"
