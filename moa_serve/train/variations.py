"""Ways to ask an adapter's routers for something else, to see what it is worth: experts left out one by one, thresholds and top-k from end
to end. A manifest in, routing options out; nothing is computed here.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moa_serve.adapter.manifest import KINDS, Manifest
from moa_serve.adapter.rules import RoutingOptions, rules_for
from moa_serve.errors import InvalidRequest

ABLATIONS = ("kinds", "experts", "layers")
GIVEN, SOFT, CONSTANT, SCALE, TOP_K = "given", "soft", "constant threshold", "own threshold scaled", "top-k"
SWEPT = (SOFT, SCALE, CONSTANT, TOP_K)
CONSTANTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of sigmoid routers
SHARES = (0.5, 1.0, 1.5, 2.0)  # of softmax routers: times the weight that each expert would have if all had the same
SCALES = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 3.0)
RANGES = 6  # that the layers are cut into

_ATTENTION = ("Q", "K", "V", "PROMPT", "O")
_LAYERS = re.compile(r"layers(?::([0-9]{1,4}))?")


@dataclass(frozen=True, slots=True)
class Variation:
    """One way to ask.

    Args:
        group: what it is one of: an ablation, one of `SWEPT`, or `GIVEN`.
        name: what is otherwise, such as "without PROMPT".
        moa: routing options, as `LLM.generate` takes them.
    """

    group: str
    name: str
    moa: Mapping[str, Any]


def given(moa: Mapping[str, Any], manifest: Manifest) -> Variation:
    """Options as a user has written them. Raises InvalidRequest: they are none, or not for this adapter."""
    rules_for(RoutingOptions.of(moa), manifest)
    return Variation(GIVEN, ", ".join(f"{name} {_told(value)}" for name, value in moa.items() if value is not None), moa)


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return " ".join(value) if isinstance(value, list | tuple) else str(value)


# -- ablations


def check_ablation(wanted: str) -> None:
    """Raises InvalidRequest: there is no such ablation."""
    match = _LAYERS.fullmatch(wanted)
    if wanted not in ABLATIONS and (match is None or not int(match[1])):
        raise InvalidRequest(
            f"ablate is {wanted[:40]!r}, but must be kinds, experts, layers, or layers:N for N layers at a time", param="ablate"
        )


def ablations(wanted: str, manifest: Manifest) -> list[Variation]:
    """What is left out, one thing after the other.

    Args:
        wanted: "kinds": all LoRA experts, the prompt, the parallel adapter; all that stand at attention, all at the FFN. "experts": each of
            them in all layers. "layers", "layers:N": all experts of N layers, by default of a sixth of them. Experts that share a weight
            go together, and what would leave nothing is left out, except layers.
    Raises:
        InvalidRequest: there is no such ablation, the adapter has no router, or only one kind of expert.
    """
    check_ablation(wanted)
    if manifest.router.site == "none":
        raise InvalidRequest(f"ablate needs an adapter with a router, but all experts of a {manifest.variant} always count", param="ablate")
    if wanted not in ("kinds", "experts"):
        return list(_without_layers(wanted, manifest))
    names = _names(manifest)
    parts = _kinds(names) if wanted == "kinds" else {name: [name] for name in names}
    found = list(_without_experts(wanted, parts, manifest, names))
    if not found:
        raise InvalidRequest(f"ablate {wanted} leaves nothing of this {manifest.variant}: its experts are all of one kind or share their "
                             f"weights; use layers", param="ablate")  # fmt: skip
    return found


def _names(manifest: Manifest) -> list[str]:
    """Of all experts that a router weighs, in canonical order."""
    names = {name for router in manifest.routers for name in router.experts}
    return sorted(names, key=lambda name: (KINDS.index(name.partition("/")[0]), int(name.partition("/")[2] or 0)))


def _kinds(names: Sequence[str]) -> dict[str, list[str]]:
    site = {name: name.partition("/")[0] for name in names}
    return {
        "LoRA": [name for name in names if site[name] not in ("PROMPT", "P_ADAPTER")],
        "PROMPT": [name for name in names if site[name] == "PROMPT"],
        "P_ADAPTER": [name for name in names if site[name] == "P_ADAPTER"],
        "attention": [name for name in names if site[name] in _ATTENTION],
        "FFN": [name for name in names if site[name] not in _ATTENTION],
    }


def _without_experts(group: str, parts: Mapping[str, list[str]], manifest: Manifest, names: Sequence[str]) -> Iterator[Variation]:
    seen: set[frozenset[str]] = set()
    for title, part in parts.items():
        out = _closed(part, manifest)
        if not part or len(out) == len(names) or out in seen:
            continue
        seen.add(out)
        ordered = [name for name in names if name in out]
        yield Variation(group, f"without {title if len(out) == len(part) else ', '.join(ordered)}", {"disable": _shortened(ordered, names)})


def _closed(part: Collection[str], manifest: Manifest) -> frozenset[str]:
    """With the experts that share a weight with one of them (UniPEFT)."""
    out, size = set(part), -1
    while len(out) != size:
        size = len(out)
        for router in manifest.routers:
            bits = {bit for name, bit in router.experts.items() if name in out}
            out |= {name for name, bit in router.experts.items() if bit in bits}
    return frozenset(out)


def _shortened(part: Sequence[str], names: Sequence[str]) -> list[str]:
    """Where all experts of a linear go, its name stands for them: options name 64 at most."""
    sites = dict.fromkeys(name.partition("/")[0] for name in part)
    of = {site: [name for name in names if name.partition("/")[0] == site] for site in sites}
    return [entry for site in sites for entry in ([site] if set(of[site]) <= set(part) else [name for name in of[site] if name in part])]


def _without_layers(wanted: str, manifest: Manifest) -> Iterator[Variation]:
    count, size = manifest.base.num_layers, int(wanted.partition(":")[2] or 0)
    size = size or math.ceil(count / RANGES)
    routed = {router.layer for router in manifest.routers}
    for first in range(0, count, size):
        last = min(first + size, count) - 1
        if not routed.isdisjoint(range(first, last + 1)):
            name = f"layers {first}-{last}" if last > first else f"layer {first}"
            yield Variation("layers", f"without {name}", {"disable": [f"*@{first}-{last}"]})


# -- sweeps


def sweep(manifest: Manifest) -> list[Variation]:
    """From what keeps everything to what keeps nearly nothing: soft, the own threshold scaled, constant thresholds, and top-k; as far as
    the adapter has them, and without what is its own way.

    Raises:
        InvalidRequest: the adapter has no router.
    """
    if manifest.router.site == "none":
        raise InvalidRequest(f"sweep needs an adapter with a router, but all experts of a {manifest.variant} always count", param="sweep")
    most = max(router.used.bit_count() for router in manifest.routers)
    constants = CONSTANTS if manifest.router.activation == "sigmoid" else tuple(round(share / most, 4) for share in SHARES)
    found = [Variation(SOFT, "soft", {"mode": "soft"})]
    if manifest.router.select.kind in ("threshold_fn", "adamole"):  # a constant one times something is another constant
        found += [Variation(SCALE, f"own threshold x {scale:g}", {"threshold": {"scale": scale}}) for scale in SCALES]
    found += [Variation(CONSTANT, f"threshold {constant:g}", {"threshold": {"constant": constant}}) for constant in constants]
    found += [Variation(TOP_K, f"top {count}", {"top_k": count}) for count in range(most - 1, 0, -1)]
    return [variation for variation in found if rules_for(RoutingOptions.of(variation.moa), manifest) is not None]
