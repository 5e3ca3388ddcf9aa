"""From logits to tokens: a whole batch at once, every row as if it were alone.

The order, for each row that asks for it: log-probabilities of the raw logits; ids masked that its guide does not allow; logit_bias; ids
masked that stop before min_tokens; repetition, presence and frequency penalties; temperature; top_k, top_p, min_p; one draw. Rows are
grouped by what they need, so a row without a feature does not pay for it and a greedy batch is one maximum.

A row's token depends on its logits, its parameters, its seed and the number of tokens that it generated, on nothing else:
the uniform number of a draw is a hash of (seed, number), and probabilities are added as whole numbers, whose sum is the
same in every order. Sums of floats are not: their last digit changes with the number of rows and threads, and with it,
now and then, the token.

Owned by the engine thread; all it remembers is `Sequence.sampler_state`.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moa_serve.engine.guide import TokenBits
from moa_serve.engine.request import Sequence, TokenLogprob
from moa_serve.model.ops import on_device

MIN_LOGPROB = -9999.0
"""JSON has no -inf."""

_ONE = 2**40
"""The best token's weight. Below 2**-40 of it a token is never drawn; 2**20 tokens still add up within 63 bits."""

_NUCLEUS_SIZES = (256, 4096)
"""Best tokens among which a nucleus (top_p) is looked for before all are sorted. V 49152, one thread: 0.3, 0.7, 3.4 ms a row."""

_ROWS = 8
"""Rows to draw at a time on a CPU: what they need in between stays in the cache. 32 plain rows, V 49152, one thread: 9.5 ms against
14.8 ms all at once (2026-11-22). On another device a call costs more than its rows."""

_SCORED_ROWS = 64
"""Rows to sum at a time where only single log-probabilities are wanted: whole-number weights are twice the size of the logits."""

_GAMMA = 0x9E3779B97F4A7C15

_BARS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf).astype(np.float32)
"""(256, 8) what each byte of a mask adds to eight logits. V 49152: 25 us a row, a tenth of `torch.where` with a boolean (2026-11-27)."""

