"""Loads the native library and mirrors its interface (src/abi.h) in ctypes. Knows no model; owned by nobody, loaded once a process."""

import ctypes
import functools
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

import torch

from moa_serve.errors import MoaError
from moa_serve.native.compile import LIBRARY, stamp

BFLOAT16, FLOAT32 = 0, 1
BASE_PLAIN, BASE_INT8 = 0, 1
STAGE_ATTENTION, STAGE_OUTPUT, STAGE_FFN, STAGE_DOWN, NUM_STAGES = range(5)
READS_STAGE, READS_RESIDUAL, READS_POOLED = range(3)
ROWS_BFLOAT16, ROWS_FLOAT32, ROWS_TILES = range(3)
SHRINK_LINEAR, SHRINK_LINEAR_SHARED, SHRINK_SILU, SHRINK_SILU_SHARED = range(4)
TARGETS = {"Q": 0, "K": 1, "V": 2, "O": 3, "GATE": 4, "UP": 5, "DOWN": 6}
PARTS = ("base", "router", "experts", "attention", "head")


class NativeUnavailable(MoaError):
    """The native backend cannot run here, and why."""


class RuleStruct(Structure):
    _fields_ = [
        *((name, c_uint64) for name in ("disabled", "forced")),
        *((name, c_int32) for name in ("has_threshold", "is_function", "subtracts", "top_k", "renormalises")),
        ("threshold", c_float),
    ]


class RouterStruct(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows_at", "row_bias_at", "w2_at", "w2_bias_at")),
        *((name, c_int32) for name in ("row_format", "num_rows", "hidden", "outputs", "source", "is_softmax", "number")),
        *((name, c_int32) for name in ("first_gate", "trace_at", "first_counter", "num_counters")),
        ("counters_at", c_int64),
        ("threshold_share", c_float),
        ("unused", c_int32),
        ("rule", RuleStruct),
    ]


class ExpertStruct(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("a_at", "a_bias_at", "b_at", "out_bias_at")),
        ("scale", c_float),
        *((name, c_int32) for name in ("rank", "outer", "inner", "coefficients_at", "unused")),
    ]


class GroupStruct(Structure):
    _fields_ = [("experts_at", c_int64), *((name, c_int32) for name in ("num_experts", "shrink", "target", "unused"))]


class PromptStruct(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("keys_at", "values_at", "head_gate_at", "row_gates_at")),
        *((name, c_int32) for name in ("num_rows", "outer")),
    ]


class LayerPlanStruct(Structure):
    """MoaAdapterLayer"""

    _fields_ = [
        *((name, c_int64) for name in ("routers_at", "groups_at")),
        ("prompt", PromptStruct),
        *((name, c_int32 * NUM_STAGES) for name in ("router_end", "shrink_end", "expand_end")),
    ]


class AdapterStruct(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layers_at", "num_bytes")),
        *((name, c_int32) for name in ("num_layers", "num_gates", "num_coefficients", "trace_width", "scratch_width", "most_prompt_rows")),
        *((name, c_int32) for name in ("dtype", "unused")),
    ]


class LayerStruct(Structure):
    """MoaLayer: base weights"""

    _fields_ = [
        (name, c_void_p)
        for name in (
            "attention_norm", "qkv_bias", "q_norm", "k_norm", "o_bias", "ffn_norm", "gate_up_bias", "down_bias",
            "qkv", "o", "gate_up", "down",
        )
    ]  # fmt: skip


class ModelStruct(Structure):
    _fields_ = [
        ("layers", POINTER(LayerStruct)),
        *((name, c_void_p) for name in ("norm", "embed", "head", "inverse_frequencies")),
        ("eps", c_float),
        *(
            (name, c_int32)
            for name in ("dtype", "num_layers", "hidden", "inner", "vocab", "heads", "kv_heads", "head_dim", "embed_is_head", "base_format")
        ),
    ]


class SpanStruct(Structure):
    _fields_ = [("pages", c_void_p), *((name, c_int32) for name in ("start", "count", "computed", "unused"))]


class SegmentStruct(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("adapter", "rules")),
        *((name, c_int32) for name in ("start", "end")),
        *((name, c_void_p) for name in ("pooled_row", "pooled_spans", "pooled_gates")),
        *((name, c_int32) for name in ("num_pooled", "pooled_width")),
        *((name, c_void_p) for name in ("trace", "trace_row", "evaluations", "selected", "gate_sum", "computed", "thresholds")),
        *((name, c_int32) for name in ("counters_width", "unused")),
    ]


class BatchStruct(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("token_ids", "positions", "seen_until", "seen_from", "spans", "segments", "logit_rows", "logits")),
        *((name, c_int32) for name in ("num_tokens", "num_spans", "num_segments", "num_logits")),
    ]


