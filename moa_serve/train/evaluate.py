"""Scoring adapters on data files, through the engine that serves: every question under every adapter, all of them in one mixed batch.

An adapter may be asked in other ways beside its own (`variations`), in the same batch. One call of the engine for each task and scorer, so
that speed and routing can be told for each. An adapter that overflows loses its own questions and nobody else's. What is written from this
stands in shell/evaluate.py.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moa_serve.engine.request import SamplingParams
from moa_serve.errors import AdapterQuarantined, DataInvalid, InvalidRequest, MoaError
from moa_serve.llm import LLM, ChoiceScore
from moa_serve.model.counters import RoutingTotals
from moa_serve.text import Tokenizer
from moa_serve.train.data import Example
from moa_serve.train.prompts import encode, encode_prompt, encode_response
from moa_serve.train.scoring import (
    Estimate,
    Scorer,
    Task,
    Verdict,
    chance,
    estimate,
    judge_likelihood,
    judge_text,
    majority,
    paired_difference,
    rows_by_scorer,
)
from moa_serve.train.variations import Variation

MAX_TOKENS = {"choice": 40}  # the authors' max_gen
LONG_MAX_TOKENS = 200  # theirs for mathematics; we take it for texts too

Progress = Callable[[str, int], None]  # (what is going on, how many of all pairs have ended)


@dataclass(frozen=True, slots=True)
class Usage:
    """What the routers of one adapter selected, in the mean over tokens and over the layers that have experts.

    Args:
        computed_per_token: experts whose evaluation was not skipped; at least those selected. A backend may compute more: an expert of all
            tokens of a tile that one of them selected, or every one.
    """

    experts_per_token: float
    num_experts: float
    computed_per_token: float

    @property
    def not_selected(self) -> float:
        return 1 - self.experts_per_token / self.num_experts

    @property
    def not_computed(self) -> float:
        return 1 - self.computed_per_token / self.num_experts


@dataclass(frozen=True, slots=True)
class Score:
    """One adapter on one task by one scorer.

    Args:
        adapter: its name; None is the base.
        verdicts: one for each row of the `Round`.
        score: share of right answers, or nats per token; None where all rows of a loss ended in an error.
        against_base: the difference to the base on the same rows; None for the base itself, and where the base did not run.
        num_tokens: computed for it, prompts and answers.
        usage: None for what has no routers.
        variation: how its routers were asked; None is its own way.
        against_own: the difference of a variation to the adapter's own way on the same rows.
    """

    adapter: str | None
    verdicts: tuple[Verdict, ...]
    score: Estimate | None
    against_base: Estimate | None
    num_tokens: int
    usage: Usage | None
    variation: Variation | None = None
    against_own: Estimate | None = None

    @property
    def num_unanswered(self) -> int:
        return sum(not verdict.is_answered for verdict in self.verdicts)

    @property
    def errors(self) -> list[str]:
        return [verdict.error for verdict in self.verdicts if verdict.error is not None]

    @property
    def per_byte(self) -> Estimate | None:
        """Of choices compared by their likelihood divided by their bytes."""
        if all(verdict.per_byte is None for verdict in self.verdicts):
            return None
        return estimate([float(bool(verdict.per_byte)) for verdict in self.verdicts], [1.0] * len(self.verdicts))


@dataclass(frozen=True, slots=True)
class Round:
    """All adapters on one task by one scorer: one call of the engine.

    Args:
        rows: that were scored in this way.
        chance, majority: shares of right answers of a blind guess, and of always the same place; None where that says nothing.
        seconds: of the whole mixed batch.
    """

    task: Task
    scorer: Scorer
    rows: tuple[Example, ...]
    chance: float | None
    majority: float | None
    scores: tuple[Score, ...]
    seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(score.num_tokens for score in self.scores)

    @property
    def tokens_per_second(self) -> float:
        """Of all adapters together, prompts included."""
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True, eq=False)
class _Line:
    """What is scored: an adapter in its own way, or in another."""

    adapter: str | None
    variation: Variation | None = None

    @property
    def moa(self) -> Mapping[str, Any] | None:
        return None if self.variation is None else self.variation.moa


@dataclass(frozen=True, slots=True)
class _Pair:
    """A question under an adapter."""

    example: Example
    line: _Line

    @property
    def adapter(self) -> str | None:
        return self.line.adapter


@dataclass(frozen=True, slots=True)
class _Outcome:
    verdict: Verdict
    num_tokens: int = 0


class Evaluation:
    """
    Args:
        llm: its base has a tokenizer, and the adapters are loaded.
        adapters: names; None is the base.
        scorer: one of `scoring.WANTED`.
        max_tokens: to generate; None for 40 where a choice is to be named, else 200.
        variations: by adapter, how its routers are asked beside its own way.
    Raises:
        InvalidRequest: the base has no tokenizer.
        DataInvalid: a task has nothing that can be scored like this, or a row does not fit into the served context.
    """

    def __init__(
        self,
        llm: LLM,
        tasks: Sequence[Task],
        adapters: Sequence[str | None],
        *,
        scorer: str = "auto",
        max_tokens: int | None = None,
        variations: Mapping[str | None, Sequence[Variation]] | None = None,
    ) -> None:
        self._llm, self._adapters, self._max_tokens = llm, tuple(adapters), max_tokens
        others = variations or {}
        self._lines = [_Line(adapter, one) for adapter in self._adapters for one in (None, *others.get(adapter, ()))]
        self._tokenizer = _tokenizer_of(llm)
        self._plan = [(task, by, rows) for task in tasks for by, rows in rows_by_scorer(task, scorer).items()]
        self._num_done = 0

    @property
    def num_pairs(self) -> int:
        """Questions under adapters, in all."""
        return sum(len(rows) for _, _, rows in self._plan) * len(self._lines)

    def run(self, progress: Progress = lambda what, done: None) -> Iterator[Round]:
        """One round after the other."""
        self._num_done = 0
        for task, scorer, rows in self._plan:
            yield self._round(task, scorer, rows, progress)

    def _round(self, task: Task, scorer: Scorer, rows: list[Example], progress: Progress) -> Round:
        # By adapter, so that a step's tokens are in few segments and no slot is filled twice: 1.15 times the tokens/s of asking each
        # question under all adapters in turn (base, Soft, Sparse, LoRA; 24 ARC-Easy questions, bfloat16, one thread, 2026-11-26).
        pairs = [_Pair(example, line) for line in self._lines for example in rows]
        ask = {"generation": self._generate, "likelihood": self._compare, "loss": self._lose}[scorer]
        what, done = f"{task.name}, {scorer}", self._num_done
        progress(what, done)
        before = self._totals()
        start = time.perf_counter()
        outcomes = self._asked(ask, pairs, lambda finished: progress(what, done + finished))
        seconds = time.perf_counter() - start
        self._num_done += len(pairs)
        progress(what, self._num_done)
        after = self._totals()
        by_line = [outcomes[i * len(rows) : (i + 1) * len(rows)] for i in range(len(self._lines))]
        own = {line.adapter: found for line, found in zip(self._lines, by_line, strict=True) if line.variation is None}
        usages = map(_usage, before, after)
        is_guessable = scorer == "likelihood" or all(example.labels for example in rows)
        return Round(
            task,
            scorer,
            tuple(rows),
            chance(rows) if is_guessable else None,
            majority(rows) if is_guessable else None,
            tuple(_score(*each, own) for each in zip(self._lines, by_line, usages, strict=True)),
            seconds,
        )

    def _totals(self) -> list[RoutingTotals | None]:
        """Of each line."""
        return [None if line.adapter is None else self._llm.routing_totals(line.adapter, line.moa) for line in self._lines]

    # -- asking the engine

    def _asked(self, ask: "_Ask", pairs: Sequence[_Pair], on_finished: Callable[[int], None]) -> list[_Outcome]:
        """All pairs in one batch. An adapter that is out of service, because too many of its answers overflowed, fails all of its own."""
        try:
            return ask(pairs, on_finished)
        except AdapterQuarantined as error:
            if len({pair.adapter for pair in pairs}) == 1:
                return [_failed(error, is_loss=ask == self._lose)] * len(pairs)
        outcomes: dict[int, _Outcome] = {}
        for adapter in self._adapters:
            own = [index for index, pair in enumerate(pairs) if pair.adapter == adapter]
            outcomes |= zip(own, self._asked(ask, [pairs[index] for index in own], lambda finished: None), strict=True)
            on_finished(len(outcomes))
        return [outcomes[index] for index in range(len(pairs))]

    def _generate(self, pairs: Sequence[_Pair], on_finished: Callable[[int], None]) -> list[_Outcome]:
        prompts, params = [], []
        for pair in pairs:
            prompts.append(encode_prompt(pair.example, self._tokenizer))
            limit = self._max_tokens or MAX_TOKENS.get(pair.example.kind, LONG_MAX_TOKENS)
            params.append(SamplingParams(max_tokens=limit, temperature=0))
            self._check_fits(pair.example, len(prompts[-1]), limit)
        adapters, moa = _asked_for(pairs)
        completions = self._llm.generate(prompts, params, adapter=adapters, moa=moa, on_finished=on_finished)
        outcomes = []
        for pair, completion in zip(pairs, completions, strict=True):
            if completion.error is not None:
                outcomes.append(_failed(completion.error))
                continue
            count = len(completion.prompt_token_ids) + len(completion.token_ids)
            outcomes.append(_Outcome(judge_text(pair.example, completion.text), count))
        return outcomes

    def _compare(self, pairs: Sequence[_Pair], on_finished: Callable[[int], None]) -> list[_Outcome]:
        prompts = [encode_prompt(pair.example, self._tokenizer) for pair in pairs]
        choices = [[encode_response(choice, self._tokenizer) for choice in pair.example.choices] for pair in pairs]
        for pair, prompt, ends in zip(pairs, prompts, choices, strict=True):
            self._check_fits(pair.example, len(prompt), max(map(len, ends)))
        return [
            _failed(found)
            if isinstance(found, MoaError)
            else _Outcome(judge_likelihood(pair.example, [one.logprob for one in found]), len(prompt) + sum(map(len, ends)))
            for pair, prompt, ends, found in zip(pairs, prompts, choices, self._scores(pairs, prompts, choices, on_finished), strict=True)
        ]

    def _lose(self, pairs: Sequence[_Pair], on_finished: Callable[[int], None]) -> list[_Outcome]:
        """The loss as in training: of the response and its end, in a chat of every turn of the assistant."""
        prompts, endings, targets = [], [], []
        limit, end = self._llm.max_model_len, next(iter(self._llm.config.eos_token_ids), None)
        for pair in pairs:
            encoded = encode(pair.example, self._tokenizer, max_length=limit, eos_token_id=end)
            if encoded is None:
                raise DataInvalid(f"{pair.example.where}: is longer than the served context of {limit} tokens; leave it out", param="data")
            first = encoded.is_target.index(True)
            prompts.append(encoded.token_ids[:first])
            endings.append([encoded.token_ids[first:]])
            targets.append(encoded.is_target[first:])
        outcomes = []
        for prompt, found, is_target in zip(prompts, self._scores(pairs, prompts, endings, on_finished), targets, strict=True):
            if isinstance(found, MoaError):
                outcomes.append(_failed(found, is_loss=True))
                continue
            nats = -sum(logprob for logprob, counts in zip(found[0].token_logprobs, is_target, strict=True) if counts)
            outcomes.append(_Outcome(Verdict(nats, sum(is_target)), len(prompt) + len(is_target)))
        return outcomes

    def _scores(
        self, pairs: Sequence[_Pair], prompts: list[list[int]], choices: list[list[list[int]]], on_finished: Callable[[int], None]
    ) -> list[list[ChoiceScore] | MoaError]:
        """What each pair's choices are worth, or the error that its prompt ended with."""
        errors: dict[int, MoaError] = {}
        adapters, moa = _asked_for(pairs)
        scores = self._llm.score_choices(prompts, choices, adapter=adapters, moa=moa, on_finished=on_finished, on_error=errors.__setitem__)
        return [errors.get(index, found) for index, found in enumerate(scores)]

    def _check_fits(self, example: Example, prompt: int, answer: int) -> None:
        if prompt + answer > self._llm.max_model_len:
            raise DataInvalid(
                f"{example.where}: {prompt} tokens of prompt and {answer} of answer are more than the served context of "
                f"{self._llm.max_model_len}; lower --max-tokens, or leave the row out",
                param="data",
            )


