"""What becomes of a step whose computation raises: as much of it as can be had, and errors for those who are the cause.

- Memory is short: what is only kept for later is given back, and the batch computed in two halves. A half that fails again ends with 503.
- The forward raises: it is tried adapter by adapter, the base's rows one by one. Who fails while others get through is the cause, and an
  adapter that is leaves service. Where nobody gets through, a probe of the base alone decides: if that fails too, the engine is broken,
  and the exception comes out.
- Drawing tokens raises, for whatever reason: row by row, likewise.

Computing twice is harmless: keys and values are written to the same places, and nothing advances before the step is over. Owned by the
engine thread.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import accumulate, chain, groupby

from torch import Tensor

from moa_serve.engine.request import Sequence, TokenLogprob
from moa_serve.engine.runner import StepOutput
from moa_serve.engine.sampler import SampledTokens
from moa_serve.errors import EngineError, MoaError, OutOfMemory
from moa_serve.model.memory import is_out_of_memory

logger = logging.getLogger(__name__)

Chunks = list[tuple[Sequence, int]]


@dataclass(eq=False, slots=True)
class Part:
    """What was computed of a step, and what was drawn from it: None where nothing was to be drawn."""

    chunks: Chunks
    output: StepOutput
    sampled: SampledTokens | None


@dataclass(eq=False, slots=True)
class Failure:
    """A row that ends with an error. `kind` counts it; `is_adapters` says that its adapter is the cause."""

    sequence: Sequence
    error: MoaError
    kind: str
    is_adapters: bool = False


class Recovery:
    """
    Args:
        run, sample: the runner's and the sampler's.
        is_healthy: whether the base alone still computes and draws.
        trim: gives back memory that nobody needs now.
    """

    def __init__(
        self,
        run: Callable[[Chunks], StepOutput],
        sample: Callable[[Tensor, SequenceOf[Sequence]], SampledTokens],
        is_healthy: Callable[[], bool],
        trim: Callable[[], None],
    ) -> None:
        self._run, self._sample, self._is_healthy, self._trim = run, sample, is_healthy, trim

    def compute(self, chunks: Chunks) -> tuple[list[Part], list[Failure]]:
        """Every sequence of `chunks` is in one part or one failure, with as many tokens or, where memory is short, fewer.

        Raises: what the forward or the sampler raised, where it is nobody's fault but the engine's.
        """
        try:
            output = self._run(chunks)
        except Exception as error:
            if not is_out_of_memory(error):
                return self._apart(chunks, error)
            count = sum(count for _, count in chunks)
            logger.warning("memory is short for a step of %d tokens; it is computed in two", count, exc_info=True)
        else:
            return self._drawn(chunks, output)
        return self._in_halves(chunks)  # out here, for while an error is handled it keeps the tensors of the step that failed

    def _in_halves(self, chunks: Chunks) -> tuple[list[Part], list[Failure]]:
        self._trim()
        parts: list[Part] = []
        failures: list[Failure] = []
        for half in _halves(chunks):
            try:
                output = self._run(half)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failures += _short_of_memory(half)
                continue
            drawn, failed = self._drawn(half, output)
            parts, failures = parts + drawn, failures + failed
        return parts, failures

    def _apart(self, chunks: Chunks, error: Exception) -> tuple[list[Part], list[Failure]]:
        parts: list[Part] = []
        failures: list[Failure] = []
        groups = [list(group) for _, group in groupby(chunks, key=lambda chunk: id(chunk[0]) if chunk[0].slot is None else chunk[0].kind)]
        for group in groups:
            try:
                if len(groups) == 1:
                    raise error
                output = self._run(group)
            except Exception as again:
                failures += _short_of_memory(group) if is_out_of_memory(again) else [_raised(sequence) for sequence, _ in group]
                continue
            drawn, failed = self._drawn(group, output)
            parts, failures = parts + drawn, failures + failed
        if not parts and not self._is_healthy():
            raise error
        logger.error("a step failed, for %d of its %d sequences", len(failures), len(chunks), exc_info=error)
        return parts, failures

    def _drawn(self, chunks: Chunks, output: StepOutput) -> tuple[list[Part], list[Failure]]:
        if not output.sampling:
            return [Part(chunks, output, None)], []
        try:
            return [Part(chunks, output, self._sample(output.logits, output.sampling))], []
        except Exception as error:
            return self._drawn_apart(chunks, output, error)

    def _drawn_apart(self, chunks: Chunks, output: StepOutput, error: Exception) -> tuple[list[Part], list[Failure]]:
        """What a row draws does not depend on its neighbours, so the others draw what they would have drawn."""
        if is_out_of_memory(error):
            self._trim()
        rows: list[int] = []
        drawn: list[SampledTokens] = []
        failures: list[Failure] = []
        for row, sequence in enumerate(output.sampling):
            try:
                drawn.append(self._sample(output.logits[row : row + 1], [sequence]))
            except Exception as again:
                failures += _short_of_memory([(sequence, 1)]) if is_out_of_memory(again) else [_undrawn(sequence)]
                continue
            rows.append(row)
        if not rows and not self._is_healthy():
            raise error
        logger.error("drawing tokens failed, for %d of %d sequences", len(failures), len(output.sampling), exc_info=error)
        lost = {id(failure.sequence) for failure in failures}
        left = replace(
            output,
            sampling=[output.sampling[row] for row in rows],
            logits=output.logits[rows],
            collected_logits=[pair for pair in output.collected_logits if id(pair[0]) not in lost],
            collected_routing=[pair for pair in output.collected_routing if id(pair[0]) not in lost],
        )
        return [Part([chunk for chunk in chunks if id(chunk[0]) not in lost], left, _joined(drawn) if rows else None)], failures


def _halves(chunks: Chunks) -> list[Chunks]:
    """Two batches of about as many tokens. One row goes on with half of its tokens, if it may be cut: the rest is a later step's."""
    if len(chunks) == 1:
        ((sequence, count),) = chunks
        return [[(sequence, count if sequence.is_whole else max(1, count // 2))]]
    ends = list(accumulate(count for _, count in chunks))
    first = min(1 + bisect_left(ends, ends[-1] / 2), len(chunks) - 1)
    return [chunks[:first], chunks[first:]]


def _short_of_memory(chunks: Chunks) -> list[Failure]:
    message = "there is no memory for a step of this request; try again later, or send less at once"
    return [Failure(sequence, OutOfMemory(message), "out_of_memory") for sequence, _ in chunks]


def _undrawn(sequence: Sequence) -> Failure:
    message = "the server failed while it chose a token for this request; its log has the details"
    return Failure(sequence, EngineError(message), "sampler_error")


def _raised(sequence: Sequence) -> Failure:
    revision = sequence.request.adapter
    if revision is None:
        return Failure(sequence, EngineError("the server failed on this prompt; its log has the details"), "forward_error")
    if sequence.request.rules is not None:  # what a client had it do says nothing of the adapter
        message = f"adapter revision {revision[:12]} failed in a step under these routing options; the log has the details"
        return Failure(sequence, EngineError(message), "forward_error")
    message = f"adapter revision {revision[:12]} failed in a step and is out of service; the log has the details"
    return Failure(sequence, EngineError(message), "forward_error", is_adapters=True)


def _joined(drawn: list[SampledTokens]) -> SampledTokens:
    logprobs: list[TokenLogprob | None] | None = None
    if any(one.logprobs for one in drawn):
        logprobs = list(chain.from_iterable(one.logprobs or [None] for one in drawn))
    ids, finite = chain.from_iterable(one.ids for one in drawn), chain.from_iterable(one.is_finite for one in drawn)
    return SampledTokens(list(ids), logprobs, list(finite))
