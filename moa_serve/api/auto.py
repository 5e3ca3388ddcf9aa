"""The model `auto`: the adapter whose training prompts a prompt is most like, by their fingerprints.

Picking reads at most the first tokens of a prompt and computes nothing of the model, so it takes no row and no token of anybody's limit
beyond those of the request. It happens in a worker thread; owns no state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moa_serve.adapter.fingerprint import Fingerprint
from moa_serve.errors import InvalidRequest

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Picked:
    """
    Args:
        name: the best candidate.
        scores: of each candidate, the mean log-probability of the prompt's tokens among those of its training prompts, best first.
    """

    name: str
    scores: Mapping[str, float]

    def told(self) -> dict[str, Any]:
        """`moa.auto` of an answer."""
        return {"scores": {name: round(score, 4) for name, score in self.scores.items()}}


class AutoPicker:
    """
    Args:
        fingerprints: by the name of an adapter, or of an alias.
        is_served: whether requests may name it now.
    """

    def __init__(self, fingerprints: Mapping[str, Fingerprint], is_served: Callable[[str], bool]) -> None:
        self._fingerprints, self._is_served = fingerprints, is_served

    def candidates(self, revision: str | None) -> list[str]:
        """Those that can be picked now. Belongs to the event loop, as the registry does.

        Args:
            revision: that the request names.
        Raises:
            InvalidRequest: there are none, or a revision is named.
        """
        if revision is not None:
            raise InvalidRequest("moa.revision is for a model that is named, not for 'auto'; leave it out", param="moa.revision")
        found = [name for name in self._fingerprints if self._is_served(name)]
        if not found:
            named = ", ".join(list(self._fingerprints)[:8])
            raise InvalidRequest(
                f"none of the adapters that 'auto' picks from is served ({named}); name a model, or put one of them into the adapters "
                f"directory",
                param="model",
            )
        return found

    def pick(self, prompts: Sequence[Sequence[int]], candidates: Sequence[str]) -> Picked:
        """One adapter for the prompts of a request, all of which are looked at; of equals the first by name."""
        scores = {name: -sum(self._fingerprints[name].cost(ids) for ids in prompts) / len(prompts) for name in candidates}
        ranked = sorted(scores, key=lambda name: (-scores[name], name))
        return Picked(ranked[0], {name: scores[name] for name in ranked})
