"""What the fused step holds of a GPU's memory, and what it leaves for keys and values: by arithmetic, before anything is allocated.

`FusedSizes` has the parts, which the engine plans with before the model is made (`model.backend.Sizes`); `plan` shares out a card that need
not be there. Loads no Triton, so that it answers where no kernel could run. It measures nothing and allocates nothing.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from moa_serve.config import ModelConfig
from moa_serve.errors import InvalidRequest
from moa_serve.gpu.layout import PRODUCTS, SlotLayout, SlotShape
from moa_serve.gpu.placement import Placement, partial_sums
from moa_serve.gpu.rules import RuleTable
from moa_serve.gpu.slots import SlotBank
from moa_serve.model.attention import KVCache
from moa_serve.model.weights import BaseWeights, allocate

TILE = 128  # columns of a program of `residual`, `act` and `embed`
ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CUDA_BYTES = 2**30
"""Of a card that nobody has asked: what the driver keeps of it (an RTX 4090 is 24,564 MiB to nvidia-smi, and 23.64 GiB to CUDA), CUDA's
context, cuBLAS and the kernels. An assumption; a server that starts asks its device."""

_NUM_SPLITS, _ONE_SPLIT = 8, 1024  # programs that share a row's keys; and the context that one alone has
_META = torch.device("meta")


def num_splits(config: ModelConfig) -> int:
    """A row's sums depend on how many programs share them, so it is the same in every step."""
    return 1 if config.max_position <= _ONE_SPLIT else _NUM_SPLITS


def step_bytes(config: ModelConfig, num_tokens: int, context: int, itemsize: int) -> int:
    """Beside the workspace: logits and what the sampler makes of them, and what attention of one long prompt gathers and masks.

    A mask stands for every head of a group of queries, as booleans and as what is added to scores.
    """
    gathered, mask = 2 * context * config.kv_size, config.num_heads // config.num_kv_heads * num_tokens * context
    return gathered * itemsize + mask * (1 + itemsize) + 2 * num_tokens * config.vocab_size * 4


