"""Where the slots' rows stand: among the base's weights, or in buffers of their own (shrink.py). Arithmetic on sizes; nothing was measured.

Behind the base's rows they take no launch, but a step with any adapter reads those of all slots. In buffers of their own it reads those of
its own adapters, in four more launches a layer.
So it matters how many bytes a GPU could read in the time of these launches. Loads no Triton.
"""

from dataclasses import dataclass

from moa_serve.config import ModelConfig, linear_shape
from moa_serve.gpu.layout import PRODUCTS, SlotLayout

LAUNCH_SECONDS = 2e-6  # of a small kernel in a CUDA graph, about; not measured here
SLOWEST_MEMORY = 2.04e12  # bytes/s of an A100; on faster ones the same launches are worth more bytes
MOST_BYTES = len(PRODUCTS) * LAUNCH_SECONDS * SLOWEST_MEMORY
"""Of all slots' rows in a layer: 16.3 MB. So many are read in the time of the launches; with more, the launches are the cheaper ones."""

_SPLIT, _MOST_SPLITS = 1024, 16
_LINEARS = ("Q", "K", "V", "O", "GATE", "UP", "DOWN")


@dataclass(frozen=True, slots=True)
class Placement:
    """Of the rows of `num_slots` slots of one layout; `itemsize`: bytes of a number of the base."""

    layout: SlotLayout
    num_slots: int
    itemsize: int

    @property
    def slot_bytes(self) -> int:
        """Of one slot's rows in one layer."""
        sections = self.layout.sections
        return self.itemsize * sum(sections[product].rows * self.layout.inputs(product) for product in PRODUCTS)

    @property
    def bytes(self) -> int:
        """Of all slots' rows in all layers."""
        return self.layout.config.num_layers * self.num_slots * self.slot_bytes

    @property
    def share(self) -> float:
        """Of the base's bytes that a step reads."""
        return self.bytes / base_bytes(self.layout.config, self.itemsize)

    @property
    def gathers(self) -> bool:
        """Whether they had better stand in buffers of their own."""
        return self.num_slots * self.slot_bytes > MOST_BYTES

    def step_bytes(self, tokens: int, adapters: int, *, gathers: bool) -> int:
        """What a step of so many tokens moves for the rows of `adapters` slots: rows, and their products written and read once."""
        if gathers:
            products = sum(splits * rows for splits, rows in partial_sums(self.layout).values())
        else:
            products = self.num_slots * sum(section.rows for section in self.layout.sections.values())
        if not gathers and self.layout.shape.residual:  # the first product has the residual stream's rows as well, the base's part too
            config = self.layout.config
            products += self.layout.sections["QKV"].rows * self.num_slots + config.q_size + 2 * config.kv_size
        rows = self.slot_bytes * (adapters if gathers else self.num_slots)
        return self.layout.config.num_layers * (rows + 2 * 4 * tokens * products)

    def told(self, gathers: bool) -> str:
        """For the log: where they stand, and why."""
        layer = self.num_slots * self.slot_bytes
        sizes = f"rows of {self.num_slots} slots are {layer / 1e6:.3g} MB a layer, {self.share:.1%} of the base"
        limit = f"{MOST_BYTES / 1e6:.3g} MB"
        if gathers:
            return f"{sizes}: in buffers of their own, for four launches more in a layer; among the base's weights they stand up to {limit}"
        return f"{sizes}: among the base's weights, at no launch; from {limit} on they stand in buffers of their own"


def partial_sums(layout: SlotLayout) -> dict[str, tuple[int, int]]:
    """By product (splits, rows), of float32 numbers for each token, what the shrink writes: parts of its own slot's rows' products."""
    return {product: (input_splits(layout.inputs(product)), section.rows) for product, section in layout.sections.items()}


def input_splits(inputs: int) -> int:
    """Programs that share a row's inputs, about 1024 each: without, a step of one chunk would keep a tenth of a GPU busy.

    It depends on the base alone: a token's sums are the same in every step. The kernels that read the sums add them up again in each of
    their programs, so there are not more. Chosen by arithmetic; not measured.
    """
    return min(max(inputs // _SPLIT, 1), _MOST_SPLITS)


def base_bytes(config: ModelConfig, itemsize: int) -> int:
    """What a step reads of the base: all linears and the head."""
    linears = sum(rows * columns for rows, columns in (linear_shape(config, name) for name in _LINEARS))
    return itemsize * (config.num_layers * linears + config.vocab_size * config.hidden_size)
