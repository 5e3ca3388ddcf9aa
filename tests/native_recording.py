"""Records steps of the native library with everything that they read, for replay.cpp to run again under sanitizers."""

import ctypes
import struct
from pathlib import Path
from typing import Any

from torch import Tensor

from moa_serve.native import library as lib
from moa_serve.native.model import NativeModel
from moa_serve.native.packing import padded


class Recording:
    """Sections of bytes, and the places in them that point to other sections. The model's struct is section 0."""

    def __init__(self, model: NativeModel, num_pages: int) -> None:
        self._model, self._num_pages = model, num_pages
        self._sections: list[bytes] = [b""]
        self._pointers: list[tuple[int, int, int]] = []
        self._steps: list[tuple[int, int]] = []
        kept: dict[int, Tensor] = {tensor.data_ptr(): tensor for tensor in model._base._kept}

        def weights(_: str, address: int) -> bytes:
            tensor = kept[address]
            return ctypes.string_at(address, tensor.numel() * tensor.element_size())

        base, layers = model._base.struct, model._base._layers
        whole = b"".join(bytes(layer) for layer in layers)
        section = self._add(whole)
        for number, layer in enumerate(layers):
            self._follow(section, number * ctypes.sizeof(lib.LayerStruct), layer, weights)
        self._sections[0] = bytes(base)
        self._follow(0, 0, base, weights, skip=("layers",))
        self._pointers.append((0, lib.ModelStruct.layers.offset, section))
        self._library, model._library = model._library, self  # type: ignore[assignment]  # it answers as the library does

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def moa_engine_step(self, engine: int, batch: lib.BatchStruct) -> int:
        place = self._add(bytes(batch))
        sizes = self._sizes(batch)
        self._follow(place, 0, batch, lambda name, address: ctypes.string_at(address, sizes[name]), skip=("spans", "segments"))
        self._structs(place, lib.BatchStruct.spans.offset, lib.SpanStruct, batch.spans, batch.num_spans, self._span)
        self._structs(place, lib.BatchStruct.segments.offset, lib.SegmentStruct, batch.segments, batch.num_segments, self._segment)
        done: int = self._library.moa_engine_step(engine, batch)
        self._steps.append((place, self._add(ctypes.string_at(batch.logits, sizes["logits"]))))
        return done

    def write(self, path: Path) -> None:
        order = [0, *(place for step in self._steps for place in step)]
        order += [place for place in range(len(self._sections)) if place not in set(order)]
        at = {place: number for number, place in enumerate(order)}
        with path.open("wb") as file:
            file.write(struct.pack("<4q", self._num_pages, self._model.config.num_layers, len(self._steps), len(order)))
            for place in order:
                file.write(struct.pack("<q", len(self._sections[place])) + self._sections[place])
            file.write(struct.pack("<q", len(self._pointers)))
            for section, offset, target in self._pointers:
                file.write(struct.pack("<3q", at[section], offset, at[target]))

    def _add(self, raw: bytes) -> int:
        self._sections.append(raw)
        return len(self._sections) - 1

    def _follow(self, section: int, offset: int, item: Any, read: Any, skip: tuple[str, ...] = ()) -> None:
        for name, kind in item._fields_:
            if kind is ctypes.c_void_p and name not in skip and getattr(item, name):
                self._pointers.append((section, offset + getattr(type(item), name).offset, self._add(read(name, getattr(item, name)))))

    def _structs(self, section: int, offset: int, kind: Any, address: int, count: int, follow: Any) -> None:
        items = (kind * count).from_address(address) if count else []
        place = self._add(b"".join(bytes(item) for item in items))
        self._pointers.append((section, offset, place))
        for number, item in enumerate(items):
            follow(place, number * ctypes.sizeof(kind), item)

    def _span(self, section: int, offset: int, span: lib.SpanStruct) -> None:
        pages = -(-(span.computed + span.count) // 16)
        self._follow(section, offset, span, lambda name, address: ctypes.string_at(address, 4 * pages))

    def _segment(self, section: int, offset: int, segment: lib.SegmentStruct) -> None:
        adapter = lib.AdapterStruct.from_address(segment.adapter)
        tokens, layers = segment.end - segment.start, adapter.num_layers
        sizes = {
            "adapter": adapter.num_bytes,
            "pooled_row": 4 * tokens,
            "pooled_spans": 8 * segment.num_pooled,
            "pooled_gates": 8 * segment.num_pooled * layers * segment.pooled_width,
            "trace": 4 * adapter.trace_width * self._num_rows(segment, tokens),
            "trace_row": 4 * tokens,
            "evaluations": 4 * tokens,
            "selected": 8 * layers * segment.counters_width,
            "gate_sum": 8 * layers * segment.counters_width,
            "computed": 8 * layers * segment.counters_width,
            "thresholds": 8 * layers,
        }
        self._follow(section, offset, segment, lambda name, address: ctypes.string_at(address, sizes[name]))

    def _num_rows(self, segment: lib.SegmentStruct, tokens: int) -> int:
        rows = (ctypes.c_int32 * tokens).from_address(segment.trace_row) if segment.trace_row else ()
        return max(rows, default=-1) + 1

    def _sizes(self, batch: lib.BatchStruct) -> dict[str, int]:
        tokens = 4 * batch.num_tokens
        logits = 4 * batch.num_logits * padded(self._model.config.vocab_size)
        names = ("token_ids", "positions", "seen_until", "seen_from")
        return dict.fromkeys(names, tokens) | {"logit_rows": 4 * batch.num_logits, "logits": logits}
