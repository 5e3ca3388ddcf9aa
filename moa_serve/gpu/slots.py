"""Adapters in the slots of a GPU: `image` lays an adapter out in host memory, and `SlotBank` holds the slots and takes images into them.

An image is made in any thread, once for each stay in host memory; a slot is filled by the engine thread. On CUDA, images are pinned, and
copied on a stream of their own, behind the steps that may still read what stood in the slot; the next step waits for the copy.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moa_serve.adapter.manifest import Manifest
from moa_serve.gpu.layout import ABSENT, CONSTANT, INNER_OF, LORA_OF, PRODUCTS, SlotLayout
from moa_serve.model.batch import TracedRouter
from moa_serve.model.counters import counted_outputs
from moa_serve.model.moa import Affine, LoraExperts, Mixture, MoaLayer, MoaWeights, ParallelAdapter, Router, SwigluNet

MOST_IMAGE_BYTES = 4 * 2**30  # about fifty Soft MoA sets of an 8B base


@dataclass(eq=False, slots=True)
class SlotImage:
    """An adapter as a slot has it, in host memory; every tensor (L, ...).

    Args:
        rows: by product (L, section's rows, in), what reads the product's inputs.
        ints, floats, matrices, prompt: (L, size) of the layout's fields.
    """

    rows: dict[str, Tensor]
    ints: Tensor
    floats: Tensor
    matrices: Tensor
    prompt: Tensor

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (*self.rows.values(), self.ints, self.floats, self.matrices, self.prompt))

    def pinned(self) -> "SlotImage":
        """In memory that a copy to the device reads beside the processor."""
        rows = {product: part.pin_memory() for product, part in self.rows.items()}
        return SlotImage(rows, *(part.pin_memory() for part in (self.ints, self.floats, self.matrices, self.prompt)))


@dataclass(eq=False, slots=True, weakref_slot=True)
class SlottedAdapter:
    """What the forward knows of an adapter in a slot.

    Args:
        slot: the place in the bank; -1 before it has one.
        traced, words: the routers as a trace has them, and their words' places (W,) among (L, words of a layer), flattened.
        kept: among the same, for each expert that is counted, where it stands whether its output is selected.
    """

    manifest: Manifest
    slot: int
    traced: tuple[TracedRouter, ...]
    words: np.ndarray
    kept: np.ndarray

    @property
    def num_layers(self) -> int:
        return self.manifest.base.num_layers

    @property
    def max_outputs(self) -> int:
        return max(self.manifest.layer(index).num_outputs for index in range(self.num_layers))


def image(weights: MoaWeights, layout: SlotLayout, dtype: torch.dtype) -> SlotImage:
    """Lay out an adapter.

    Args:
        weights: on the CPU, in float32, so that each value is rounded once, here.
        dtype: of the base.
    """
    layers, config = len(weights.layers), layout.config
    out = SlotImage(
        {product: torch.zeros(layers, layout.sections[product].rows, layout.inputs(product), dtype=dtype) for product in PRODUCTS},
        torch.zeros(layers, layout.ints.size, dtype=torch.int32),
        torch.zeros(layers, layout.floats.size),
        torch.zeros(layers, layout.matrices.size, dtype=dtype),
        torch.zeros(layers, 2, config.num_kv_heads, layout.prompt_block, config.head_dim),
    )
    counted = counted_outputs(weights.manifest)
    width = max(len(weights.manifest.layer(layer).experts) for layer in range(layers))
    for index, layer in enumerate(weights.layers):
        packed = _LayerImage(out, layout, index)
        if layer is not None:
            packed.layer(layer, reads_residual=layer.reads_residual or weights.manifest.is_pooled)
        for site in layout.routers:
            if (cells := counted[index].get(site)) is not None:
                packed.counters(site, index * width + cells.first, cells.outputs, 1.0 / len(counted[index]))
    return out


class _LayerImage:
    """One layer of an image, absent until it is said otherwise."""

    def __init__(self, out: SlotImage, layout: SlotLayout, index: int) -> None:
        self._out, self._layout, self._index = out, layout, index
        for site in layout.column_sites:
            self.ints(f"{site}.row").fill_(ABSENT)
            self.ints(f"{site}.gate").fill_(CONSTANT)
            self.ints(f"{site}.inner").fill_(CONSTANT)
        self.ints("prompt.column").fill_(ABSENT)
        self.ints("prompt.inner").fill_(ABSENT)
        self.ints("counted").fill_(ABSENT)

    def ints(self, name: str) -> Tensor:
        return self._out.ints[self._index, self._layout.ints[name]]

    def floats(self, name: str) -> Tensor:
        return self._out.floats[self._index, self._layout.floats[name]]

    def _rows(self, product: str, first: int, values: Tensor) -> None:
        self._out.rows[product][self._index, first : first + len(values)] = values.to(self._out.rows[product].dtype)

    def counters(self, site: str, first: int, outputs: Sequence[int], share: float) -> None:
        """The router's counters stand from cell `first` on; its threshold is so much of the layer's mean."""
        number = self._layout.router(site)
        self.ints("counted").view(-1, self._layout.output_block)[number, : len(outputs)] = torch.tensor(outputs, dtype=torch.int32)
        self.ints("cells")[number] = first
        self.floats("shares")[number] = share

    def layer(self, layer: MoaLayer, *, reads_residual: bool) -> None:
        if layer.router is not None:
            self._layer_router(layer.router)
            self.ints("residual").fill_(int(reads_residual))
        for target, lora in layer.linears.items():
            self._lora(target, lora)
        if layer.parallel is not None:
            self._parallel(layer.parallel)
        if (prompt := layer.prompt) is not None:
            count = prompt.keys.shape[1]
            self._inner("PROMPT", prompt.mixture)
            self.ints("prompt.column").fill_(_column(prompt.mixture))
            self.ints("prompt.inner")[:count] = _inner(prompt.mixture, count)
            self.floats("head_gate").copy_(prompt.head_gate)
            kept = self._out.prompt[self._index]
            kept[0, :, :count], kept[1, :, :count] = prompt.keys, prompt.values

    # -- routers

    def _router_rows(self, product: str, first: int, rows: int, places: list[tuple[int, Affine]], bias: Tensor) -> None:
        """Rows at their places behind `first`, and once more, so many rows on, what rounding took from them."""
        dtype = self._out.rows[product].dtype
        for place, affine in places:
            weight = affine.weight.float()
            rounded = weight.to(dtype)
            self._rows(product, first + place, rounded)
            if self._layout.parts == 2:
                self._rows(product, first + rows + place, weight - rounded.float())
            if affine.bias is not None:
                bias[place : place + len(weight)] = affine.bias

    def _layer_router(self, router: Router) -> None:
        net, layout = router.net, self._layout
        number = layout.router("layer")
        places, final = [], net.w2 if isinstance(net, SwigluNet) else net.out
        if isinstance(net, SwigluNet) and not len(net.w1.weight):  # without hidden units it says its bias
            places.append((0, Affine(torch.zeros(len(final.weight), net.w1.weight.shape[1]), final.bias)))
        elif isinstance(net, SwigluNet):
            hidden, outputs = len(net.w1.weight), len(final.weight)
            places += [(0, net.w1), (layout.shape.hidden, net.w3)]
            w2 = self.floats("w2").view(layout.shape.outputs, layout.shape.hidden)
            w2[:outputs, :hidden] = final.weight
            if final.bias is not None:
                self.floats("w2.bias")[:outputs] = final.bias
            self.ints("hidden").fill_(hidden)
        else:
            places.append((0, final))
        if router.threshold_fn is not None:
            places.append((layout.gate_rows - 1, router.threshold_fn))
        self._router_rows("QKV", layout.sections["QKV"].gate, layout.gate_rows, places, self.floats("gate.bias"))
        self.ints("outputs")[number], self.ints("softmax")[number] = len(final.weight), int(router.softmax)

    def _inner(self, site: str, mixture: Mixture) -> None:
        """The router of one site."""
        router = mixture.router
        if router is None:
            return
        assert not isinstance(router.net, SwigluNet), "a router at a linear is linear"
        product = next(product for product, sites in INNER_OF.items() if site in sites)
        outputs, number = len(router.net.out.weight), self._layout.router(site)
        places = [(0, router.net.out)]
        if router.threshold_fn is not None:
            places.append((self._layout.inner_rows - 1, router.threshold_fn))
        first = self._layout.sections[product].inner[site]
        self._router_rows(product, first, self._layout.inner_rows, places, self.floats(f"{site}.bias"))
        self.ints("outputs")[number], self.ints("softmax")[number] = outputs, int(router.softmax)

    # -- experts

    def _columns(self, site: str, weight: Tensor, row: Tensor, mixture: Mixture, inner: Tensor, scale: Tensor | None) -> None:
        """A second factor (out, C), the rows (C,) that its columns take, and what weighs them."""
        count, places = weight.shape[1], self._layout.matrices[site]
        columns = self._out.matrices[self._index, places].view(self._layout.column_block(site), -1)
        columns[:count] = weight.T.to(columns.dtype)
        self.ints(f"{site}.row")[:count] = row.int()
        self.ints(f"{site}.gate")[:count] = _column(mixture)
        self.ints(f"{site}.inner")[:count] = inner
        self.floats(f"{site}.scale")[:count] = 1.0 if scale is None else scale

    def _lora(self, target: str, lora: LoraExperts) -> None:
        product = next(product for product, targets in LORA_OF.items() if target in targets)
        self._inner(target, lora.mixture)
        self._rows(product, self._layout.sections[product].a[target], lora.a)
        count = lora.b.shape[1]
        row = torch.arange(count) if lora.a_row is None else lora.a_row
        self._columns(target, lora.b, row, lora.mixture, _inner(lora.mixture, count), lora.scale)

    def _parallel(self, parallel: ParallelAdapter) -> None:
        """Its biases are columns as well, of a row that is 1."""
        self._inner("P_ADAPTER", parallel.mixture)
        self._rows("GATE_UP", self._layout.sections["GATE_UP"].parallel, parallel.down.weight)
        assert parallel.down.bias is not None, "a parallel adapter has biases"
        self.floats("parallel.bias")[: len(parallel.down.weight)] = parallel.down.bias
        count, biases = parallel.up.shape[1], len(parallel.up_bias)
        row = torch.arange(count) if parallel.down_row is None else parallel.down_row
        experts = torch.arange(biases).int() if parallel.mixture.router else torch.full((biases,), CONSTANT, dtype=torch.int32)
        self._columns(
            "P_ADAPTER",
            torch.cat((parallel.up, parallel.up_bias.T), 1),
            torch.cat((row, torch.full((biases,), CONSTANT))),
            parallel.mixture,
            torch.cat((_inner(parallel.mixture, count), experts)),
            None,
        )


def _column(mixture: Mixture) -> int:
    return CONSTANT if mixture.column is None else mixture.column


def _inner(mixture: Mixture, count: int) -> Tensor:
    """(count,) int32: which output of the expert's own router weighs each."""
    return torch.full((count,), CONSTANT, dtype=torch.int32) if mixture.inner is None else mixture.inner.int()


def slotted(weights: MoaWeights, layout: SlotLayout) -> SlottedAdapter:
    """What the forward knows of the adapter once it stands in a slot; in none yet."""
    traced: list[TracedRouter] = []
    places: list[int] = []
    kept: list[int] = []
    block, counted = layout.output_block, counted_outputs(weights.manifest)
    for index, layer in enumerate(weights.layers):
        for site, router in _routers(layer):
            final = router.net.w2 if isinstance(router.net, SwigluNet) else router.net.out
            outputs = len(final.weight)
            first = index * layout.word_width + layout.router(site) * (3 * block + 1)
            traced.append(TracedRouter(index, site, len(places), outputs))
            places += [*range(first, first + outputs), first + block]
            for part in (block + 1, 2 * block + 1):
                places += range(first + part, first + part + outputs)
            if (cells := counted[index].get(site)) is not None:
                kept += [first + block + 1 + output for output in cells.outputs]
    return SlottedAdapter(weights.manifest, -1, tuple(traced), np.array(places, dtype=np.int64), np.array(kept, dtype=np.int64))


def _routers(layer: MoaLayer | None) -> Iterator[tuple[str, Router]]:
    """In the order in which the definition asks them."""
    if layer is None:
        return
    if layer.router is not None:
        yield "layer", layer.router
    mixtures = {target: lora.mixture for target, lora in layer.linears.items()}
    if layer.prompt is not None:
        mixtures["PROMPT"] = layer.prompt.mixture
    if layer.parallel is not None:
        mixtures["P_ADAPTER"] = layer.parallel.mixture
    for site in ("Q", "K", "V", "PROMPT", "O", "UP", "GATE", "DOWN", "P_ADAPTER"):
        if site in mixtures and (router := mixtures[site].router) is not None:
            yield site, router


class SlotBank:
    """The slots: rows that products read, and what stands beside them. (S, L, ...), S first, so that a slot is one piece.

    Args:
        rows: by product, of each layer (S rows of a section, in) all slots' rows, wherever they stand.
    """

    def __init__(self, layout: SlotLayout, num_slots: int, rows: dict[str, list[Tensor]], dtype: torch.dtype, device: torch.device) -> None:
        layers, config = layout.config.num_layers, layout.config
        self.layout, self.num_slots, self.rows = layout, num_slots, rows
        self.ints = torch.zeros(num_slots, layers, max(layout.ints.size, 1), dtype=torch.int32, device=device)
        self.floats = torch.zeros(num_slots, layers, max(layout.floats.size, 1), device=device)
        # Of every layer at a multiple of 16 bytes, also where there are none: kernels are compiled once for all layers.
        self.matrices = torch.zeros(num_slots, layers, max(layout.matrices.size, 8), dtype=dtype, device=device)
        self.prompt = torch.zeros(num_slots, layers, 2, config.num_kv_heads, layout.prompt_block, config.head_dim, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._copied: list[tuple[torch.cuda.Event, SlotImage]] = []  # what copies may still read

    @property
    def num_bytes(self) -> int:
        """Beside the base's weights."""
        return sum(part.nbytes for part in (self.ints, self.floats, self.matrices, self.prompt))

    def fill(self, slot: int, found: SlotImage) -> None:
        """Copy an adapter into its slot. Who computes next on the current stream waits for it; nobody else does."""
        with self._copying() as is_pinned:
            for product, own in self.rows.items():
                rows = found.rows[product]
                first = slot * rows.shape[1]
                for stand, layer in zip(own, rows, strict=True):
                    stand[first : first + len(layer)].copy_(layer, non_blocking=is_pinned)
            for bank, part in ((self.ints, found.ints), (self.floats, found.floats), (self.matrices, found.matrices)):
                if part.numel():
                    bank[slot].copy_(part, non_blocking=is_pinned)
            if found.prompt.numel():
                self.prompt[slot].copy_(found.prompt, non_blocking=is_pinned)
        if self._stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
            self._copied = [(done, kept) for done, kept in self._copied if not done.query()]  # type: ignore[no-untyped-call]
            self._copied.append((event, found))

    @contextmanager
    def _copying(self) -> Iterator[bool]:
        """Whether the copies inside run beside the processor."""
        if self._stream is None:
            yield False
            return
        computing = torch.cuda.current_stream()
        self._stream.wait_stream(computing)  # steps that read what stood there
        with torch.cuda.stream(self._stream):
            yield True
        computing.wait_stream(self._stream)


class Images:
    """Images of adapters in host memory, by revision, the least recently used leave first; made by loader threads, taken by the engine's.

    Args:
        max_bytes: of all but the one that came last. Pinned memory is never swapped out, so it has a bound of its own.
    """

    def __init__(self, max_bytes: int = MOST_IMAGE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[SlottedAdapter, SlotImage]] = OrderedDict()

    def get(self, revision: str) -> tuple[SlottedAdapter, SlotImage] | None:
        with self._lock:
            if revision in self._kept:
                self._kept.move_to_end(revision)
            return self._kept.get(revision)

    def put(self, revision: str, adapter: SlottedAdapter, found: SlotImage) -> None:
        with self._lock:
            self._kept[revision] = (adapter, found)
            while len(self._kept) > 1 and sum(image.num_bytes for _, image in self._kept.values()) > self._max_bytes:
                self._kept.popitem(last=False)

    def drop(self, revision: str) -> None:
        with self._lock:
            self._kept.pop(revision, None)
