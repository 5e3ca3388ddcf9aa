"""What the routers of one adapter said: of a prompt in one table, the public `Routing`, and of an answer's tokens as they are drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moa_serve.adapter.manifest import KINDS, OUTPUT_FACTORS, ExpertSpec, Manifest
from moa_serve.adapter.rules import RoutingRules
from moa_serve.model import counters
from moa_serve.model.batch import TracedRouter
from moa_serve.model.counters import counted_outputs
from moa_serve.model.moa import Routed

RoutedLayers = Mapping[int, Mapping[str, Routed]]  # layer -> site -> what its router said of some tokens


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Expert weights of T tokens in L layers; a layer's columns are its own experts in canonical order, left-aligned, the rest 0.

    Args:
        weights: (L, T, E) float32, the routers' outputs before selection.
        selected: (L, T, E) bool, the experts that were kept.
        threshold: (L, T) float32, what a weight had to reach, 0 in layers where nothing had to be; None where that is so in all of them.
            AdaMoLE has one threshold at each linear, not one a layer: None as well.
        experts: names per layer: `Q`, `PROMPT`, ... of a layer router, `Q/0`, `Q/1`, ... of routers at each linear.
        inner: nested adapters only: per outer expert (L, T, inner experts), the softmax shares inside it; 0 in layers without it.
        gates: (L, T, E) float32, the weights that counted: 0 where not selected, renormalised where the family does so.
    """

    weights: Tensor
    selected: Tensor
    threshold: Tensor | None
    experts: list[list[str]]
    inner: dict[str, Tensor] = field(default_factory=dict)
    gates: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True, slots=True, eq=False)
class TokenRouting:
    """What the routers of an adapter did for a sequence that asked, in one step or in all so far.

    Args:
        num_tokens: of the sequence that were computed; those that were computed anew count anew.
        num_evaluations: experts that were computed for them, over all layers.
        words: float32, of the token behind which one was drawn, in the order of `token_columns`; None where none was.
    """

    num_tokens: int
    num_evaluations: int
    words: npt.NDArray[np.float32] | None = None


def expert_names(manifest: Manifest) -> list[list[str]]:
    """Those of `counters.expert_names`, in the form of JSON."""
    return [list(names) for names in counters.expert_names(manifest)]


def has_thresholds(manifest: Manifest, rules: RoutingRules | None = None) -> bool:
    """Whether a layer has one threshold that its experts' weights are compared with, under a request's `rules`."""
    if manifest.router.site != "layer":
        return False
    own = manifest.router.select.kind in ("constant", "threshold_fn")
    if rules is None:  # asked for every token
        return own
    chosen = (rules.get(router.layer, router.site) for router in manifest.routers)
    return any(own if rule is None else rule.threshold is not None for rule in chosen)


def token_columns(manifest: Manifest, routers: Sequence[TracedRouter], *, with_thresholds: bool) -> npt.NDArray[np.int64]:
    """The columns of a trace that are told of a token: the weights of all layers' experts, one layer after the other and in canonical
    order, then whether each was kept, then, `with_thresholds`, those of the layers that have experts."""
    places = {(router.layer, router.site): router for router in routers}
    weights: list[int] = []
    selected: list[int] = []
    thresholds: list[int] = []
    for layer, sites in enumerate(counted_outputs(manifest)):
        for site, counted in sites.items():
            if counted.outputs:
                router = places[layer, site]
                weights += [router.start + output for output in counted.outputs]
                selected += [router.start + router.outputs + 1 + output for output in counted.outputs]
                thresholds.append(router.start + router.outputs)
    return np.array(weights + selected + (thresholds if with_thresholds else []), dtype=np.int64)


def assemble(manifest: Manifest, pieces: Sequence[RoutedLayers], num_tokens: int, rules: RoutingRules | None = None) -> Routing:
    """Join what was collected chunk by chunk under a request's `rules`, in the order of the tokens."""
    names = expert_names(manifest)
    shape = (manifest.base.num_layers, num_tokens, max(map(len, names)))
    weights, gates = torch.zeros(shape, dtype=torch.float32), torch.zeros(shape, dtype=torch.float32)
    selected = torch.zeros(shape, dtype=torch.bool)
    at_layer = manifest.router.site == "layer"
    threshold = torch.zeros(shape[:2], dtype=torch.float32) if has_thresholds(manifest, rules) else None
    inner = {name: torch.zeros(*shape[:2], max(widths), dtype=torch.float32) for name, widths in _inner_widths(manifest).items()}
    start = 0
    for piece in pieces:
        end = start
        for layer, sites in piece.items():
            plan = manifest.layer(layer)
            end = start + len(next(iter(sites.values())).scores)
            rows = (layer, slice(start, end))
            if at_layer:
                routed, columns = sites["layer"], torch.tensor(plan.columns)
                _fill(weights, selected, gates, rows, 0, routed, columns)
                if threshold is not None and routed.threshold is not None:
                    threshold[rows] = routed.threshold[:, 0].cpu()
                for site, table in inner.items():
                    if site in sites:
                        table[(*rows, slice(sites[site].scores.shape[-1]))] = sites[site].scores.cpu()
            else:
                _fill_linears(weights, selected, gates, rows, sites, plan.experts)
        start = end
    return Routing(weights, selected, threshold, names, inner, gates)


def _fill(weights: Tensor, selected: Tensor, gates: Tensor, rows: tuple[int, slice], offset: int, routed: Routed, columns: Tensor) -> None:
    place = (*rows, slice(offset, offset + len(columns)))
    weights[place] = routed.scores.cpu()[:, columns]
    selected[place] = routed.selected.cpu()[:, columns]
    gates[place] = routed.gates.cpu()[:, columns]


def _fill_linears(
    weights: Tensor, selected: Tensor, gates: Tensor, rows: tuple[int, slice], sites: Mapping[str, Routed], experts: Sequence[ExpertSpec]
) -> None:
    offset = 0
    for site in KINDS:
        count = sum(expert.site == site for expert in experts)
        if count:
            _fill(weights, selected, gates, rows, offset, sites[site], torch.arange(count))
            offset += count


def _inner_widths(manifest: Manifest) -> dict[str, list[int]]:
    """Nested experts by name, with how many inner experts they have where they stand: it may differ from layer to layer."""
    widths: dict[str, list[int]] = {}
    for expert in manifest.experts:
        if expert.inner:
            widths.setdefault(expert.name, []).append(expert.inner.num_experts)
    return widths


def unchanged_reason(manifest: Manifest, tensors: Mapping[str, Tensor], routing: Routing | None) -> str | None:
    """Why an adapter may honestly leave logits as they are: all that it adds is zero, or its routers kept nothing. None: no such reason."""
    outputs = [tensor for name, tensor in tensors.items() if name.endswith(OUTPUT_FACTORS)]
    if not any(bool(tensor.any()) for tensor in outputs) or all(expert.alpha == 0 for expert in manifest.experts):
        return "every output factor is zero, as in a fresh adapter"
    if routing is not None and not bool(routing.selected.any()):
        return "its routers selected no expert"
    return None
