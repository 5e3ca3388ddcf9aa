"""The shadow check of one answer: its last tokens scored as its routers chose, and once more with every expert kept.

Only the two questions and the comparison: who asks runs the requests when nobody else needs the engine (api/shadow.py). Owns no state.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.rules import RoutingOptions, RoutingRules, rules_for
from moa_serve.engine.request import Request, SamplingParams

MAX_SCORED = 64  # tokens of one answer, its last ones
MAX_TOKENS = 2048  # of prompt and answer, of what is kept and computed; the rest of a longer answer is left out
LOGIT_BYTES = 24 * 2**20  # of both scorings' logits together, which are held until they are compared
ROWS = 4  # to compare at a time, in float64


@dataclass(frozen=True, slots=True)
class ShadowSample:
    """What is kept of an answer until it is scored: token ids and rules, no text, and not who asked.

    Args:
        adapter: its name. rules: as it was answered. dense: the same with every expert kept.
        token_ids: prompt and answer, cut to what is needed.
        num_scored: of them, the last tokens.
    """

    adapter: str
    revision: str
    rules: RoutingRules | None
    dense: RoutingRules | None
    token_ids: "array[int]"
    num_scored: int

    def requests(self) -> tuple[Request, Request]:
        """As it was answered, and dense. Each collects the logits of `num_scored` places: those before the scored tokens."""
        sparse = Request(
            tuple(self.token_ids[:-1]),
            SamplingParams(max_tokens=0),
            self.revision,
            rules=self.rules,
            collect_logits=True,
            collect_from=len(self.token_ids) - 1 - self.num_scored,
            is_background=True,
        )
        return sparse, replace(sparse, rules=self.dense, request_id=f"{sparse.request_id}d")


@dataclass(frozen=True, slots=True)
class ShadowScore:
    """Sums over the scored tokens.

    Args:
        gap: |log p(token) - log q(token)|, in nats; p as it was answered, q with every expert kept; both of the model, before temperature.
        kl: KL(p || q), in nats.
        flips: places at which p and q have another best token.
    """

    tokens: int = 0
    gap: float = 0.0
    kl: float = 0.0
    flips: int = 0

    def __add__(self, more: "ShadowScore") -> "ShadowScore":
        return ShadowScore(self.tokens + more.tokens, self.gap + more.gap, self.kl + more.kl, self.flips + more.flips)


def dense_rules(rules: RoutingRules | None, options: RoutingOptions | None, manifest: Manifest) -> tuple[bool, RoutingRules | None]:
    """Whether a request under `rules` leaves experts out that it need not, and the rules that keep every one but those that its `options`
    have disabled. False for an instance-level adapter, whose weights are of the prompt alone and cannot be had of prompt and answer."""
    if manifest.router.site == "none" or manifest.is_pooled:
        return False, None
    dense = rules_for(RoutingOptions(mode="soft", disable=() if options is None else options.disable), manifest)
    return dense != rules, dense


def cut(prompt_ids: Sequence[int], answer_ids: Sequence[int], *, vocab_size: int, most: int) -> "tuple[array[int], int]":
    """The tokens to score an answer by, at most `most`, and how many of them, the last ones, are scored: 0 where the prompt is too long."""
    answer_ids = answer_ids[: max(0, most - len(prompt_ids))]
    num_scored = min(len(answer_ids), MAX_SCORED, max(1, LOGIT_BYTES // (2 * 4 * vocab_size)))
    return array("I", [*prompt_ids, *answer_ids] if num_scored else ()), num_scored


def compare(sparse: Tensor, dense: Tensor, token_ids: Sequence[int]) -> ShadowScore | None:
    """
    Args:
        sparse, dense: (n, V) logits of the places before `token_ids`.
    Returns:
        None where a NaN or an infinity makes it meaningless.
    """
    with torch.inference_mode():
        log_p, log_q = sparse.double().log_softmax(-1), dense.double().log_softmax(-1)
        p = log_p.exp()
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp(min=0.0)  # rounding alone could make it negative
        chosen = torch.tensor(list(token_ids), device=sparse.device)[:, None]
        gap = (log_p.gather(-1, chosen) - log_q.gather(-1, chosen)).abs()
        flips = sparse.argmax(-1) != dense.argmax(-1)
        sums = torch.stack((gap.sum(), kl.sum(), flips.sum().double()))
        if not bool(sums.isfinite().all()):
            return None
        found = sums.tolist()
        return ShadowScore(len(token_ids), found[0], found[1], round(found[2]))
