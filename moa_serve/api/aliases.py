"""Aliases: names that stand for adapters, each for a share of the requests.

Who is known, by his `user` or else by his key, keeps his target. Weighted rendezvous hashing (Schindelhauer and Schomaker 2005) decides,
so that a change of the weights moves no more of them than it must. Pure functions.
"""

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from moa_serve.errors import AliasInvalid

MAX_TARGETS, MAX_WEIGHT = 16, 1_000_000
MIN_REVISION_DIGITS = 8


@dataclass(frozen=True, slots=True)
class AliasItem:
    """
    Args:
        targets: their weights; adapters' names, or names with at least 8 hex digits of a revision behind an `@`.
    """

    name: str
    targets: Mapping[str, int]


def split_target(target: str) -> tuple[str, str | None]:
    """`name` or `name@revision` -> the name, and the revision's digits.

    Raises:
        AliasInvalid: what is behind the `@` is no revision.
    """
    name, mark, revision = target.partition("@")
    if not mark:
        return name, None
    if not MIN_REVISION_DIGITS <= len(revision) <= 64 or set(revision) - set("0123456789abcdef"):
        raise AliasInvalid(
            f"target {target[:140]!a}: behind the '@' stand {MIN_REVISION_DIGITS} to 64 hex digits of a revision", param="targets"
        )
    return name, revision


def check_targets(targets: Mapping[str, int]) -> None:
    """Raises AliasInvalid."""
    if not 1 <= len(targets) <= MAX_TARGETS:
        raise AliasInvalid(f"an alias has 1 to {MAX_TARGETS} targets, not {len(targets)}", param="targets")
    if not all(0 <= weight <= MAX_WEIGHT for weight in targets.values()) or not any(targets.values()):
        raise AliasInvalid(f"weights are whole numbers from 0 to {MAX_WEIGHT:,}, and one of them is more than 0", param="targets")


def choose(alias: str, targets: Mapping[str, int], key: str | None) -> str:
    """The target of one request: always the same for a key, by chance where there is none."""
    weighted = {target: weight for target, weight in targets.items() if weight > 0}
    if key is None:
        return random.choices(list(weighted), list(weighted.values()))[0]
    return max(weighted, key=lambda target: (weighted[target] / -math.log(_unit(alias, target, key)), target))


def _unit(alias: str, target: str, key: str) -> float:
    """In (0, 1), from 53 bits of a hash; lengths keep one field from running into the next."""
    text = "".join(f"{len(part)}:{part}" for part in (alias, target, key))
    bits = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 11
    return (bits + 0.5) / 2**53
