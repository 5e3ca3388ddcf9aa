"""What is asked of the engine (SamplingParams, Request) and how far it has come (Sequence).

Token ids only: no text, no HTTP, no tensors. A SamplingParams and a Request never change once made; a Sequence belongs to
the engine thread. `kv_root` says which sequences may ever share keys and values.
"""

import hashlib
import json
import secrets
import time
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from typing import Any

from moa_serve.adapter.rules import RoutingRules
from moa_serve.engine.guide import Grammar, Guide, Matcher
from moa_serve.errors import InvalidRequest, shown

GREEDY_TEMPERATURE = 1e-5
"""Below this a draw is the best token anyway, and dividing by it only loses digits."""

MAX_STOP_STRINGS = 16
MAX_TOKEN_LIST = 1024
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to stop. Checked when made; bounds are inclusive unless said otherwise.

    Args:
        max_tokens: most tokens to generate, 0 or more; None is the rest of the context. 0 only scores the prompt, and
            is legal only in a Request that collects something.
        temperature: 0 to 2; the logits are divided by it. 0 (below 1e-5) is greedy: the best token, the lower id of equals.
        top_p: above 0 to 1; keeps the fewest best tokens whose probabilities reach it. 1 is off.
        top_k: keeps the k best tokens; 0 and -1 are off.
        min_p: 0 to 1; keeps tokens with at least this share of the best token's probability. 0 is off.
        presence_penalty: -2 to 2; subtracted once from the logit of each token that was generated.
        frequency_penalty: -2 to 2; subtracted once for each time that the token was generated.
        repetition_penalty: 0.01 to 10; divides the positive and multiplies the negative logits of tokens that stand in
            the prompt or were generated. 1 is off. The lower bound keeps the quotient finite.
        logit_bias: token id to -100 .. 100, added to the logit; at most 1024 of them.
        seed: any 64-bit number, signed or not: equal seeds give equal tokens, whatever else runs. None draws a fresh one.
        stop: texts at which to stop, one or at most 16, none empty. For the layer that knows text; the engine knows ids.
        stop_token_ids: ids at which to stop, besides the model's own end of text; at most 1024.
        min_tokens: nothing stops before this many tokens: ids that would cannot be drawn, stop strings do not count; at most max_tokens.
        ignore_eos: the model's own end of text does not stop.
        logprobs: 0 to 20: log-probability of the chosen token and of this many best ones; 0 is the chosen one alone;
            None is none. Always of the model's own logits, before anything above changed them.
        guide: what the text must be; it stops where nothing can follow. Its end of text wins over min_tokens and ignore_eos where the
            guide has nothing else to go on with. None is anything.
    Raises:
        InvalidRequest: `param` is the field.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    guide: Guide | None = None

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 0, None, optional=True)
        _check_float("temperature", self.temperature, 0.0, 2.0)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise InvalidRequest("top_p is 0, but must be above 0; for the best token alone use temperature 0", param="top_p")
        _check_int("top_k", self.top_k, -1, None)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        _check_int("seed", self.seed, -(2**63), 2**64 - 1, optional=True)
        _check_int("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}", param="min_tokens")
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequest(f"ignore_eos is {self.ignore_eos!r}, but must be true or false", param="ignore_eos")
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        if self.guide is not None and not isinstance(self.guide, Guide):
            raise InvalidRequest(f"guide is {shown(self.guide)}, but must be a Guide: Guide.json(schema), Guide.regex(...)", param="guide")
        # Frozen for everyone but its own making: lists become tuples, and a mapping that its owner may change is copied.
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "stop", _stop(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids, MAX_TOKEN_LIST))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt to continue or to score.

    Args:
        prompt_ids: at least one token id.
        params: how to choose, when to stop.
        adapter: revision (64 hex digits); None is the base alone.
        is_pooled: the adapter weighs its experts by the mean over the whole prompt, so the prompt is computed in one step.
        collect_logits: keep the logits of every prompt position from `collect_from` on.
        collect_routing: keep the router's weights of every position.
        return_routing: with every token goes what the routers said of the one behind which it was drawn. Needs an adapter with routers.
        grammar: `params.guide`, compiled.
        rules: what of the adapter's routers is otherwise than the adapter has it; None is nothing.
        prompt_logprobs: 0 to 20: log-probabilities of the prompt's tokens and of this many best ones at each place; None is none.
        branches: continuations of the prompt to score, each of at least one token. Each stands behind the prompt and sees nothing of the
            others; the prompt is computed once. Only with max_tokens 0 and without the three fields above. Its public name is `choices`.
        tenant: who asks (an API key's id): tenants take turns. None is nobody in particular.
        salt: keys and values are shared only among requests with the same one.
        is_background: nobody waits for it. It is no traffic: what its routers say and whether its adapter stood in a slot is not counted;
            its steps are short; and where it makes one fail, its adapter stays in service.
        request_id: names the request in logs and outputs.
        arrival: `time.monotonic()` seconds. For timings; the order of arrival is the order of `Scheduler.add`.
    Raises:
        InvalidRequest: the prompt or a branch is empty or holds something that is no id, or nothing at all is asked for.
    """

    prompt_ids: tuple[int, ...] | list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None
    is_pooled: bool = False
    grammar: Grammar | None = None
    rules: RoutingRules | None = None
    collect_logits: bool = False
    collect_from: int = 0
    collect_routing: bool = False
    return_routing: bool = False
    prompt_logprobs: int | None = None
    branches: tuple[tuple[int, ...], ...] = ()
    tenant: str | None = None
    salt: str = ""
    is_background: bool = False
    request_id: str = field(default_factory=lambda: secrets.token_hex(8))
    arrival: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        assert self.adapter is not None or not (self.is_pooled or self.return_routing or self.rules), "only an adapter has routers"
        assert (self.grammar is None) == (self.params.guide is None), "a guide is compiled before the request is made"
        if not self.prompt_ids:
            raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
        object.__setattr__(self, "prompt_ids", _token_ids("prompt", self.prompt_ids))
        _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        object.__setattr__(self, "branches", tuple(_token_ids("choices", branch) for branch in self.branches))
        if not all(self.branches):
            raise InvalidRequest("a choice is empty, so there is nothing to score; give at least one token", param="choices")
        assert not self.collect_from or (self.collect_logits and self.prompt_logprobs is None), "only logits are collected from a place on"
        if self.branches:
            looks_at_prompt = self.collect_logits or self.collect_routing or self.prompt_logprobs is not None
            assert self.params.max_tokens == 0, "branches are scored, and nothing is generated behind them"
            assert not looks_at_prompt, "a request scores branches or looks at its prompt"
        if self.params.max_tokens == 0 and not self.is_collected:
            raise InvalidRequest(
                "max_tokens is 0, which only scores the prompt, but nothing about the prompt is asked for; use 1 or more",
                param="max_tokens",
            )

    @property
    def is_collected(self) -> bool:
        """Something of its forward is kept for who asked, beside the tokens that are drawn."""
        return self.collect_logits or self.collect_routing or self.prompt_logprobs is not None or bool(self.branches)

    @property
    def given_ids(self) -> list[int]:
        """The tokens to compute before anything is drawn: the prompt, then the branches, each without its last token, behind which
        nothing is asked."""
        return [*self.prompt_ids, *chain.from_iterable(branch[:-1] for branch in self.branches)]


class SequenceStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on its way through the engine: its tokens, what of them is computed, and what it holds.

    Who writes what: the scheduler the fields from `block_table` to `num_preemptions`, the model and the sampler one each,
    the engine the rest.

    Args:
        request: what is asked.
        token_ids: the request's `given_ids`, then what was generated.
        kv_root: from `kv_root()`: names everything, besides the tokens, that its keys and values depend on.
        eos_token_ids: the model's own ends of text.
    """

    request: Request
    token_ids: list[int]
    kv_root: bytes
    eos_token_ids: tuple[int, ...] = ()

    finish_reason: str | None = None  # stop, length, abort, error
    matcher: Matcher | None = field(init=False)  # how far it is in its grammar; outlives preemption
    seed: int = field(init=False)  # of the draws; kept here so that a draw after preemption is the same draw
    stop_ids: frozenset[int] = field(init=False)  # every id that ends the sequence once min_tokens are there

    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose K and V are in the cache
    num_shared: int = 0  # first pages of the block table that others may find too
    num_cached: int = 0  # tokens of the prompt that were in the cache when it first started
    page_keys: list[bytes] = field(default_factory=list)  # of its first pages, as far as anybody asked
    slot: int | None = None  # of the adapter, while running
    status: SequenceStatus = SequenceStatus.WAITING
    order: int = -1  # of arrival: older is smaller; -1 until the scheduler knows it
    turn: int = -1  # of its first start: who started earlier is smaller; -1 before it
    num_skipped: int = 0  # steps in which it waited for nothing but a slot
    num_preemptions: int = 0
    num_traced: int = 0  # tokens that were computed, where its routing is asked for
    num_evaluations: int = 0  # experts that were computed for them
    is_paused: bool = False  # its reader is behind: it keeps what it holds and gets no tokens

    scheduled_at: float | None = None  # time.monotonic() when its first step began
    first_token_at: float | None = None
    finished_at: float | None = None

    gates: Any = None  # the model's: what a pooled adapter's routers said, known once the prompt was seen; they outlive preemption
    sampler_state: Any = None  # the sampler's: token counts and the like; outlives preemption

    def __post_init__(self) -> None:
        params, grammar = self.request.params, self.request.grammar
        self.matcher = None if grammar is None else grammar.matcher()
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.stop_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else self.eos_token_ids)

    def append(self, token_id: int) -> None:
        """One more generated token; it is pending until the next step computes it."""
        self.token_ids.append(token_id)
        if self.matcher is not None:
            self.matcher.take(token_id)

    @property
    def kind(self) -> tuple[int, bytes, bool]:
        """Equal for running sequences whose tokens are computed alike: of one slot, and one way in which its routers choose, which is
        counted or not."""
        rules = self.request.rules
        return -1 if self.slot is None else self.slot, b"" if rules is None else rules.key, self.request.is_background

    @property
    def shares_pages(self) -> bool:
        """Its pages may come from others and serve others: they depend on the tokens up to their end only, which a mean over the prompt
        does not, and nothing but the tokens that are drawn is asked of it: what is collected is collected of every position."""
        return not (self.request.is_pooled or self.request.is_collected)

    @property
    def wants_prompt_logits(self) -> bool:
        return self.request.collect_logits or self.request.prompt_logprobs is not None

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        return 0 if self.request.branches else len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def num_pending(self) -> int:
        """Tokens to compute: prefill, chunk, recomputation and decode are one case."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_prefill(self) -> bool:
        """More is pending than the one token that was generated last."""
        return self.num_pending > 1 or self.num_computed < self.num_prompt

    @property
    def is_whole(self) -> bool:
        """What is pending must be computed in one step: the weights of its experts are a mean over its prompt that nobody knows yet, or it
        has branches, which attend to keys of their own step only."""
        return bool(self.request.branches) or (self.request.is_pooled and self.gates is None)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """What the model itself thought of the token that was chosen.

    Args:
        token_id: the chosen token.
        logprob: natural logarithm of its probability, at least -9999 so that JSON can say it.
        rank: 1 for the best token.
        top: the best tokens and their log-probabilities, best first; as many as `SamplingParams.logprobs` asks.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


