"""Taking experts out of an adapter: which of them can go, what goes with them, and what is left.

What is left computes what the whole adapter computes with the same experts disabled (`moa.disable`, rules.py). By the routers' formulas:

- A sigmoid at a layer weighs each output by itself: the output goes with its experts, and the rest is the same to the bit.
- A softmax at a layer divides by the sum over all outputs: they stay, and weigh nobody. The format has such outputs only below a used one,
  so where the last one would be unused, they move to the front, and the sum is added up in another order.
- MoLA renormalises: what a kept expert weighs does not depend on outputs that are not kept, but for rounding, so they go. At each linear
  none must be left, or as many as it keeps.
- MoLoRA and HydraLoRA weigh by the softmax over all experts of a linear, AdaMoLE compares with 1 / E as well, and a router at a linear has
  no output without an expert: all experts of a linear go, or none.

Manifests and tensors in, the same out; no files, no traffic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moa_serve.adapter.manifest import ExpertSpec, Manifest, SelectTopK
from moa_serve.adapter.rules import Router, RoutingOptions, rules_for
from moa_serve.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Unit:
    """Experts of one router that go together, and the router's outputs that weigh them."""

    layer: int
    site: str
    experts: tuple[str, ...]
    outputs: tuple[int, ...]

    @property
    def router(self) -> Router:
        return self.layer, self.site


def units_of(manifest: Manifest) -> list[Unit]:
    """All that a router weighs, layer by layer; none where the adapter has no router."""
    units = []
    for router in manifest.routers:
        layer, site = router.layer, router.site
        if site != "layer" and manifest.router.select.kind != "top_k":
            units.append(Unit(layer, site, tuple(router.experts), tuple(range(router.num_outputs))))
            continue
        owners: dict[int, list[str]] = {}
        for name, output in zip(router.experts, router.outputs, strict=True):
            owners.setdefault(output, []).append(name)
        units += [Unit(layer, site, tuple(names), (output,)) for output, names in owners.items()]
    return units


def least_units(manifest: Manifest) -> int:
    """How many must stay at a router where not all go."""
    return manifest.router.select.k if isinstance(manifest.router.select, SelectTopK) else 1


