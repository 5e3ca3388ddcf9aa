"""What slots' rows cost in a decode step, among the base's weights and in buffers of their own (moa_serve.gpu.placement). Nothing is run.

    python -m tests.slot_rows

Of each form the bytes that a step moves for adapters beside the base's own, as a share of these; and what the launches that the second one
adds come to if a GPU read memory in their time instead. Every row of the step has its own adapter as far as there are slots.
"""

import argparse

from rich import box
from rich.console import Console
from rich.table import Table

from moa_serve.bench.shapes import SHAPES, shapes_of
from moa_serve.gpu.layout import PRODUCTS, SlotLayout, SlotShape
from moa_serve.gpu.placement import LAUNCH_SECONDS, Placement, base_bytes

BANDWIDTHS = {"A100": 2.04e12, "H100": 3.35e12}  # bytes/s
ITEMSIZE = 2  # bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.slot_rows")
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3.1-8b", help="of the base")
    parser.add_argument("--slots", nargs="+", type=int, default=[4, 8, 16, 32, 64])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64], help="of the step")
    args = parser.parse_args()
    config = shapes_of(args.shapes)
    layout, base = SlotLayout(config, SlotShape.usual(), is_exact=False), base_bytes(config, ITEMSIZE)
    launches = {name: config.num_layers * len(PRODUCTS) * LAUNCH_SECONDS * speed / base for name, speed in BANDWIDTHS.items()}
    columns = ("slots", "rows", "among", "apart", *(f"with launches, {name}" for name in BANDWIDTHS), "chosen")
    table = Table(*columns, box=box.SIMPLE, caption="of the base's bytes; computed, not measured", caption_justify="left")
    for num_slots in args.slots:
        placement = Placement(layout, num_slots, ITEMSIZE)
        for rows in args.rows:
            adapters = min(rows, num_slots)
            among, apart = (placement.step_bytes(rows, adapters, gathers=gathers) / base for gathers in (False, True))
            totals = [f"{apart + share:.1%}" for share in launches.values()]
            table.add_row(str(num_slots), str(rows), f"{among:.1%}", f"{apart:.1%}", *totals, "apart" if placement.gathers else "among")
    console = Console(width=120)
    console.print(f"{args.shapes}, bfloat16, {base / 1e9:.1f} GB a step, usual slots of {placement.slot_bytes / 1e6:.2f} MB a layer")
    console.print(table)


if __name__ == "__main__":
    main()