Ids = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One token for each row.

    Args:
        ids: always valid token ids.
        logprobs: None where no row asks for any; else one for each row that does and is finite.
        is_finite: False where a row has nothing to choose from: a NaN, +inf, or no finite logit at all. Its id means nothing.
    """

    ids: list[int]
    logprobs: list[TokenLogprob | None] | None
    is_finite: list[bool]


class Sampler:
    """
    Args:
        vocab_size: V of the logits; every token id in the sequences and their parameters is below it.
        device: where the logits are.
    """

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)

    def sample(self, logits: Tensor, sequences: SequenceOf[Sequence]) -> SampledTokens:
        """Choose the next token of each sequence.

        Args:
            logits: (N, V), any float dtype; not changed.
            sequences: N of them, in the order of the rows.
        """
        with torch.inference_mode():
            raw = logits.float()
            edited = [row for row, sequence in enumerate(sequences) if _is_edited(sequence)]
            if len(edited) == len(sequences):
                ids, is_finite = self._choose(self._edit(raw, edited, sequences), sequences)
            else:
                ids, is_finite = self._choose(raw, sequences, skip=frozenset(edited))
                if edited:
                    own, rows = [sequences[row] for row in edited], self._rows(edited)
                    ids[rows], is_finite[rows] = self._choose(self._edit(raw, edited, own), own)
            chosen, finite = torch.stack((ids, is_finite.long())).tolist()  # one wait for the device, not two
            finite = [bool(one) for one in finite]
            return SampledTokens(chosen, self._logprobs(raw, chosen, finite, sequences), finite)

    def _choose(self, logits: Tensor, sequences: SequenceOf[Sequence], skip: frozenset[int] = frozenset()) -> tuple[Tensor, Tensor]:
        """Ids (N,) and is_finite (N,); rows in `skip` get their best token, whatever they ask for."""
        peak, ids = logits.max(-1)  # NaN counts as the greatest, so a finite maximum means a row without NaN and +inf
        groups: dict[str, list[int]] = {}
        for row, sequence in enumerate(sequences):
            if row not in skip and not sequence.request.params.is_greedy:
                groups.setdefault(self._kind(sequence), []).append(row)
        at_once = _ROWS if self._device.type == "cpu" else len(sequences)
        for kind, rows in groups.items():
            for start in range(0, len(rows), at_once):
                own = [sequences[row] for row in rows[start : start + at_once]]
                piece = self._rows(rows[start : start + at_once])
                ids[piece] = self._draw(kind, logits[piece], peak[piece], own)
        return ids, peak.isfinite()

    def _draw(self, kind: str, logits: Tensor, peak: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
        temperature, min_p = self._params(sequences, "temperature").float(), self._params(sequences, "min_p")
        draw = _Draw(logits, peak, temperature, min_p, self._uniform(sequences))
        if kind == "top_k":
            return draw.from_top_k([sequence.request.params.top_k for sequence in sequences], self._params(sequences, "top_p"))
        if kind == "top_p":
            return draw.from_nucleus(self._params(sequences, "top_p"))
        return draw.from_all(has_min_p=kind == "min_p")

    def _kind(self, sequence: Sequence) -> str:
        params = sequence.request.params
        if 0 < params.top_k < self._vocab_size:
            return "top_k"
        if params.top_p < 1:
            return "top_p"
        return "min_p" if params.min_p > 0 else "all"

    def _params(self, sequences: SequenceOf[Sequence], name: str) -> Tensor:
        """(N, 1) float64 of one field."""
        values = np.array([[getattr(sequence.request.params, name)] for sequence in sequences], dtype=np.float64)
        return on_device(values, self._device)

    def _rows(self, rows: list[int]) -> Tensor:
        return on_device(np.array(rows, dtype=np.int64), self._device)

    def _uniform(self, sequences: SequenceOf[Sequence]) -> Tensor:
        """(N, 1) float64 in [0, 1)."""
        return on_device(uniform([s.seed for s in sequences], [s.num_generated for s in sequences]), self._device)[:, None]

    def _edit(self, raw: Tensor, rows: list[int], sequences: SequenceOf[Sequence]) -> Tensor:
        """Some rows of `raw`, copied, with bias, masks and penalties. Only tokens concerned are touched; what is not finite stays so."""
        states = [_state(sequence) for sequence in sequences]
        logits = self._barred(raw, rows, sequences, states)
        flat = logits.view(-1)
        biased = self._index([state.bias_ids for state in states])
        if len(biased):
            flat[biased] += self._flat([state.bias for state in states])
        is_early = [sequence.matcher is None and _is_early(sequence) for sequence in sequences]
        if any(is_early):
            flat[self._index([state.stop_ids if early else _NO_IDS for state, early in zip(states, is_early, strict=True)])] += -torch.inf
        if any(state.counts for state in states):
            self._penalise(flat, sequences, [state.counts for state in states])
        return logits

    def _barred(self, raw: Tensor, rows: list[int], sequences: SequenceOf[Sequence], states: "list[_State]") -> Tensor:
        """A copy of the rows, with -inf where a sequence's guide does not allow a token. First of all, since nothing moves an -inf."""
        guided = [row for row, sequence in enumerate(sequences) if sequence.matcher is not None]
        if not guided:
            return raw[self._rows(rows)]
        allowed = np.stack([_allowed(sequences[row], states[row].stop_ids) for row in guided])
        bars = _BARS.take(allowed, axis=0).reshape(len(guided), -1)[:, : self._vocab_size]
        if self._device.type != "cpu":
            return raw[self._rows(rows)].index_add_(0, self._rows(guided), on_device(bars, self._device))
        # numpy adds in this thread. Torch wakes others for 32,768 numbers, and waits for them 5 ms where cores are busy (2026-11-27).
        own = raw.numpy()[rows]
        with np.errstate(invalid="ignore"):  # +inf becomes NaN: it is not finite either way
            own[slice(None) if len(guided) == len(rows) else guided] += bars
        return torch.from_numpy(own)

    def _penalise(self, flat: Tensor, sequences: SequenceOf[Sequence], counts: "list[_TokenCounts | None]") -> None:
        """l -> l / r if l > 0 else l * r for tokens of prompt and completion; then l - presence * [n > 0] - frequency * n.

        n is how often the token was generated. Source: repetition, arXiv:1909.05858 section 4.1 (negative logits as in
        transformers); presence and frequency, OpenAI's API reference.
        """
        seen = [_NO_IDS if count is None else count.ids for count in counts]
        sizes = [len(ids) for ids in seen]

        def per_token(name: str) -> Tensor:
            values = np.array([getattr(sequence.request.params, name) for sequence in sequences], dtype=np.float32)
            return self._flat([np.repeat(values, sizes)])

        index, times = self._index(seen), self._flat([_NO_NUMBERS if count is None else count.times for count in counts])
        value, repetition = flat[index], per_token("repetition_penalty")
        value = torch.where(value > 0, value / repetition, value * repetition)
        flat[index] = value - per_token("presence_penalty") * (times > 0) - per_token("frequency_penalty") * times

    def _index(self, ids: list[Ids]) -> Tensor:
        """Positions in the flat (N * V) logits of row 0's ids, row 1's ids, ..."""
        rows = np.repeat(np.arange(len(ids)) * self._vocab_size, [len(row) for row in ids])
        return on_device(rows + np.concatenate(ids), self._device)

    def _flat(self, numbers: list[Numbers]) -> Tensor:
        return on_device(np.concatenate(numbers), self._device)

    def _logprobs(
        self, raw: Tensor, ids: list[int], is_finite: list[bool], sequences: SequenceOf[Sequence]
    ) -> list[TokenLogprob | None] | None:
        wanted = {row: n for row, s in enumerate(sequences) if (n := s.request.params.logprobs) is not None}
        if not wanted:
            return None
        result: list[TokenLogprob | None] = [None] * len(sequences)
        rows = [row for row in wanted if is_finite[row]]
        if rows:
            found = token_logprobs(raw[self._rows(rows)], [ids[row] for row in rows], [wanted[row] for row in rows])
            for row, logprob in zip(rows, found, strict=True):
                result[row] = logprob
        return result


