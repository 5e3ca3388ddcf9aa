"""What is suggested to be pruned: within the caller's bound, in entries that `moa.disable` takes, and never more than can go."""

from collections.abc import Mapping

import pytest
import torch
from families import FAMILIES, TINY, lora, random_adapter, raw_manifest

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.prune import prune, units_of
from moa_serve.adapter.rules import RoutingOptions, rules_for
from moa_serve.errors import InvalidRequest
from moa_serve.metrics.experts import ExpertsUse, ExpertUse, LayerUse
from moa_serve.metrics.pruning import Bound, Suggestion, suggest

Cell = tuple[int, str]
ROUTED = [family for family in FAMILIES if FAMILIES[family][1]["site"] != "none"]


def adapter_of(family: str) -> Adapter:
    return Adapter(*random_adapter(family), revision="r", source_format="moa-adapter/1")


def use_of(manifest: Manifest, low: Mapping[Cell, float], *, others: float = 0.5, is_enough: bool = True) -> ExpertsUse:
    """Traffic in which experts had these shares and weights."""
    layers = []
    for layer, plan in enumerate(manifest.plans):
        shares = {expert.name: low.get((layer, expert.name), others) for expert in plan.experts}
        layers.append(LayerUse(layer, None, tuple(ExpertUse(name, share, share, share, None) for name, share in shares.items())))
    return ExpertsUse("a", "r", 1000, tuple(layers), 0.0, None, () if is_enough else None)


def suggested(family: str, low: Mapping[Cell, float], *, others: float = 0.5, limit: float | None = None) -> Suggestion:
    adapter = adapter_of(family)
    keeps_all = adapter.manifest.router.select.kind == "all"
    bound = Bound.of(adapter.manifest, None if keeps_all else limit, limit if keeps_all else None)
    found = suggest(adapter, use_of(adapter.manifest, low, others=others), bound)
    assert found is not None
    return found


def test_entries_are_ranges_of_layers() -> None:
    found = suggested("sparse_fn", {(0, "Q"): 0.0, (1, "Q"): 0.01, (2, "Q"): 0.02, (2, "PROMPT"): 0.005})
    assert (found.max_selected, found.max_weight) == (0.01, None)
    assert found.disable == ("Q@0-1", "PROMPT@2")
    assert [(one.expert, one.layers) for one in found.experts] == [("Q", (0, 1)), ("PROMPT", (2,))]
    assert found.left_out == 0


def test_a_range_passes_over_layers_without_the_expert() -> None:
    assert suggested("partial", {(0, "DOWN"): 0.0, (2, "DOWN"): 0.0}).disable == ("DOWN@0-2",)


def test_of_soft_ones_the_mean_weight_counts() -> None:
    low = {(1, "V"): 0.02, (1, "K"): 0.03}
    assert suggested("soft", low).disable == ("V@1",)
    found = suggested("soft", low, limit=0.03)
    assert (found.disable, found.max_selected, found.max_weight) == (("K@1", "V@1"), None, 0.03)


def test_a_bound_of_the_other_kind_is_refused() -> None:
    for family, bound, param in (("soft", (0.1, None), "max_selected"), ("sparse_fn", (None, 0.1), "max_weight")):
        with pytest.raises(InvalidRequest) as caught:
            Bound.of(adapter_of(family).manifest, *bound)
        assert caught.value.param == param


@pytest.mark.parametrize("family", ROUTED)
def test_whatever_is_suggested_can_be_disabled_and_pruned(family: str) -> None:
    """All experts are dead but one, all but another one, and all: the entries are valid, and save the bytes that are told."""
    adapter = adapter_of(family)
    cells = [(unit.layer, unit.experts[0]) for unit in units_of(adapter.manifest)]
    for used in (*cells[:: max(1, len(cells) // 5)], None):
        low = {cell: 0.0 for cell in cells if cell != used}
        found = suggested(family, {} if used is None else {used: 0.9}, others=0.0)
        assert found.disable, low
        rules_for(RoutingOptions(disable=found.disable), adapter.manifest)
        pruned = prune(adapter.manifest, found.disable, revision="r")
        assert pruned.removed == {(layer, one.expert) for one in found.experts for layer in one.layers}
        assert found.bytes == adapter.num_bytes - sum(tensor.nbytes for tensor in pruned.tensors(adapter.tensors).values())
        left = {expert.name for layer in range(3) for expert in pruned.manifest.layer(layer).experts}
        assert left
        assert used is None or (used[0], used[1]) not in pruned.removed


def test_experts_that_share_a_weight_go_together() -> None:
    assert suggested("unipeft", {(1, name): 0.001 for name in ("Q", "V", "DOWN")}).disable == ("Q@1", "V@1", "DOWN@1")


def test_mola_keeps_as_many_as_its_router_does() -> None:
    """Of four unused ones at a linear of which two are kept for each token, all go, or the two that are used least."""
    use = {(2, "Q/0"): 0.004, (2, "Q/1"): 0.001, (2, "Q/2"): 0.003}
    found = suggested("mola_layerwise", use)
    assert found.disable == ("Q/1@2", "Q/2@2")
    assert found.left_out == 1
    assert suggested("mola_layerwise", use | {(2, "Q/3"): 0.0}).left_out == 0


def test_a_linear_of_adamole_goes_whole_or_not_at_all() -> None:
    dead = {(0, f"Q/{index}"): 0.0 for index in range(3)}
    assert suggested("adamole", dead).disable == ()
    assert suggested("adamole", dead | {(0, "Q/3"): 0.0}).disable == ("Q@0",)


def test_there_are_never_more_entries_than_a_request_may_have() -> None:
    """Of a deep adapter with holes everywhere, the least used ones are named, and how many more there would be is told."""
    config = TINY | {"num_hidden_layers": 40}
    names = ("Q", "K", "V", "O", "DOWN")
    raw = raw_manifest("sparse_fn", config) | {"experts": [lora(name, layers=list(range(40))) for name in names]}
    manifest = Manifest.parse(raw)
    tensors = {name: torch.zeros(shape) for name, shape in manifest.expected_tensors().items()}
    adapter = Adapter(manifest, tensors, "r", "moa-adapter/1")
    low = {(layer, name): 1e-5 * layer for layer in range(0, 40, 2) for name in names}
    found = suggest(adapter, use_of(manifest, low), Bound.of(manifest, None, None))
    assert found is not None
    assert (len(found.disable), found.left_out) == (64, 36)
    assert max(layer for one in found.experts for layer in one.layers) == 24
    rules_for(RoutingOptions(disable=found.disable), manifest)


def test_too_few_tokens_say_nothing() -> None:
    adapter = adapter_of("sparse_fn")
    use = use_of(adapter.manifest, {(0, "Q"): 0.0}, is_enough=False)
    assert suggest(adapter, use, Bound.of(adapter.manifest, None, None)) is None
