"""What a kernel knows of the slots' layout when it is compiled: plain numbers, equal for all adapters."""

from dataclasses import dataclass

from moa_serve.config import linear_shape
from moa_serve.gpu.layout import INNER_OF, LORA_OF, SlotLayout, block


@dataclass(frozen=True, slots=True)
class Site:
    """One place of experts.

    Args:
        first: row of its first factor in the slot's section of the product that it reads; inner_first: of its own router.
        columns: K of its second factor, 0 where there is none; out: its outputs; at_matrix: where it stands among the slot's matrices.
        at_row, at_gate, at_inner, at_scale: of its columns, the row that each takes and what weighs it.
        router: number of its own router, at_bias: of that one's rows.
    """

    first: int = 0
    columns: int = 0
    out: int = 0
    at_matrix: int = 0
    at_row: int = 0
    at_gate: int = 0
    at_inner: int = 0
    at_scale: int = 0
    has_inner: bool = False
    inner_first: int = 0
    router: int = 0
    at_bias: int = 0
    is_parallel: bool = False


@dataclass(frozen=True, slots=True)
class Constants:
    """Of all sites; `block` is E of the kernels, `parts` how often a router's row stands."""

    block: int
    parts: int
    num_routers: int
    has_gates: bool
    has_residual: bool
    gate_rows: int
    hidden: int
    hidden_block: int
    inner_rows: int
    prompt_block: int
    at_outputs: int
    at_softmax: int
    at_hidden: int
    at_residual: int
    at_gate_bias: int
    at_w2: int
    at_w2_bias: int
    at_parallel_bias: int
    at_prompt_column: int
    at_prompt_inner: int
    at_head_gate: int
    at_counted: int
    at_cells: int
    at_shares: int
    q: Site
    k: Site
    v: Site
    prompt: Site
    o: Site
    up: Site
    gate: Site
    down: Site
    parallel: Site

    @classmethod
    def of(cls, layout: SlotLayout) -> "Constants":
        shape, ints, floats = layout.shape, layout.ints, layout.floats
        return cls(
            block=layout.output_block,
            parts=layout.parts,
            num_routers=len(layout.routers),
            has_gates=shape.outputs > 0,
            has_residual=shape.residual,
            gate_rows=layout.gate_rows,
            hidden=shape.hidden,
            hidden_block=block(shape.hidden),
            inner_rows=layout.inner_rows,
            prompt_block=layout.prompt_block,
            at_outputs=ints.at("outputs"),
            at_softmax=ints.at("softmax"),
            at_hidden=ints.at("hidden"),
            at_residual=ints.at("residual"),
            at_gate_bias=floats.at("gate.bias"),
            at_w2=floats.at("w2"),
            at_w2_bias=floats.at("w2.bias"),
            at_parallel_bias=floats.at("parallel.bias"),
            at_prompt_column=ints.at("prompt.column"),
            at_prompt_inner=ints.at("prompt.inner"),
            at_head_gate=floats.at("head_gate"),
            at_counted=ints.at("counted"),
            at_cells=ints.at("cells"),
            at_shares=floats.at("shares"),
            q=_site(layout, "Q"),
            k=_site(layout, "K"),
            v=_site(layout, "V"),
            prompt=_site(layout, "PROMPT"),
            o=_site(layout, "O"),
            up=_site(layout, "UP"),
            gate=_site(layout, "GATE"),
            down=_site(layout, "DOWN"),
            parallel=_site(layout, "P_ADAPTER"),
        )


def _site(layout: SlotLayout, site: str) -> Site:
    is_parallel = site == "P_ADAPTER"
    product = next(product for product, sites in INNER_OF.items() if site in sites)
    section, ints, floats = layout.sections[product], layout.ints, layout.floats
    has_columns = site in layout.column_sites
    if is_parallel:
        first, out = section.parallel, layout.config.hidden_size
    else:
        first = section.a.get(site, 0)
        out = linear_shape(layout.config, site)[0] if site in LORA_OF[product] else 0
    return Site(
        first=first,
        columns=layout.column_block(site) if has_columns else 0,
        out=out,
        at_matrix=layout.matrices.at(site),
        at_row=ints.at(f"{site}.row"),
        at_gate=ints.at(f"{site}.gate"),
        at_inner=ints.at(f"{site}.inner"),
        at_scale=floats.at(f"{site}.scale"),
        has_inner=site in layout.shape.inner_sites,
        inner_first=section.inner.get(site, 0),
        router=layout.router(site),
        at_bias=floats.at(f"{site}.bias"),
        is_parallel=is_parallel,
    )