def token_logprobs(logits: Tensor, ids: SequenceOf[int], num_top: SequenceOf[int]) -> list[TokenLogprob]:
    """Log-probabilities of one token a row, and of the best ones: for chosen tokens, and for those of an echoed prompt.

    Args:
        logits: (N, V), finite or -inf, at least one finite in a row.
        ids: N token ids.
        num_top: how many best tokens to report in each row.
    """
    if not ids:
        return []
    with torch.inference_mode():
        logits = logits.float()
        chosen = torch.tensor(ids, device=logits.device)[:, None]
        own = logits.gather(-1, chosen)  # (N, 1)
        best = _best(logits, min(max(num_top), logits.shape[-1]))  # (N, n)
        logprob = (torch.cat((own, logits.gather(-1, best)), dim=-1) - _log_sum(logits)).clamp(min=MIN_LOGPROB)
        rank = (logits > own).sum(-1) + 1
        rows = zip(ids, logprob.tolist(), rank.tolist(), best.tolist(), num_top, strict=True)
        return [TokenLogprob(i, values[0], r, tuple(zip(top[:n], values[1 : n + 1], strict=True))) for i, values, r, top, n in rows]


def logprobs_at(logits: Tensor, places: SequenceOf[tuple[int, int]]) -> list[float]:
    """Log-probability of token id j in row i of `logits` (N, V), for each place (i, j); a row may be asked about many tokens."""
    with torch.inference_mode():
        pieces = (logits[start : start + _SCORED_ROWS].float() for start in range(0, len(logits), _SCORED_ROWS))
        log_sums = torch.cat([_log_sum(rows) for rows in pieces])[:, 0]
        row, token = torch.tensor(places, device=logits.device).unbind(-1)
        logprobs: list[float] = (logits[row, token] - log_sums[row]).clamp(min=MIN_LOGPROB).tolist()
        return logprobs