_STRUCTS = (
    RuleStruct, RouterStruct, ExpertStruct, GroupStruct, PromptStruct, LayerPlanStruct, AdapterStruct,
    LayerStruct, ModelStruct, SpanStruct, SegmentStruct, BatchStruct,
)  # fmt: skip

_FUNCTIONS = {  # name -> (result, arguments)
    "moa_instruction_sets": (c_char_p, ()),
    "moa_stamp": (c_char_p, ()),
    "moa_struct_sizes": (c_int32, (POINTER(c_int64), c_int32)),
    "moa_engine_new": (c_void_p, (POINTER(ModelStruct), c_char_p, c_int32, c_void_p, c_void_p, c_int64)),
    "moa_engine_delete": (None, (c_void_p,)),
    "moa_engine_step": (c_int32, (c_void_p, POINTER(BatchStruct))),
    "moa_engine_threads": (c_int32, (c_void_p,)),
    "moa_engine_ticks": (None, (c_void_p, POINTER(c_uint64))),
    "moa_engine_layers_done": (c_int64, (c_void_p,)),
    "moa_page_bytes": (None, (POINTER(ModelStruct), POINTER(c_int64), POINTER(c_int64))),
    "moa_probe_read": (c_int32, (c_char_p, c_void_p, c_int64, POINTER(c_float))),
    "moa_op_exp": (c_int32, (c_char_p, c_void_p, c_void_p, c_int64)),
    "moa_op_product": (c_int32, (c_char_p, c_int32, c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int64, c_void_p)),
    "moa_op_int8_product": (c_int32, (c_char_p, c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int64, c_void_p)),
    "moa_op_norm": (c_int32, (c_char_p, c_int32, c_void_p, c_void_p, c_int32, c_int64, c_float, c_void_p)),
    "moa_op_route": (c_int32, (c_char_p, c_void_p, c_int64, c_void_p, c_void_p, c_int32, c_int64, c_void_p, c_void_p)),
    "moa_op_expert": (c_int32, (c_char_p, c_int32, c_void_p, c_int64, c_void_p, c_int32, c_int64, c_void_p, c_int64, c_void_p)),
}


def open_library(path: Path) -> ctypes.CDLL:
    """The library at `path` with its functions declared.

    Raises:
        NativeUnavailable: it cannot be loaded, or it is not what these sources make.
    """
    if not path.is_file():
        raise NativeUnavailable(
            f"the native library was not built ({path.name} is missing); install the package with a C++ compiler present"
        )
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"{path.name} cannot be loaded ({error}); install the package again") from error
    built_from = _built_from(library)[0]
    try:
        ours = stamp()
    except OSError as error:
        raise NativeUnavailable(
            f"the sources of {path.name} are not there to compare it with ({error}); install the package again"
        ) from error
    if built_from != ours:
        raise NativeUnavailable(f"{path.name} was built from other sources ({built_from[:12]}, not {ours[:12]}); install the package again")
    sizes = (c_int64 * len(_STRUCTS))()
    count = library.moa_struct_sizes(sizes, len(_STRUCTS))
    if count != len(_STRUCTS) or list(sizes) != [ctypes.sizeof(struct) for struct in _STRUCTS]:
        raise NativeUnavailable(f"{path.name} has other structs than this version of the package; install the package again")
    return library


def _built_from(library: ctypes.CDLL) -> list[str]:
    """The stamp of its sources, then the instruction sets that its compiler did not know."""
    stamped: str = library.moa_stamp().decode()
    return stamped.split()


@functools.cache
def library() -> ctypes.CDLL:
    """The library of this installation. Raises NativeUnavailable."""
    return open_library(LIBRARY)


def status() -> str:
    """One line for people: what the library runs here, or why there is none."""
    try:
        best, *others = instruction_sets()
    except NativeUnavailable as error:
        return f"not available: {error}"
    unknown = _built_from(library())[1:]
    without = f"; built without {', '.join(unknown)}, which the compiler does not know" if unknown else ""
    return f"available: {best}" + (f" (also {', '.join(others)})" if others else "") + without


def has_tiles(instruction_set: str, dtype: torch.dtype) -> bool:
    """Whether the kernels want what is multiplied with a token as `packing.tiles`."""
    return instruction_set == "amx" and dtype == torch.bfloat16


def instruction_sets() -> list[str]:
    """What the library can run on this processor, best first. Raises NativeUnavailable where there is nothing."""
    names: str = library().moa_instruction_sets().decode()
    if not names:
        raise NativeUnavailable("this processor has neither AVX-512 nor AVX2 with FMA, which the native library needs")
    return names.split(",")