def kv_root(base_digest: str, dtype: str, backend: str, revision: str | None, options: Mapping[str, Any], salt: str) -> bytes:
    """Identity of keys and values apart from the tokens: sequences with different roots never share a block.

    JSON is the encoding because it cannot be read two ways: strings are quoted, so no field runs into the next, and None
    is not "null". SHA-256, because a guessable hash lets one tenant meet another's blocks.

    Args:
        base_digest, dtype, backend: what computes.
        revision: of the adapter: a digest of its content, never its name or slot.
        options: routing options after defaults were filled in, so that an explicit default equals an omitted one. JSON values.
        salt: keeps tenants apart who ask for it.
    Returns:
        32 bytes.
    """
    identity = ["moa_serve/kv/1", base_digest, dtype, backend, revision, dict(options), salt]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, allow_nan=False).encode("ascii")).digest()


def page_key(before: bytes, token_ids: Iterable[int]) -> bytes:
    """Identity of one full page: of its tokens, and by `before`, which is the key of the page before it or begins with a secret seed and
    the root, of all that they depend on. 32 bytes."""
    return hashlib.sha256(before + array("q", token_ids).tobytes()).digest()


def _check_int(param: str, value: object, low: int, high: int | None, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high):
        return
    bounds = f"of {low} or more" if high is None else f"from {low} to {high}"
    raise InvalidRequest(f"{param} is {shown(value)}, but must be a whole number {bounds}", param=param)


