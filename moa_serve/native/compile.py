"""Builds the native library with the C++ compiler of the machine. Runs when the package is installed, and from tests with sanitizers.

Imports nothing but the standard library: setup.py runs it before anything is installed. Kernels are compiled once for each instruction
set, with everything in them private to it, and the processor picks at run time.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "src"
LIBRARY = Path(__file__).resolve().parent / "_moa_native.so"

# One that a compiler does not know is left out of the library.
INSTRUCTION_SETS = {  # in the order of preference
    "amx": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DMOA_BFLOAT16_ONLY"),
    "avx512_bf16": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-DMOA_BFLOAT16_ONLY"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
}
# The uninitialized-variable warnings come from GCC's own AVX-512 headers.
_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unused-function",
          "-Wno-uninitialized", "-Wno-maybe-uninitialized")  # fmt: skip
_MACHINES = ("x86_64", "amd64")


class CannotCompile(Exception):
    """Why there is no library; the torch backend serves instead."""


def stamp() -> str:
    """Digest of the sources and flags, which the library carries: one that was built from others is not loaded."""
    digest = hashlib.sha256(repr((_FLAGS, INSTRUCTION_SETS)).encode())
    for file in sorted(SOURCES.iterdir()):
        if file.suffix in (".h", ".cpp"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:32]


def compile_library(output: Path) -> None:
    """Write the library to `output`, whole or not at all; without the instruction sets that the compiler does not know, which it tells.

    Raises:
        CannotCompile: no compiler, a processor or system that the kernels are not written for, or the compiler's own words.
    """
    with tempfile.TemporaryDirectory() as folder:
        objects = compile_objects(Path(folder), ("-O2",))
        unfinished = output.with_suffix(f".{os.getpid()}.new")
        _run([find_compiler(), "-shared", "-pthread", *map(str, objects), "-o", str(unfinished)])
        os.replace(unfinished, output)


def compile_objects(folder: Path, flags: Sequence[str]) -> list[Path]:
    """The library's object files in `folder`, with these flags for optimisation or sanitizers. Raises as `compile_library`."""
    compiler = find_compiler()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        unknown = [name for name, reason in zip(INSTRUCTION_SETS, pool.map(_why_not, INSTRUCTION_SETS.values()), strict=True) if reason]
        if len(unknown) == len(INSTRUCTION_SETS):
            raise CannotCompile(f"{Path(compiler).name} compiles none of {', '.join(unknown)}: {_why_not(INSTRUCTION_SETS[unknown[-1]])}")
        told = f'-DMOA_STAMP="{" ".join([stamp(), *unknown])}"'
        jobs: list[tuple[Path, Path, tuple[str, ...]]] = [(source, folder / f"{source.stem}.o", (told,)) for source in _plain_sources()]
        for name, machine in INSTRUCTION_SETS.items():
            if name not in unknown:
                jobs.insert(0, (SOURCES / "kernels.cpp", folder / f"kernels_{name}.o", (*machine, f"-DMOA_TABLE=moa_kernels_{name}")))
        list(pool.map(lambda job: _run([compiler, *_FLAGS, *flags, *job[2], "-c", str(job[0]), "-o", str(job[1])]), jobs))
    return [target for _, target, _ in jobs]


def _plain_sources() -> list[Path]:
    return [SOURCES / "library.cpp", SOURCES / "team.cpp"]


def find_compiler() -> str:
    """Path of the C++ compiler. Raises CannotCompile: there is none, or nothing to compile here."""
    if sys.platform != "linux" or platform.machine().lower() not in _MACHINES:
        raise CannotCompile(f"the native library is for Linux on x86-64, not {sys.platform} on {platform.machine()}")
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise CannotCompile("there is no C++ compiler (g++ or clang++); install one and the package again")


def _why_not(machine: Sequence[str]) -> str | None:
    """What the compiler says to these flags; None where it knows them."""
    try:
        _run([find_compiler(), *machine, "-fsyntax-only", "-x", "c++", os.devnull])
    except CannotCompile as error:
        return str(error)
    return None


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise CannotCompile(f"{command[0]} cannot be run: {error}") from error
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        raise CannotCompile(f"{Path(command[0]).name} failed: {lines[0] if lines else f'exit code {error.returncode}'}") from error


if __name__ == "__main__":  # python moa_serve/native/compile.py: build in place, as after a change of the sources
    compile_library(LIBRARY)
    sys.stdout.write(f"{LIBRARY} {LIBRARY.stat().st_size} bytes\n")
