"""Compiles the kernels of moa_serve.gpu for GPUs that are not there, as a fused step launches them, and tells what each takes.

`python -m tests.gpu_kernels [--architectures 80 89 90 100] [--only NAME ...] [--max-registers N]` exits 1 where a
kernel takes more than it may, or would be compiled more than once.

That a kernel is right, Triton's interpreter shows; that a GPU could run it, only this does. It has to be a process of its own, since the
interpreter replaces kernels for good where TRITON_INTERPRET was set before they were imported.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent))

import torch
import triton
from gpu_launches import Launched, MetaModel
from support import llama_8b_config, tiny_config, tiny_manifest
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from moa_serve.gpu.layout import LORA

# Shared memory that one block may have, in bytes: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ARCHITECTURES = list(SHARED_BYTES)
FEW_BYTES = 8  # that ptxas leaves in memory of its own accord, at 64 registers of the 255 that there are

LLAMA = dataclasses.replace(llama_8b_config(), max_position=8192)
SHORT = dataclasses.replace(LLAMA, max_position=1024)  # one program has all keys of a row
QWEN3 = dataclasses.replace(LLAMA, intermediate_size=12288, vocab_size=151936, qk_norm=True)  # Qwen3-8B
QWEN2 = tiny_config(
    hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, vocab_size=152064,
    max_position=8192, qkv_bias=True,
)  # fmt: skip  # Qwen2.5-7B
PAPER: dict[str, Any] = {
    "targets": LORA, "rank": 8, "prompt_length": 10, "parallel_size": 16, "router": {"net": "swiglu", "hidden": 36},
}  # fmt: skip
NESTED: dict[str, Any] = PAPER | {"inner": "molora", "num_experts": 4, "router": {}}

CASES: dict[str, Callable[[], MetaModel]] = {
    "base": lambda: MetaModel(LLAMA),
    "alone": lambda: MetaModel(LLAMA, [tiny_manifest(LLAMA, "soft_moa", **PAPER)]),
    "soft": lambda: MetaModel(LLAMA, [tiny_manifest(LLAMA, "soft_moa", **PAPER)]),
    "apart": lambda: MetaModel(LLAMA, [tiny_manifest(LLAMA, "soft_moa", **PAPER)], gathers=True),
    "sparse": lambda: MetaModel(LLAMA, [tiny_manifest(LLAMA, "sparse_moa", **PAPER | {"router": {}})]),
    "instance": lambda: MetaModel(LLAMA, [tiny_manifest(LLAMA, "soft_moa_instance", **PAPER | {"router": {}})]),
    "molora": lambda: MetaModel(LLAMA, [tiny_manifest(LLAMA, "molora", rank=8, num_experts=8)]),
    "nested": lambda: MetaModel(LLAMA, [tiny_manifest(LLAMA, "sparse_moa", **NESTED)]),
    "lora": lambda: MetaModel(LLAMA, [tiny_manifest(LLAMA, "lora", targets=("Q", "V"), rank=8)]),
    "short": lambda: MetaModel(SHORT, [tiny_manifest(SHORT, "soft_moa", **PAPER)]),
    "qwen3": lambda: MetaModel(QWEN3, [tiny_manifest(QWEN3, "soft_moa", **PAPER)]),
    "qwen2": lambda: MetaModel(QWEN2, [tiny_manifest(QWEN2, "soft_moa", **PAPER)]),
    "float32": lambda: MetaModel(LLAMA, [tiny_manifest(LLAMA, "soft_moa", **PAPER)], torch.float32),
    "float32 apart": lambda: MetaModel(LLAMA, [tiny_manifest(LLAMA, "soft_moa", **PAPER)], torch.float32, gathers=True),
}
STEPS = ([1], [1] * 3, [1] * 16, [20, 1])
"""Tokens of the sequences of each step that is launched: rows that decode, as many as would let a kernel be compiled anew, and a prompt."""


class NoDriver:
    """What Triton asks of a GPU before it compiles. Devices are numbered by their architecture."""

    architecture = ARCHITECTURES[0]

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@dataclass(frozen=True)
class Taken:
    """What one kernel takes on one architecture."""

    registers: int
    spilled_bytes: int
    shared_bytes: int

    def problems(self, architecture: int) -> list[str]:
        found = []
        if self.spilled_bytes > FEW_BYTES:
            found.append("spills")
        if self.shared_bytes > SHARED_BYTES[architecture]:
            found.append(f"there are {SHARED_BYTES[architecture]} B shared")
        return found


def named(launched: list[Launched]) -> Iterator[tuple[str, Launched]]:
    """The kernels of a step; those that are launched behind several products are another kernel behind each."""
    products: dict[str, Iterator[str]] = {}
    for one in launched:
        if one.name == "embed":
            products = {"shrink": cycle((" QKV", " O", " GATE_UP", " DOWN")), "residual": cycle((" O", " DOWN"))}
        if one.kernel is not None:
            yield one.name + (next(products[one.name]) if one.name in products else ""), one


def kernels_of(case: str, only: tuple[str, ...]) -> dict[str, list[Launched]]:
    """By name, everything that a case's steps launch: of "base" where there are no slots, of "alone" where they are and nobody asks."""
    model, found = CASES[case](), dict[str, list[Launched]]()
    slot = None if case in ("base", "alone") else 0
    for counts in STEPS:
        for name, one in named(model.step(counts, [slot] * len(counts))):
            if f"{case}: {name}".startswith(only):
                found.setdefault(f"{case}: {name}", []).append(one)
    return found


