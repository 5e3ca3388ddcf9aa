"""Scoring adapters on data files, through the engine that serves: every question under every adapter, all of them in one mixed batch.

One call of the engine for each task and scorer, so that speed and routing can be told for each. An adapter that overflows loses its own
questions and nobody else's. What is written from this stands in shell/evaluate.py.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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

MAX_TOKENS = {"choice": 40}  # the authors' max_gen
LONG_MAX_TOKENS = 200  # theirs for mathematics; we take it for texts too

Progress = Callable[[str, int], None]  # (what is going on, how many of all pairs have ended)


@dataclass(frozen=True, slots=True)
class Usage:
    """What the routers of one adapter selected, in the mean over tokens and over the layers that have experts."""

    experts_per_token: float
    num_experts: float

    @property
    def not_selected(self) -> float:
        return 1 - self.experts_per_token / self.num_experts


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
    """

    adapter: str | None
    verdicts: tuple[Verdict, ...]
    score: Estimate | None
    against_base: Estimate | None
    num_tokens: int
    usage: Usage | None

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


@dataclass(frozen=True, slots=True)
class _Pair:
    """A question under an adapter."""

    example: Example
    adapter: str | None


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
    Raises:
        InvalidRequest: the base has no tokenizer.
        DataInvalid: a task has nothing that can be scored like this, or a row does not fit into the served context.
    """

    def __init__(
        self, llm: LLM, tasks: Sequence[Task], adapters: Sequence[str | None], *, scorer: str = "auto", max_tokens: int | None = None
    ) -> None:
        self._llm, self._adapters, self._max_tokens = llm, tuple(adapters), max_tokens
        self._tokenizer = _tokenizer_of(llm)
        self._plan = [(task, by, rows) for task in tasks for by, rows in rows_by_scorer(task, scorer).items()]
        self._num_done = 0

    @property
    def num_pairs(self) -> int:
        """Questions under adapters, in all."""
        return sum(len(rows) for _, _, rows in self._plan) * len(self._adapters)

    def run(self, progress: Progress = lambda what, done: None) -> Iterator[Round]:
        """One round after the other."""
        self._num_done = 0
        for task, scorer, rows in self._plan:
            yield self._round(task, scorer, rows, progress)

    def _round(self, task: Task, scorer: Scorer, rows: list[Example], progress: Progress) -> Round:
        # By adapter, so that a step's tokens are in few segments and no slot is filled twice: 1.15 times the tokens/s of asking each
        # question under all adapters in turn (base, Soft, Sparse, LoRA; 24 ARC-Easy questions, bfloat16, one thread, 2026-11-26).
        pairs = [_Pair(example, adapter) for adapter in self._adapters for example in rows]
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
        by_adapter = {adapter: outcomes[i * len(rows) : (i + 1) * len(rows)] for i, adapter in enumerate(self._adapters)}
        is_guessable = scorer == "likelihood" or all(example.labels for example in rows)
        return Round(
            task,
            scorer,
            tuple(rows),
            chance(rows) if is_guessable else None,
            majority(rows) if is_guessable else None,
            tuple(self._score(adapter, by_adapter, _usage(before[adapter], after[adapter])) for adapter in self._adapters),
            seconds,
        )

    def _score(self, adapter: str | None, by_adapter: dict[str | None, list[_Outcome]], usage: Usage | None) -> Score:
        verdicts = [outcome.verdict for outcome in by_adapter[adapter]]
        base = None if adapter is None or None not in by_adapter else [outcome.verdict for outcome in by_adapter[None]]
        return Score(
            adapter,
            tuple(verdicts),
            estimate([verdict.value for verdict in verdicts], [verdict.weight for verdict in verdicts]),
            None if base is None else paired_difference(verdicts, base),
            sum(outcome.num_tokens for outcome in by_adapter[adapter]),
            usage,
        )

    def _totals(self) -> dict[str | None, RoutingTotals | None]:
        return {adapter: None if adapter is None else self._llm.routing_totals(adapter) for adapter in self._adapters}

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
        completions = self._llm.generate(prompts, params, adapter=[pair.adapter for pair in pairs], on_finished=on_finished)
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
        scores = self._llm.score_choices(
            prompts, choices, adapter=[pair.adapter for pair in pairs], on_finished=on_finished, on_error=errors.__setitem__
        )
        return [errors.get(index, found) for index, found in enumerate(scores)]

    def _check_fits(self, example: Example, prompt: int, answer: int) -> None:
        if prompt + answer > self._llm.max_model_len:
            raise DataInvalid(
                f"{example.where}: {prompt} tokens of prompt and {answer} of answer are more than the served context of "
                f"{self._llm.max_model_len}; lower --max-tokens, or leave the row out",
                param="data",
            )


_Ask = Callable[[Sequence[_Pair], Callable[[int], None]], list[_Outcome]]


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
    selected = after.selected.sum() - (before.selected.sum() if before else 0.0)
    return Usage(float(selected) / tokens / len(layers), sum(layers) / len(layers))
