"""What sparsity costs, by the shadow check: counters of each adapter, and the means of its current revision. Belongs to the event loop."""

from dataclasses import dataclass

from moa_serve.engine.shadow import ShadowScore
from moa_serve.metrics.registered import Registered

SKIPPED = ("dropped", "gone", "too_long", "not_finite", "failed")
"""Why an answer was not scored: room for a newer one was needed; its revision is no longer served, or stands in no slot; its prompt alone
is too long; NaN or infinity; the engine refused it or ended it with an error."""


@dataclass(frozen=True, slots=True)
class ShadowUse:
    """Over `tokens` scored tokens. mean_gap and mean_kl are in nats, flip_rate 0 to 1."""

    tokens: int
    mean_gap: float
    mean_kl: float
    flip_rate: float


class ShadowMetrics:
    def __init__(self, registered: Registered) -> None:
        counter, whose = registered.counter, "adapter"
        self._requests = counter("moa_shadow_requests", "Answers that the shadow check scored.", whose)
        self._tokens = counter("moa_shadow_tokens", "Generated tokens that the shadow check scored.", whose)
        self._gap = counter(
            "moa_shadow_gap",
            "Sum over those tokens of how far the log-probability with every expert kept is from that of the answer, in nats; over "
            "moa_shadow_tokens_total the mean.",
            whose,
        )
        self._kl = counter("moa_shadow_kl", "Sum over those tokens' places of KL(as answered || every expert kept), in nats.", whose)
        self._flips = counter("moa_shadow_flips", "Those of the places at which the best token is another one.", whose)
        self._skipped = counter(
            "moa_shadow_skipped",
            "Sampled answers that were not scored: dropped for newer ones, gone (the revision is not served, or in no slot, any more), "
            "too_long, not_finite (NaN or infinity), failed.",
            whose,
            "reason",
        )
        self._totals: dict[str, tuple[str, ShadowScore]] = {}  # by name: of which revision

    def begin(self, label: str) -> None:
        for counter in (self._requests, self._tokens, self._gap, self._kl, self._flips):
            counter.labels(label)

    def observe(self, label: str, score: ShadowScore) -> None:
        self._requests.labels(label).inc()
        self._tokens.labels(label).inc(score.tokens)
        self._gap.labels(label).inc(score.gap)
        self._kl.labels(label).inc(score.kl)
        self._flips.labels(label).inc(score.flips)

    def observe_skipped(self, label: str, reason: str) -> None:
        assert reason in SKIPPED, "a reason is a word of ours"
        self._skipped.labels(label, reason).inc()

    def add(self, name: str, revision: str, score: ShadowScore) -> None:
        """To the means of a loaded name."""
        known, total = self._totals.get(name, (revision, ShadowScore()))
        self._totals[name] = (revision, total + score if known == revision else score)

    def forget(self, name: str) -> None:
        self._totals.pop(name, None)

    def use(self, name: str, revision: str) -> ShadowUse | None:
        """None where nothing was scored."""
        known, total = self._totals.get(name, ("", ShadowScore()))
        if known != revision or not total.tokens:
            return None
        return ShadowUse(total.tokens, total.gap / total.tokens, total.kl / total.tokens, total.flips / total.tokens)