@dataclass(frozen=True, slots=True)
class Pruned:
    """An adapter without some experts.

    Args:
        sources: name of each of its tensors -> that of the whole adapter's, and the rows of it that stay; None for all.
        removed: what is gone, as (layer, expert), by the names that the whole adapter has.
    """

    manifest: Manifest
    sources: Mapping[str, tuple[str, tuple[int, ...] | None]]
    removed: frozenset[tuple[int, str]]

    def tensors(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the whole adapter's."""
        return {
            name: whole[source] if rows is None else whole[source][torch.tensor(rows)].contiguous()
            for name, (source, rows) in self.sources.items()
        }

    def num_bytes(self, whole: Mapping[str, Tensor]) -> int:
        """Of its tensors, as the whole adapter's are stored."""
        total = 0
        for source, rows in self.sources.values():
            tensor = whole[source]
            total += tensor.nbytes if rows is None else len(rows) * tensor[0].nbytes
        return total


def prune(manifest: Manifest, entries: Sequence[str], *, revision: str) -> Pruned:
    """Take out what `entries` name, in the form of `moa.disable`.

    Args:
        revision: of the whole adapter: `training.pruned` of what is left names it.
    Raises:
        InvalidRequest: an entry names nothing, or what cannot go by itself; or nothing would be left.
    """
    gone = _named(manifest, entries)
    left = [unit for unit in units_of(manifest) if unit not in gone]
    if not left:
        raise InvalidRequest("prune names every expert of the adapter; without it, requests name the base instead", param="prune")
    least = least_units(manifest)
    for router in {unit.router for unit in gone}:
        if 0 < (count := sum(unit.router == router for unit in left)) < least:
            raise InvalidRequest(
                f"prune leaves {count} of the experts at {router[1]} of layer {router[0]}, but its router keeps {least} of them for each "
                f"token; leave {least} or more, or remove all with '{router[1]}@{router[0]}'",
                param="prune",
            )
    return _Pruning(manifest, gone, left).pruned(tuple(sorted(set(entries))), revision)


def _named(manifest: Manifest, entries: Sequence[str]) -> list[Unit]:
    try:
        rules = rules_for(RoutingOptions(disable=tuple(entries)), manifest)
    except InvalidRequest as error:
        raise InvalidRequest(str(error).replace("moa.disable", "prune"), param="prune") from None
    if rules is None:
        raise InvalidRequest("prune names no expert; entries are like 'PROMPT', 'Q@3-9' or '*@20'", param="prune")
    gone = []
    for unit in units_of(manifest):
        rule = rules.get(*unit.router)
        disabled = [output for output in unit.outputs if rule is not None and rule.disabled >> output & 1]
        if len(disabled) == len(unit.outputs):
            gone.append(unit)
        elif disabled:
            raise InvalidRequest(
                f"prune has {len(disabled)} of the {len(unit.outputs)} experts at {unit.site} of layer {unit.layer}, but in a "
                f"{manifest.variant} what each of them weighs depends on all; remove all with '{unit.site}@{unit.layer}', or none",
                param="prune",
            )
    return gone


class _Pruning:
    """
    Args:
        gone, left: all units.
    """

    def __init__(self, manifest: Manifest, gone: Sequence[Unit], left: Sequence[Unit]) -> None:
        self.manifest = manifest
        self.removed = frozenset((unit.layer, name) for unit in gone for name in unit.experts)
        touched = {unit.router for unit in gone}
        self.orders: dict[Router, tuple[int, ...]] = {}  # the outputs of routers that lose some, as they stand behind it
        for router in manifest.routers:
            place = router.layer, router.site
            used = sorted(output for unit in left if unit.router == place for output in unit.outputs)
            if used and place in touched:
                self.orders[place] = self._order(used, router.num_outputs)

    def _order(self, used: list[int], outputs: int) -> tuple[int, ...]:
        if self.manifest.router.site == "linear" or self.manifest.router.activation == "sigmoid":
            return tuple(used)
        if used[-1] == outputs - 1:
            return tuple(range(outputs))
        return (*(output for output in range(outputs) if output not in used), *used)

    def pruned(self, entries: tuple[str, ...], revision: str) -> Pruned:
        training = self.manifest.training or {}
        before = training.get("pruned")
        note = {"revision": revision, "experts": list(entries)}
        raw = self.manifest.model_dump(mode="json", exclude_none=True) | {
            "experts": self._experts(),
            "training": training | {"pruned": [*(before if isinstance(before, list) else []), note]},
        }
        if self.manifest.profile is not None:
            raw["profile"] = self._profile(self.manifest.profile)
        manifest = Manifest.parse(raw)
        return Pruned(manifest, {name: self._source(name) for name in manifest.expected_tensors()}, self.removed)

    def _name(self, layer: int, name: str) -> str:
        """What an expert that stays is called: those of a router at a linear are numbered without gaps."""
        site, _, index = name.partition("/")
        order = self.orders.get((layer, site))
        return name if order is None or not index else f"{site}/{order.index(int(index))}"

    def _experts(self) -> list[dict[str, Any]]:
        layers: dict[tuple[int, str, int | None], list[int]] = {}
        for number, expert in enumerate(self.manifest.experts):
            for layer in expert.layers:
                if (layer, expert.name) not in self.removed:
                    layers.setdefault((number, self._name(layer, expert.name), self._column(layer, expert)), []).append(layer)
        told = [expert.model_dump(mode="json", exclude_none=True) for expert in self.manifest.experts]
        return [told[number] | {"name": name, "layers": where, "column": column} for (number, name, column), where in layers.items()]

    def _column(self, layer: int, expert: ExpertSpec) -> int | None:
        """None for its place among the layer's experts."""
        order = self.orders.get((layer, "layer"))
        if order is None:
            return expert.column
        plan = self.manifest.layer(layer)
        column = order.index(plan.columns[plan.experts.index(expert)])
        place = [other for other in plan.experts if (layer, other.name) not in self.removed].index(expert)
        return None if column == place else column

    def _profile(self, profile: dict[str, Any]) -> dict[str, Any]:
        """What it says of the experts that stay; one that cannot be read stays as it is."""
        layers = profile.get("layers")
        if not isinstance(layers, list) or not all(layer is None or isinstance(layer, dict) for layer in layers):
            return profile
        kept = [
            {self._name(index, name): use for name, use in (layer or {}).items() if (index, name) not in self.removed} or None
            for index, layer in enumerate(layers)
        ]
        return profile | {"layers": kept}

    def _source(self, tensor: str) -> tuple[str, tuple[int, ...] | None]:
        _, number, owner, *rest = tensor.split(".")  # layers.N.OWNER...
        layer, router = int(number), self.manifest.router
        site, _, index = owner.partition("/")
        place = (layer, site) if router.site == "linear" else (layer, "layer")
        order = self.orders.get(place)
        if order is None:
            return tensor, None
        if index:
            return f"layers.{layer}.{site}/{order[int(index)]}.{'.'.join(rest)}", None
        outputs = f"{site}.router" if router.site == "linear" else "router.w2" if router.net == "swiglu" else "router"
        is_of_outputs = tensor in (f"layers.{layer}.{outputs}.weight", f"layers.{layer}.{outputs}.bias")
        return tensor, order if is_of_outputs else None