def _check_float(param: str, value: object, low: float, high: float) -> None:
    # Written so that NaN, which compares false with everything, is refused.
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
        return
    raise InvalidRequest(f"{param} is {shown(value)}, but must be a number from {low:g} to {high:g}", param=param)


def _token_ids(param: str, value: object, limit: int | None = None) -> tuple[int, ...]:
    if not isinstance(value, tuple | list):
        raise InvalidRequest(f"{param} must be a list of token ids, not {type(value).__name__}", param=param)
    if limit is not None and len(value) > limit:
        raise InvalidRequest(f"{param} has {len(value)} token ids; at most {limit} are allowed", param=param)
    _check_ids(param, value)
    return tuple(value)


def _check_ids(param: str, ids: Iterable[object]) -> None:
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise InvalidRequest(f"{param} has {shown(token_id)}, but a token id is a whole number of 0 or more", param=param)


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"logit_bias must map token ids to numbers, not be {type(value).__name__}", param="logit_bias")
    if len(value) > MAX_TOKEN_LIST:
        raise InvalidRequest(f"logit_bias has {len(value)} entries; at most {MAX_TOKEN_LIST} are allowed", param="logit_bias")
    _check_ids("logit_bias", value)
    for bias in value.values():
        _check_float("logit_bias", bias, -100.0, 100.0)
    return dict(value)


def _stop(value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, tuple | list) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(f"stop is {shown(value)}, but must be a string or a list of strings", param="stop")
    if len(texts) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop has {len(texts)} strings; at most {MAX_STOP_STRINGS} are allowed", param="stop")
    if not all(texts):
        raise InvalidRequest("stop has an empty string, which would stop before the first token; leave it out", param="stop")
    return tuple(texts)
