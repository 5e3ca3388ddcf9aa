"""Where a step's intermediate results stand: a `Workspace` is allocated once, `Views` are of a step, `Low` of slots' products."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moa_serve.config import ModelConfig
from moa_serve.gpu.layout import SlotLayout
from moa_serve.gpu.placement import partial_sums
from moa_serve.gpu.plan import TILE


class Workspace:
    """Intermediate results of up to `max_tokens` tokens, at fixed addresses, so that a step allocates nothing. plan.py counts its bytes.

    Args:
        rows: by product, of the weights that it reads. gathers: the slots' rows are none of these.
    """

    def __init__(
        self, config: ModelConfig, layout: SlotLayout, rows: dict[str, int], max_tokens: int, dtype: torch.dtype, device: torch.device, *,
        gathers: bool,
    ) -> None:  # fmt: skip
        self._rows, self._config = rows, config
        self.num_tiles = -(-config.hidden_size // TILE)
        most = max(doubled(layout, gathers) * rows["QKV"], rows["O"], rows["DOWN"])

        def new(numbers: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(max_tokens * numbers, dtype=kind, device=device)

        self._narrow, self._wide = new(most), new(rows["GATE_UP"])
        self._stream = new(2 * config.hidden_size, dtype)
        self._q, self._k, self._v = (new(size, dtype) for size in (config.q_size, config.kv_size, config.kv_size))
        self._mixed, self._z = new(config.q_size, dtype), new(config.intermediate_size, dtype)
        self._squares, self._m_squares = new(self.num_tiles), new(self.num_tiles)
        self._low: dict[str, Tensor] = {}
        if gathers:
            for product, (splits, own) in partial_sums(layout).items():
                self._low[product] = new(splits * own).view(splits, max_tokens, own)
        self._words = new(config.num_layers * max(layout.word_width, 1))
        self._word_width = max(layout.word_width, 1)
        self.max_tokens = max_tokens

    def views(self, tokens: int) -> "Views":
        """For a step of so many tokens."""
        config = self._config

        def view(flat: Tensor, *shape: int) -> Tensor:
            return flat[: int(np.prod(shape))].view(shape)

        stream = view(self._stream, 2 * tokens, config.hidden_size)
        return Views(
            a=stream[:tokens],
            x=stream[tokens:],
            both=stream,
            q=view(self._q, tokens, config.num_heads, config.head_dim),
            k=view(self._k, tokens, config.num_kv_heads, config.head_dim),
            v=view(self._v, tokens, config.num_kv_heads, config.head_dim),
            mixed=view(self._mixed, tokens, config.num_heads, config.head_dim),
            z=view(self._z, tokens, config.intermediate_size),
            squares=view(self._squares, tokens, self.num_tiles),
            m_squares=view(self._m_squares, tokens, self.num_tiles),
            words=view(self._words, config.num_layers, tokens, self._word_width),
            low={product: low[:, :tokens] for product, low in self._low.items()},
            narrow=self._narrow,
            wide=self._wide,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """Of a workspace: x the residual stream and a = x * g, what a product reads; one behind the other in `both`.

    `low`: by product (splits, T, rows of a slot), products of slots' rows, where these stand in buffers of their own.
    """

    a: Tensor
    x: Tensor
    both: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mixed: Tensor
    z: Tensor
    squares: Tensor
    m_squares: Tensor
    words: Tensor
    low: dict[str, Tensor]
    narrow: Tensor
    wide: Tensor


def doubled(layout: SlotLayout, gathers: bool) -> int:
    """Of the first product: its rows read the norm, and once more the residual stream, where routers among them do."""
    return 2 if layout.shape.residual and not gathers else 1


@dataclass(frozen=True, slots=True, eq=False)
class Low:
    """Products of slots' rows.

    Args:
        first: (splits, T, rows) float32, from the first row of slot 0 on; what counts is the sum of the splits.
        slot: how much further the next slot's are; 0 where a token has those of its own slot only.
    """

    first: Tensor
    slot: int

    @property
    def splits(self) -> int:
        return len(self.first)

    @property
    def split(self) -> int:
        """From one to the next. It does not depend on a step's tokens, or kernels would be compiled again."""
        return self.first.stride(0) if self.splits > 1 else 0

    @property
    def stride(self) -> int:
        return self.first.stride(1)
