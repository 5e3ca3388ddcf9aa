"""Fingerprint: which tokens the prompts of an adapter's training had, so that a prompt can be told which adapter it is most like.

Token counts in hashed buckets, and of a prompt the mean cost of its tokens in nats: naive Bayes with all adapters alike. Nothing of the
model is computed. `python -m tests.auto_accuracy` measures it against routing, loss and embeddings. Immutable.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moa_serve.errors import InvalidRequest

FORMAT = "moa-prompts/1"
BUCKETS = 4096
UNSEEN = 0.1
"""A share, and no count that is added to each bucket, which would weigh more the less an adapter was trained on."""
PREFIX = 512
"""Tokens of a prompt that are looked at: where it begins, it says what it wants."""


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """
    Args:
        counts: (BUCKETS,) tokens of training prompts.
    """

    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, prompts: Iterable[Sequence[int]]) -> "Fingerprint":
        counts = np.zeros(BUCKETS, dtype=np.int64)
        for ids in prompts:
            counts += np.bincount(buckets_of(np.array(ids, dtype=np.int64), BUCKETS), minlength=BUCKETS)
        return cls(counts)

    def cost(self, ids: Sequence[int]) -> float:
        """Mean nats of the first PREFIX tokens of a prompt, each on its own, where a share UNSEEN of all tokens is any token alike."""
        places = buckets_of(np.array(ids[:PREFIX], dtype=np.int64), BUCKETS)
        shares = self.counts[places] / max(1, int(self.counts.sum()))
        return -float(np.log((1 - UNSEEN) * shares + UNSEEN / BUCKETS).mean())


def buckets_of(ids: npt.NDArray[np.int64], buckets: int) -> npt.NDArray[np.int64]:
    """Of a token id by Knuth's multiplicative hash: neighbours in the vocabulary do not share one. `buckets` is a power of two."""
    mixed = ids.astype(np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    return (mixed * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


def write_fingerprints(path: Path, base: str, found: Mapping[str, Fingerprint]) -> None:
    """Args: base: digest of the base, whose tokens are counted."""
    prints = {name: fingerprint.counts.tolist() for name, fingerprint in sorted(found.items())}
    path.write_text(json.dumps({"format": FORMAT, "base": base, "adapters": prints}) + "\n")


def read_fingerprints(path: Path, base: str) -> dict[str, Fingerprint]:
    """By adapter.

    Raises:
        InvalidRequest: the file cannot be read, is none of ours, or was made with another base.
    """
    try:
        raw: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path}: cannot be read ({type(error).__name__}); make it with moa-serve fingerprint") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or not isinstance(adapters := raw.get("adapters"), dict):
        raise InvalidRequest(f"{path}: is no file of fingerprints ({FORMAT}); make it with moa-serve fingerprint")
    if raw.get("base") != base:
        raise InvalidRequest(f"{path}: was made with another base, whose tokens are others; make it anew with moa-serve fingerprint")
    return {name: _read(path, name, counts) for name, counts in adapters.items()}


def _read(path: Path, name: str, counts: Any) -> Fingerprint:
    is_list = isinstance(counts, list) and len(counts) == BUCKETS
    if not is_list or not all(isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**40 for count in counts):
        raise InvalidRequest(f"{path}: {name[:64]!a} has no {BUCKETS} counts; make it anew with moa-serve fingerprint")
    return Fingerprint(np.array(counts, dtype=np.int64))