_Ask = Callable[[Sequence[_Pair], Callable[[int], None]], list[_Outcome]]


def _asked_for(pairs: Sequence[_Pair]) -> tuple[list[str | None], list[Mapping[str, Any] | None]]:
    return [pair.adapter for pair in pairs], [pair.line.moa for pair in pairs]


def _score(line: _Line, outcomes: Sequence[_Outcome], usage: Usage | None, own: Mapping[str | None, Sequence[_Outcome]]) -> Score:
    """`own`: what every adapter did in its own way."""
    verdicts = [outcome.verdict for outcome in outcomes]

    def against(other: str | None, is_wanted: bool) -> Estimate | None:
        return paired_difference(verdicts, [outcome.verdict for outcome in own[other]]) if is_wanted else None

    return Score(
        line.adapter,
        tuple(verdicts),
        estimate([verdict.value for verdict in verdicts], [verdict.weight for verdict in verdicts]),
        against(None, line.adapter is not None and None in own),
        sum(outcome.num_tokens for outcome in outcomes),
        usage,
        line.variation,
        against(line.adapter, line.variation is not None),
    )


def _tokenizer_of(llm: LLM) -> Tokenizer:
    if llm.tokenizer is None:
        raise InvalidRequest(f"the base {llm.name} has no tokenizer, so it cannot read questions; add its tokenizer.json", param="model")
    return llm.tokenizer


def _failed(error: MoaError, *, is_loss: bool = False) -> _Outcome:
    return _Outcome(Verdict(0.0, weight=0 if is_loss else 1, is_answered=False, error=str(error)))


def _usage(before: RoutingTotals | None, after: RoutingTotals | None) -> Usage | None:
    """What was selected between two snapshots."""
    if after is None or not after.experts:
        return None
    tokens = after.tokens - (before.tokens if before else 0)
    layers = [len(names) for names in after.experts if names]
    if tokens <= 0 or not layers:
        return None
    selected, computed = after.selected.sum(), after.computed.sum()
    if before is not None:
        selected, computed = selected - before.selected.sum(), computed - before.computed.sum()
    per = tokens * len(layers)
    return Usage(float(selected) / per, sum(layers) / len(layers), float(computed) / per)
