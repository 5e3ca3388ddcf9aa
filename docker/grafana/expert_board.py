"""Experts: what the routers of an adapter do with its traffic, layer by layer."""

from panels import (
    EXPERTS,
    HERE,
    OF_ADAPTER,
    Board,
    Panel,
    Query,
    Step,
    choice,
    graph,
    listing,
    matrix,
    mean,
    new_dashboard,
    number,
    with_rows,
)

OF_LAYER = f'{OF_ADAPTER},layer=~"$layer"'


def expert_board() -> Board:
    text = "What the routers of an adapter do with its traffic. Choose one: of several, panels without a line for each show the mean."
    adapter = choice("adapter", "Adapter", f"label_values(moa_router_tokens_total{{{HERE}}}, adapter)")
    layer = choice("layer", "Layer", f"label_values(moa_router_tokens_total{{{OF_ADAPTER}}}, layer)")
    board = new_dashboard(EXPERTS, "moa_serve: experts", text, adapter, layer)
    return with_rows(board, ("Now", _now()), ("Layer by expert", _grid()), ("Over time", _time()), ("Health", _health()))


def _now() -> list[Panel]:
    return [
        number(
            "Tokens routed",
            "Each second, in each layer.",
            "short",
            Query(
                f"sum(rate(moa_experts_per_token_count{{{OF_ADAPTER}}}[$interval])) / "
                f"count(count by (layer) (moa_router_tokens_total{{{OF_ADAPTER}}}))"
            ),
            span=4,
            base="blue",
        ),
        number(
            "Experts kept",
            "By a token, in a layer, on average.",
            "short",
            mean("moa_experts_per_token_sum", "moa_experts_per_token_count", OF_ADAPTER),
            span=4,
            base="blue",
        ),
        number(
            "Computation left out",
            "Share of experts' evaluations. 0 for a sparse adapter on the native backend: see MoaNothingSkipped.",
            "percentunit",
            mean("moa_expert_evaluations_skipped_total", "moa_expert_evaluations_total", OF_ADAPTER),
            span=4,
            base="blue",
        ),
        number(
            "Drift",
            "How far routing is from the profile of training, 0 to 1. Above 0.005: see MoaRoutingDrifts.",
            "short",
            Query(f"max(moa_router_drift{{{OF_ADAPTER}}})"),
            span=6,
            limits=[Step(0.005, "orange"), Step(0.02)],
        ),
        number(
            "Dead experts",
            "That no token has kept since the load: see MoaDeadExpert.",
            "none",
            Query(f"sum(moa_dead_experts{{{OF_ADAPTER}}})"),
            span=6,
            limits=[Step(1, "orange")],
        ),
    ]


def _grid() -> list[Panel]:
    def share(metric: str) -> str:
        return (
            f"sum by (layer, expert) (rate({metric}{{{OF_LAYER}}}[$interval])) / ignoring (expert) group_left () "
            f"sum by (layer) (rate(moa_router_tokens_total{{{OF_LAYER}}}[$interval]))"
        )

    return [
        matrix(
            "Weight",
            "Mean over all tokens of the layer, 0 for those that did not keep the expert. A dark column: that kind does little.",
            share("moa_expert_weight_total"),
            rows="layer",
            columns="expert",
            unit="none",
        ),
        matrix(
            "Selection",
            "Share of tokens that kept the expert. All 1: a soft adapter. 0: a dead expert, which pruning may take away.",
            share("moa_expert_selected_total"),
            rows="layer",
            columns="expert",
            unit="percentunit",
        ),
    ]