def compiled(launched: list[Launched], max_registers: int | None) -> list[Any]:
    """As Triton compiles it when it is launched so: the kernels, each once."""
    more = {} if max_registers is None else {"maxnreg": max_registers}
    kernels = [one.kernel.warmup(*one.args, grid=one.grid, **one.options, **more) for one in launched]
    return list({id(kernel): kernel for kernel in kernels}.values())


def taken(kernel: Any) -> Taken:
    """A thread's registers and stack, from the code itself: these kernels put nothing on the stack (bytes) but what they spill."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", told)
    assert len(found) == 1, f"one kernel was expected: {told}"
    return Taken(int(found[0][0]), int(found[0][1]), kernel.metadata.shared)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_kernels")
    parser.add_argument(
        "--architectures", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES, help="90 is sm_90; all by default"
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="NAME", help="kernels whose name begins so: 'soft', or 'soft: attend_in'"
    )
    parser.add_argument("--max-registers", type=int, metavar="N", help="a thread gets no more, to see what a kernel then spills")
    args = parser.parse_args()
    driver.set_active(no_driver := NoDriver())
    known: set[tuple[int, int]] = set()
    num_bad, num_told = 0, 0
    for case in (case for case in CASES if any(case.startswith(name.partition(":")[0]) for name in args.only)):
        for name, launched in kernels_of(case, tuple(args.only)).items():
            for no_driver.architecture in args.architectures:
                start = time.perf_counter()
                kernels = compiled(launched, args.max_registers)
                seconds = time.perf_counter() - start
                if (key := (id(kernels[0]), no_driver.architecture)) in known:
                    continue  # another case's as well
                known.add(key)
                found = taken(kernels[0])
                problems = found.problems(no_driver.architecture)
                if len(kernels) > 1:
                    problems.append(f"is compiled {len(kernels)} times")
                print(  # noqa: T201
                    f"{name:24} sm_{no_driver.architecture:<4} {found.registers:3} registers {found.spilled_bytes:5} B spilled "
                    f"{found.shared_bytes:6} B shared {seconds:5.1f} s  {'; '.join(problems) or 'ok'}",
                    flush=True,
                )
                num_told += 1
                num_bad += bool(problems)
    if not num_told:
        parser.error(f"no kernel's name begins with {' or '.join(args.only)}")
    return int(num_bad > 0)


if __name__ == "__main__":
    sys.exit(main())