def _log_sum(logits: Tensor) -> Tensor:
    """(N, 1) float64: logarithm of the sum of exponentials, which is the same whatever the order."""
    peak = logits.amax(-1, keepdim=True)
    total = _weights(logits, peak, 1.0).sum(-1, keepdim=True)
    return peak + (total.double() / _ONE).log()


def uniform(seeds: SequenceOf[int], counters: SequenceOf[int]) -> npt.NDArray[np.float64]:
    """(N,) numbers in [0, 1), each a hash of its seed (modulo 2**64) and counter: nothing to keep, nothing to put back.

    Source: splitmix64 (Steele, Lea, Flood, OOPSLA 2014); the seed is mixed once before, so that near seeds are far apart.
    """
    state = _mix(np.array([seed % 2**64 for seed in seeds], dtype=np.uint64) + np.uint64(_GAMMA))
    bits = _mix(state + (np.array(counters, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GAMMA))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class _Draw:
    """One draw for each of N rows: inverse of the cumulative distribution, in whole numbers.

    Args:
        logits: (N, V) float32.
        peak: (N,) their maxima.
        temperature: (N, 1) float32.
        min_p, uniform: (N, 1) float64.
    """

    logits: Tensor
    peak: Tensor
    temperature: Tensor
    min_p: Tensor
    uniform: Tensor

    def from_all(self, *, has_min_p: bool) -> Tensor:
        """(N,) ids; tokens in the order of their ids."""
        weights = self._weights(self.logits)
        if has_min_p:
            weights = torch.where(weights >= self.min_p * _ONE, weights, 0)
        cumulative = weights.cumsum(-1)
        return self._invert(cumulative, cumulative[:, -1:])

    def from_top_k(self, top_k: list[int], top_p: Tensor) -> Tensor:
        """(N,) ids; tokens from the best down, of which each row's first `top_k` count."""
        candidates = _best(self.logits, max(top_k))  # (N, K)
        place = torch.arange(candidates.shape[-1], device=candidates.device)
        is_kept = place < on_device(np.array(top_k), candidates.device)[:, None]
        weights = torch.where(is_kept, self._weights(self.logits.gather(-1, candidates)), 0)
        return self._from_best(candidates, weights, weights.sum(-1, keepdim=True), top_p)

    def from_nucleus(self, top_p: Tensor) -> Tensor:
        """(N,) ids; tokens from the best down. Few candidates are tried first; more never change the result."""
        total = self._weights(self.logits).sum(-1, keepdim=True)
        for count in (*_NUCLEUS_SIZES, self.logits.shape[-1]):
            candidates = _best(self.logits, min(count, self.logits.shape[-1]))
            weights = self._weights(self.logits.gather(-1, candidates))
            if (weights.sum(-1, keepdim=True) >= top_p * total).all():
                break
        return self._from_best(candidates, weights, total, top_p)

    def _from_best(self, candidates: Tensor, weights: Tensor, total: Tensor, top_p: Tensor) -> Tensor:
        """Keep a candidate while those before it have less than top_p of `total` (N, 1): never none. Then min_p, then draw."""
        before = weights.cumsum(-1) - weights
        is_kept = (before < top_p * total) & (weights >= self.min_p * _ONE)
        cumulative = torch.where(is_kept, weights, 0).cumsum(-1)
        return candidates.gather(-1, self._invert(cumulative, cumulative[:, -1:])[:, None])[:, 0]

    def _invert(self, cumulative: Tensor, total: Tensor) -> Tensor:
        """First position in each row of (N, n) whose cumulative weight is above uniform * total."""
        target = (self.uniform * total).long().clamp(max=total - 1)
        position = torch.searchsorted(cumulative, target, right=True)[:, 0]
        return position.clamp(max=cumulative.shape[-1] - 1)  # a NaN in the row: any valid position will do

    def _weights(self, logits: Tensor) -> Tensor:
        return _weights(logits, self.peak[:, None], self.temperature)


def _weights(logits: Tensor, peak: Tensor, temperature: Tensor | float) -> Tensor:
    """(N, n) int64: exp((l - peak) / temperature) in units of 1 / _ONE, rounded down.

    The peak goes first: then the smallest temperature gives exp(-inf) = 0 and never exp(+inf).
    """
    weights = logits - peak
    weights.div_(temperature).exp_().mul_(_ONE)  # in place: at a large V, new memory costs more than the arithmetic
    return weights.long()


def _best(logits: Tensor, count: int) -> Tensor:
    """(N, count) ids of the best logits, best first, the lower id of equals.

    topk leaves the order of equals open, and bfloat16 logits often are equal. So it works on whole numbers that never are:
    the float's bits, made to sort as the float does, above the id.
    """
    if not count:
        return torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    last = logits.shape[-1] - 1
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 makes -0.0 the equal of 0.0 that it is
    bits ^= (bits >> 31) & 0x7FFFFFFF  # a negative float's bits grow as it falls: turn them round, all but the sign
    keys = bits.long()
    keys <<= 32
    keys |= torch.arange(last, -1, -1, device=logits.device)
    # From about a quarter of V on, sorting everything is the faster way.
    best = keys.sort(dim=-1, descending=True).values[:, :count] if count > last // 4 else keys.topk(count, dim=-1).values
    return last - (best & 0xFFFFFFFF)


_NO_IDS: Ids = np.empty(0, dtype=np.int64)
_NO_NUMBERS: Numbers = np.empty(0, dtype=np.float32)


def _is_edited(sequence: Sequence) -> bool:
    params = sequence.request.params
    return bool(params.logit_bias) or params.has_penalties or _is_early(sequence) or sequence.matcher is not None


def _is_early(sequence: Sequence) -> bool:
    return sequence.num_generated < sequence.request.params.min_tokens


def _allowed(sequence: Sequence, stop_ids: Ids) -> TokenBits:
    """What a sequence's guide allows, without what it must not end with where there is a choice."""
    assert sequence.matcher is not None
    is_early = _is_early(sequence)
    unwanted = stop_ids.tolist() if is_early else []
    return sequence.matcher.allowed(without=unwanted, may_end=not (is_early or sequence.request.params.ignore_eos))


@dataclass(slots=True)
class _State:
    """What the sampler keeps with a sequence that edits its logits; the arrays are made once."""

    bias_ids: Ids
    bias: Numbers
    stop_ids: Ids
    counts: "_TokenCounts | None"


def _state(sequence: Sequence) -> _State:
    state = sequence.sampler_state
    if not isinstance(state, _State):
        params = sequence.request.params
        state = sequence.sampler_state = _State(
            bias_ids=np.array(list(params.logit_bias), dtype=np.int64),
            bias=np.array(list(params.logit_bias.values()), dtype=np.float32),
            stop_ids=np.array(sorted(sequence.stop_ids), dtype=np.int64),
            counts=_TokenCounts(sequence.request.prompt_ids) if params.has_penalties else None,
        )
    if state.counts is not None:
        state.counts.update(sequence)
    return state


class _TokenCounts:
    """The distinct tokens of a sequence and how often each was generated; a step costs what the step added."""

    def __init__(self, prompt_ids: SequenceOf[int]) -> None:
        self._ids: Ids = np.unique(np.array(prompt_ids, dtype=np.int64))
        self._times: Numbers = np.zeros(len(self._ids), dtype=np.float32)
        self._place = {token: place for place, token in enumerate(self._ids.tolist())}
        self._num_counted = 0

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._place)]

    @property
    def times(self) -> Numbers:
        return self._times[: len(self._place)]

    def update(self, sequence: Sequence) -> None:
        """Count what was generated since the last time. Tokens are only ever added, so preemption changes nothing."""
        for token in sequence.token_ids[sequence.num_prompt + self._num_counted :]:
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._ids):  # full: double it, so that growing costs a constant for each token
                room = np.zeros(max(64, place), dtype=np.int64)
                self._ids, self._times = np.concatenate((self._ids, room)), np.concatenate((self._times, room.astype(np.float32)))
            self._ids[place] = token
            self._times[place] += 1
            self._num_counted += 1
