"""Where the library cannot be built, one line says why and torch serves; a compiler's own words are handed on."""

import ctypes
import logging
import shutil
from pathlib import Path

import pytest
import torch
from native_tools import SETS

from moa_serve.errors import InvalidRequest
from moa_serve.llm import resolve_backend
from moa_serve.native import compile as compiling
from moa_serve.native import library as lib
from moa_serve.native import threads
from moa_serve.native.compile import LIBRARY, CannotCompile, compile_library, compile_objects

CPU = torch.device("cpu")


@pytest.mark.parametrize(("system", "machine"), [("linux", "aarch64"), ("darwin", "x86_64"), ("win32", "AMD64")])
def test_other_processors_and_systems_are_named(system: str, machine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(CannotCompile, match=f"for Linux on x86-64, not {system} on {machine}"):
        compile_library(tmp_path / "library.so")
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CannotCompile, match=r"no C\+\+ compiler"):
        compile_library(tmp_path / "library.so")


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_a_compilers_first_error_is_told_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for name in ("kernels.cpp", "library.cpp", "team.cpp"):
        (tmp_path / "src" / name).write_text("#error not today\n")
    monkeypatch.setattr(compiling, "SOURCES", tmp_path / "src")
    with pytest.raises(CannotCompile, match=r"failed: .*not today"):
        compile_objects(tmp_path, ())
    with pytest.raises(CannotCompile, match="failed"):
        compile_library(tmp_path / "library.so")
    assert not list(tmp_path.glob("library*"))


def test_a_compiler_that_cannot_be_started_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    false = tmp_path / "cxx"
    false.write_text("")
    false.chmod(0o755)
    monkeypatch.setenv("CXX", str(false))
    with pytest.raises(CannotCompile, match=r"cannot be run|failed"):
        compile_library(tmp_path / "library.so")


@pytest.mark.skipif(shutil.which("g++") is None or "avx2" not in SETS, reason="there is no compiler, or no processor for what it makes")
def test_what_the_compiler_does_not_know_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """GCC 10 knows no AMX; the other kernels are as good as ever."""
    old = tmp_path / "old-g++"
    old.write_text(f'#!/bin/sh\ncase "$*" in *-mavx512*) echo "error: what is that" >&2; exit 1;; esac\nexec {shutil.which("g++")} "$@"\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    compile_library(tmp_path / "library.so")
    library = lib.open_library(tmp_path / "library.so")
    monkeypatch.setattr(lib, "library", lambda: library)
    assert lib.instruction_sets() == ["avx2"]
    assert lib.status() == "available: avx2; built without amx, avx512_bf16, avx512, which the compiler does not know"
    total = ctypes.c_float()
    numbers = torch.ones(256)
    assert library.moa_probe_read(b"amx", numbers.data_ptr(), 256, total) == -1
    assert library.moa_probe_read(b"avx2", numbers.data_ptr(), 256, total) == 0
    assert total.value == 256
    old.write_text('#!/bin/sh\necho "error: what is that" >&2\nexit 1\n')
    with pytest.raises(CannotCompile, match=r"old-g\+\+ compiles none of amx, .*: .* what is that"):
        compile_library(tmp_path / "other.so")


@pytest.mark.skipif(not LIBRARY.is_file(), reason="the native library is not built")
def test_the_library_is_small() -> None:
    assert LIBRARY.stat().st_size <= 2 * 2**20


def test_without_the_library_auto_serves_by_torch_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lib, "library", lambda: lib.open_library(tmp_path / "_moa_native.so"))
    with caplog.at_level(logging.WARNING, logger="moa_serve"):
        assert resolve_backend("auto", CPU) == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "the torch backend serves, because the native library was not built (_moa_native.so is missing); "
        "install the package with a C++ compiler present"
    ]
    assert lib.status().startswith("not available: the native library was not built")
    with pytest.raises(InvalidRequest, match="backend 'native' cannot be used: the native library was not built"):
        resolve_backend("native", CPU)


def test_a_processor_without_the_instructions_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def moa_instruction_sets() -> bytes:
            return b""

    monkeypatch.setattr(lib, "library", Library)
    with pytest.raises(lib.NativeUnavailable, match="neither AVX-512 nor AVX2"):
        lib.instruction_sets()


def test_the_native_backend_is_not_for_cuda() -> None:
    assert resolve_backend("auto", torch.device("cuda")) != "native"
    with pytest.raises(InvalidRequest, match="computes on the CPU, and the device is cuda"):
        resolve_backend("native", torch.device("cuda"))


def test_other_pages_than_the_librarys_go_to_torch() -> None:
    assert resolve_backend("auto", CPU, 32) == "torch"
    with pytest.raises(InvalidRequest, match="its pages hold 16 tokens, and block_size is 32"):
        resolve_backend("native", CPU, 32)


@pytest.mark.skipif(not LIBRARY.is_file(), reason="the native library is not built")
def test_a_library_without_its_sources_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiling, "SOURCES", tmp_path / "none")
    with pytest.raises(lib.NativeUnavailable, match=r"sources of _moa_native\.so are not there"):
        lib.open_library(LIBRARY)


@pytest.mark.parametrize(
    ("siblings", "limit", "expected"),
    [
        (["0-1", "0-1", "2-3", "2-3"], "max 100000", 2),
        (["0", "1", "2", "3"], "200000 100000", 2),
        (["0", "1", "2", "3"], "50000 100000", 1),
    ],
)
def test_threads_follow_cores_and_quotas(
    siblings: list[str], limit: str, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for processor, text in enumerate(siblings):
        topology = tmp_path / f"cpu{processor}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(text + "\n")
    (tmp_path / "cpu.max").write_text(limit + "\n")
    monkeypatch.setattr(threads, "_PROCESSORS", tmp_path)
    monkeypatch.setattr(threads, "groups", lambda _: [(2, tmp_path)])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(len(siblings))))
    assert threads.num_threads() == expected
