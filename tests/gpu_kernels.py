"""Compiles the kernels of moa_serve.gpu for GPUs that are not there, at the shapes of LLaMA-3.1-8B, and tells what each takes.

`python -m tests.gpu_kernels [--architectures 80 89 90 100] [--only NAME] [--max-registers N]` exits 1 where a
kernel takes more than it may.

That a kernel is right, Triton's interpreter shows; that a GPU could run it, only this does. It has to be a process of its own, since the
interpreter replaces kernels for good where TRITON_INTERPRET was set before they were imported.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moa_serve.gpu import attention, shrink

# Shared memory that one block may have, in bytes: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ARCHITECTURES = list(SHARED_BYTES)


@dataclass(frozen=True)
class KernelCase:
    """One kernel as its launching function launches it.

    Args:
        signature: type of each parameter that is no constant, as "*bf16" or "i32". Pointers are multiples of 16 bytes, as torch's are.
        constants: of the kernel, and None for parameters that are left out.
        max_spilled_bytes: a thread may keep so many in memory for want of registers.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    max_spilled_bytes: int = 0


@dataclass(frozen=True)
class Taken:
    """What one kernel takes on one architecture."""

    registers: int
    spilled_bytes: int
    shared_bytes: int

    def problems(self, case: KernelCase, architecture: int) -> list[str]:
        found = []
        if self.spilled_bytes > case.max_spilled_bytes:
            found.append(f"spills more than {case.max_spilled_bytes} B")
        if self.shared_bytes > SHARED_BYTES[architecture]:
            found.append(f"there are {SHARED_BYTES[architecture]} B shared")
        return found


def attention_cases() -> Iterator[KernelCase]:
    """decode_attention of the base alone and with prompts of 10 rows; in one split and in 8; and in float32."""
    for num_splits, num_prompt_rows in ((1, 0), (1, 16), (8, 0), (8, 16)):
        yield from _attention_cases(torch.bfloat16, num_splits, num_prompt_rows)
    yield from _attention_cases(torch.float32, 8, 0)


def _attention_cases(dtype: torch.dtype, num_splits: int, num_prompt_rows: int) -> Iterator[KernelCase]:
    pages = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    given = {"q": pages, "keys": pages, "values": pages, "block_table": "*i32", "lengths": "*i32", "out": pages}
    kept = {"partial": "*fp32", "totals": "*fp32", "tops": "*fp32"}
    prompts = {
        "slots": "*i32", "gates": "*fp32", "inner": "*fp32", "prompt_keys": "*fp32", "prompt_values": "*fp32", "head_gate": "*fp32",
        "prompt_inner": "*i32", "prompt_column": "*i32",
    }  # fmt: skip
    widths = dict.fromkeys(("table_width", *attention.STRIDES), "i32")
    absent = ({} if num_splits > 1 else kept) | ({} if num_prompt_rows else prompts)
    types = {name: kind for name, kind in (given | kept | prompts | widths).items() if name not in absent}
    constants = attention.attend_constants(32, 8, 128, 16, dtype, num_splits, num_prompt_rows)
    name = f"{num_splits} splits, {'prompts' if num_prompt_rows else 'base'}{', float32' if dtype == torch.float32 else ''}"
    all_constants = constants | dict.fromkeys(absent)
    yield KernelCase(f"attend, {name}", attention.attend, types, all_constants, attention.NUM_WARPS, attention.NUM_STAGES)
    if num_splits > 1:
        types = {"lengths": "*i32", "out": pages} | kept
        yield KernelCase(f"merge, {name}", attention.merge, types, attention.merge_constants(constants), attention.NUM_WARPS)


def shrink_cases() -> Iterator[KernelCase]:
    """The section of QKV, with a layer router that reads the residual stream, in bfloat16 and in float32."""
    kept = {"chunks_ptr": "*i32", "low_ptr": "*fp32", "split_stride": "i32", "ints_ptr": "*i32", "ints_slot": "i32"}
    constants = {
        "K": 4096,
        "ROWS": 176,
        "ROUTER_ROWS": 146,
        "AT_RESIDUAL": 3,
        "C": 16,
        "N": shrink.TILE,
        "BLOCK": shrink.BLOCK,
        "SPLITS": 4,
    }
    for name, pages in (("bfloat16", "*bf16"), ("float32", "*fp32")):
        types = kept | dict.fromkeys(("a_ptr", "x_ptr", "rows_ptr"), pages)
        yield KernelCase(f"shrink, {name}", shrink.shrink, types, constants, shrink.NUM_WARPS, shrink.NUM_STAGES)


def all_cases() -> list[KernelCase]:
    """One function a module of kernels."""
    return [*attention_cases(), *shrink_cases()]


def compiled(case: KernelCase, architecture: int, max_registers: int | None) -> Taken:
    names = case.kernel.arg_names
    assert set(names) == set(case.signature) | set(case.constants), f"{case.name}: other parameters than {sorted(names)}"
    types = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if types[name].startswith("*")}
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": max_registers}
    source = ASTSource(case.kernel, types, case.constants, aligned)
    found = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spilled_bytes = registers_and_stack(found.asm["cubin"])
    return Taken(registers, spilled_bytes, found.metadata.shared)


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """A thread's, from the code itself. These kernels put nothing on the stack (bytes) but what they spill; Triton counts it so too."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", told)
    assert len(found) == 1, f"one kernel was expected: {told}"
    return int(found[0][0]), int(found[0][1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_kernels")
    parser.add_argument(
        "--architectures", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES, help="90 is sm_90; all by default"
    )
    parser.add_argument("--only", default="", metavar="NAME", help="kernels whose name begins so")
    parser.add_argument("--max-registers", type=int, metavar="N", help="a thread gets no more, to see what a kernel then spills")
    args = parser.parse_args()
    cases = [case for case in all_cases() if case.name.startswith(args.only)]
    if not cases:
        parser.error(f"no kernel's name begins with {args.only!r}")
    num_bad = 0
    for case in cases:
        for architecture in args.architectures:
            start = time.perf_counter()
            taken = compiled(case, architecture, args.max_registers)
            seconds, problems = time.perf_counter() - start, taken.problems(case, architecture)
            print(  # noqa: T201
                f"{case.name:32} sm_{architecture:<4} {taken.registers:3} registers {taken.spilled_bytes:5} B spilled "
                f"{taken.shared_bytes:6} B shared {seconds:5.1f} s  {'; '.join(problems) or 'ok'}",
                flush=True,
            )
            num_bad += bool(problems)
    return int(num_bad > 0)


if __name__ == "__main__":
    sys.exit(main())