def recorded_bytes(config: ModelConfig, num_rows: int) -> int:
    """Logits and pages' tables of recorded steps, with adapters and without, and what the programs of a row leave for each other; the rest
    of what they write is the workspace's."""
    largest = next((rows for rows in ROW_BUCKETS if rows >= num_rows), ROW_BUCKETS[-1])
    rows = sum(rows for rows in ROW_BUCKETS if rows <= largest)
    logits = rows * 2 * config.vocab_size * 4
    tables = rows * -(-config.max_position // 16) * 4  # of pages of the usual size; a row's other numbers are few
    return logits + tables + split_bytes(config, num_rows)


def split_bytes(config: ModelConfig, num_rows: int) -> int:
    """Of gpu.attention.SplitResults."""
    splits = num_splits(config)
    return 0 if splits == 1 else 4 * num_rows * config.num_heads * (splits + 1) * (config.head_dim + 2)


@dataclass(frozen=True)
class FusedSizes:
    """Of a fused step that is still to be made; for `plan_memory`, to which all but the weights is still to be allocated.

    Args:
        max_tokens: of a step.
        device: where it is to be; nothing is asked of it.
    """

    config: ModelConfig
    shape: SlotShape
    num_slots: int
    max_tokens: int
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def layout(self) -> SlotLayout:
        return SlotLayout(self.config, self.shape, is_exact=self.dtype == torch.float32)

    @cached_property
    def _weights(self) -> BaseWeights:
        return allocate(self.config, _META, self.dtype)

    # -- parts

    @property
    def embedding_bytes(self) -> int:
        return self._weights.embed.nbytes

    @property
    def head_bytes(self) -> int:
        """The final norm, and the head where it is not the embedding."""
        return self._weights.norm.nbytes + (0 if self.config.tie_word_embeddings else self._weights.head.nbytes)

    @property
    def layer_bytes(self) -> int:
        return self.weight_bytes - self.embedding_bytes - self.head_bytes

    @property
    def slot_row_bytes(self) -> int:
        """Of all slots, the rows among the base's weights."""
        return self.num_slots * self.layout.row_bytes(self.dtype.itemsize)

    @cached_property
    def slot_bank_bytes(self) -> int:
        """Of all slots, what stands beside the weights, and the routers' rules."""
        bank = SlotBank(self.layout, self.num_slots, {}, self.dtype, _META)
        return bank.num_bytes + RuleTable(self.layout, self.num_slots, _META).num_bytes

    def workspace_bytes(self, num_tokens: int) -> int:
        """Of `Workspace` for so many tokens, and frequencies of positions, which the definition behind the step has once more."""
        config, layout, itemsize = self.config, self.layout, self.dtype.itemsize
        gathers = Placement(layout, self.num_slots, itemsize).gathers
        behind = 0 if gathers else self.num_slots
        rows = {product: self._base_rows(product) + behind * layout.sections[product].rows for product in PRODUCTS}
        doubled = 2 if self.shape.residual and not gathers else 1
        floats = max(doubled * rows["QKV"], rows["O"], rows["DOWN"]) + rows["GATE_UP"]
        floats += sum(splits * size for splits, size in partial_sums(layout).values()) if gathers else 0
        floats += 2 * -(-config.hidden_size // TILE) + config.num_layers * max(layout.word_width, 1)
        token = 4 * floats + itemsize * (2 * config.hidden_size + 2 * config.q_size + 2 * config.kv_size + config.intermediate_size)
        return num_tokens * token + 2 * 4 * (config.head_dim // 2)

    def _base_rows(self, product: str) -> int:
        config = self.config
        rows = {"QKV": config.q_size + 2 * config.kv_size, "GATE_UP": 2 * config.intermediate_size}
        return rows.get(product, config.hidden_size)

    @property
    def made_bytes(self) -> int:
        """What the model allocates when it is made, beside the base's weights."""
        return self.slot_row_bytes + self.slot_bank_bytes + self.workspace_bytes(self.max_tokens)

    # -- what the engine plans with

    @property
    def weight_bytes(self) -> int:
        return self._weights.num_bytes

    @property
    def beside_bytes(self) -> int:
        return 0

    def slots_bytes(self, num_slots: int) -> int:
        assert num_slots == self.num_slots, "the slots are made with the model"
        return self.slot_row_bytes + self.slot_bank_bytes

    def step_bytes(self, num_tokens: int, context: int) -> int:
        return self.workspace_bytes(num_tokens) + step_bytes(self.config, num_tokens, context, self.dtype.itemsize)

    def recorded_bytes(self, num_rows: int, context: int) -> int:
        return recorded_bytes(self.config, num_rows)

    def bytes_per_block(self, block_size: int) -> int:
        return KVCache.bytes_per_block(self.config, block_size, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How a card is shared out. The parts are bytes and add up to `total`, where the plan fits.

    Args:
        reserve: what the utilization leaves out. held: by CUDA itself and by others.
        embedding, layers, head: the base's weights. slot_rows, slot_bank: all slots, among the weights and beside them.
        workspace: intermediate results of a step. step: its logits, and what attention of a long prompt gathers.
        recorded: what recorded steps hold. kv_cache: the pages that sequences get. unused: no page, or pages that no row could use.
        short: missing bytes, 0 where it fits; else there are no pages.
        fitting_context: of tokens, where it does not fit; 0 where not even a page would.
        max_context: tokens of the longest sequence, as it was asked for or as the base has it.
    """

    total: int
    reserve: int
    held: int
    embedding: int
    layers: int
    head: int
    slot_rows: int
    slot_bank: int
    workspace: int
    step: int
    recorded: int
    kv_cache: int
    unused: int
    short: int
    fitting_context: int
    num_pages: int
    block_size: int
    max_context: int

    @property
    def weights(self) -> int:
        return self.embedding + self.layers + self.head

    @property
    def num_tokens(self) -> int:
        """That the cache holds, of all sequences together."""
        return self.num_pages * self.block_size

    @property
    def served_context(self) -> int:
        """Tokens of the longest sequence."""
        return min(self.max_context, self.num_tokens)

    def num_sequences(self, context: int) -> int:
        """How many of so many tokens are in the cache at once."""
        return self.num_pages // -(-context // self.block_size)

    @property
    def remedy(self) -> str:
        """What to do where it does not fit; "" where it does."""
        if not self.short:
            return ""
        if self.fitting_context:
            return f"lower max_model_len to {self.fitting_context}"
        parts = {
            "num_slots": self.slot_rows + self.slot_bank,
            "max_batch_tokens": self.workspace + self.step,
            "max_num_seqs": self.recorded,
        }
        if sum(parts.values()) < self.short:
            return "take a larger card or a smaller base"
        return f"lower {max(parts, key=lambda name: parts[name])}"


def plan(
    config: ModelConfig,
    shape: SlotShape,
    *,
    num_slots: int,
    max_num_seqs: int,
    max_batch_tokens: int,
    block_size: int,
    dtype: torch.dtype,
    total_bytes: int,
    utilization: float,
    held_bytes: int = CUDA_BYTES,
    max_model_len: int | None = None,
) -> MemoryPlan:
    """What fits on a card of `total_bytes`, as the engine would find at its start (`engine.plan_memory`, with the prefix cache).

    Args:
        shape: of a slot. utilization: share of the card that may be held in the end.
        held_bytes: beside this server's own tensors.
        max_model_len: tokens of the longest sequence; None for the base's own, or what fits.
    Raises:
        InvalidRequest: the base has no such context.
    """
    context = max_model_len or config.max_position
    if context > config.max_position:
        raise InvalidRequest(
            f"max_model_len {context} is more than the {config.max_position} tokens that the base was made for; lower it",
            param="max_model_len",
        )
    sizes = FusedSizes(config, shape, num_slots, max_batch_tokens, dtype, _META)
    step = step_bytes(config, max_batch_tokens, context, dtype.itemsize)
    recorded, per_page = recorded_bytes(config, max_num_seqs), sizes.bytes_per_block(block_size)
    allowed = int(total_bytes * utilization)
    room = allowed - held_bytes - sizes.weight_bytes - sizes.made_bytes - step - recorded
    whole = -(-context // block_size)
    most = 2 * max_num_seqs * whole  # all rows at the full context, and as much for who begins the same
    least = 1 if max_model_len is None else whole
    fitting = max(room, 0) // per_page
    num_pages = min(fitting, most) if fitting >= least else 0
    return MemoryPlan(
        total=total_bytes,
        reserve=total_bytes - allowed,
        held=held_bytes,
        embedding=sizes.embedding_bytes,
        layers=sizes.layer_bytes,
        head=sizes.head_bytes,
        slot_rows=sizes.slot_row_bytes,
        slot_bank=sizes.slot_bank_bytes,
        workspace=sizes.workspace_bytes(max_batch_tokens),
        step=step,
        recorded=recorded,
        kv_cache=num_pages * per_page,
        unused=max(room - num_pages * per_page, 0) if num_pages else 0,
        short=0 if num_pages else least * per_page - room,
        fitting_context=0 if num_pages else fitting * block_size,
        num_pages=num_pages,
        block_size=block_size,
        max_context=context,
    )