def _time() -> list[Panel]:
    cells = f'label_replace(rate(moa_expert_selected_total{{{OF_LAYER}}}[$interval]), "kind", "$1", "expert", "([^/.]+).*")'
    met = (
        f"label_replace(0 * rate(moa_expert_selected_total{{{OF_LAYER}}}[$interval]) + on (job, instance, adapter, layer) group_left () "
        f'rate(moa_router_tokens_total{{{OF_LAYER}}}[$interval]), "kind", "$1", "expert", "([^/.]+).*")'
    )
    return [
        graph(
            "Activation by kind",
            "Share of tokens that keep an expert of this kind, where they meet one. A change without a new revision "
            "is a change of traffic.",
            "percentunit",
            Query(f"sum by (kind) ({cells}) / sum by (kind) ({met})", "{{kind}}"),
            top=1,
        ),
        graph(
            "Weight by kind",
            "Mean weight over all tokens that met an expert of this kind.",
            "short",
            Query(f"sum by (kind) ({cells.replace('selected', 'weight')}) / sum by (kind) ({met})", "{{kind}}"),
            top=1,
        ),
        graph(
            "Threshold by layer",
            "Mean score that an expert must reach; 0 where nothing must be reached.",
            "short",
            mean("moa_router_threshold_total", "moa_router_tokens_total", OF_LAYER, "layer", "layer {{layer}}"),
            top=1,
        ),
        graph(
            "Experts per token",
            "That a token keeps in a layer, on average. Fewer are cheaper.",
            "short",
            mean("moa_experts_per_token_sum", "moa_experts_per_token_count", OF_ADAPTER, "adapter"),
        ),
        graph(
            "Computation left out by adapter",
            "Share of experts' evaluations that were not computed; always 0 with the torch backend.",
            "percentunit",
            mean("moa_expert_evaluations_skipped_total", "moa_expert_evaluations_total", OF_ADAPTER, "adapter"),
            top=1,
        ),
        graph(
            "Kept and computed",
            "Tokens that kept an expert, and tokens it was computed for, each second. Where computed is far "
            "above kept, neighbours in a batch want different experts.",
            "short",
            Query(f"sum(rate(moa_expert_selected_total{{{OF_LAYER}}}[$interval]))", "kept"),
            Query(f"sum(rate(moa_expert_computed_total{{{OF_LAYER}}}[$interval]))", "computed"),
        ),
    ]


def _health() -> list[Panel]:
    return [
        graph(
            "Drift by adapter",
            "Mean Jensen-Shannon divergence, in bits, of what the routers do lately from the profile in the manifest. Rising: "
            "traffic leaves what the adapter was trained on.",
            "short",
            Query(f"max by (adapter) (moa_router_drift{{{OF_ADAPTER}}})", "{{adapter}}"),
            limits=[Step(0.005)],
        ),
        graph(
            "Dead experts by adapter",
            "Over all layers, that no token has kept since the load.",
            "none",
            Query(f"max by (adapter) (moa_dead_experts{{{OF_ADAPTER}}})", "{{adapter}}"),
        ),
        listing(
            "Least kept",
            "The twenty experts that the smallest share of tokens keeps. 0: dead.",
            Query(
                f"bottomk(20, sum by (adapter, layer, expert) (rate(moa_expert_selected_total{{{OF_LAYER}}}[$interval])) "
                f"/ ignoring (expert) group_left () sum by (adapter, layer) "
                f"(rate(moa_router_tokens_total{{{OF_LAYER}}}[$interval])))"
            ),
            ("adapter", "layer", "expert"),
            unit="percentunit",
            value="kept",
        ),
        graph(
            "What sparsity costs",
            "By the shadow check (--shadow-share): how far the answers' log-probabilities are from those with every expert kept, and the "
            "divergence, in nats; and the share of places with another best token. Rising: the thresholds leave out what this traffic "
            "needs.",
            "short",
            mean("moa_shadow_gap_total", "moa_shadow_tokens_total", OF_ADAPTER, "adapter", "gap {{adapter}}"),
            mean("moa_shadow_kl_total", "moa_shadow_tokens_total", OF_ADAPTER, "adapter", "KL {{adapter}}"),
            mean("moa_shadow_flips_total", "moa_shadow_tokens_total", OF_ADAPTER, "adapter", "flips {{adapter}}"),
            span=24,
        ),
    ]
