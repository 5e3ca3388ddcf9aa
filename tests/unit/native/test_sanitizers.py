"""The native library under the address, undefined-behaviour and thread sanitizers, on recorded steps of every family."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, write_base, write_family
from native_recording import Recording
from native_tools import SETS

from moa_serve import LLM, SamplingParams
from moa_serve.engine.request import Request
from moa_serve.native import library as lib
from moa_serve.native.compile import SOURCES, compile_objects
from moa_serve.native.library import has_tiles
from moa_serve.native.model import NativeModel

pytestmark = pytest.mark.skipif(not SETS or shutil.which("g++") is None, reason="the native library is not built")
DRIVER = Path(__file__).parents[2] / "native_replay" / "replay.cpp"


TILED, OTHERS = ([name for name in SETS if has_tiles(name, torch.bfloat16) is tiled] for tiled in (True, False))
CASES = [  # dtype, the base's, what is recorded with and whatever reads the same layout
    ("float32", "auto", SETS), ("bfloat16", "auto", TILED), ("bfloat16", "int8", TILED), ("bfloat16", "int8", OTHERS),
]  # fmt: skip
CASES = [case for case in CASES if case[2]]


@pytest.fixture(scope="module", params=CASES, ids=[f"{dtype}-{base_dtype}-{names[0]}" for dtype, base_dtype, names in CASES])
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A prefill in chunks and some decode steps with every family in one batch, and choices of one prompt."""
    dtype, base_dtype, names = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib, "instruction_sets", lambda: names)
        return record(tmp_path_factory, dtype, base_dtype), names


def record(tmp_path_factory: pytest.TempPathFactory, dtype: str, base_dtype: str) -> Path:
    root = tmp_path_factory.mktemp("recording")
    adapters = {family: write_family(root / family, family) for family in FAMILIES}
    options: dict[str, Any] = {"kv_cache_bytes": 2**21, "max_batch_tokens": 64, "num_slots": len(FAMILIES), "base_dtype": base_dtype}
    with LLM(write_base(root / "base"), adapters=adapters, backend="native", dtype=dtype, device="cpu", **options) as llm:
        model = llm._engine.model
        assert isinstance(model, NativeModel)
        made = Recording(model, llm._engine.block_pool.num_blocks)
        names = [None, *FAMILIES]
        prompts = [[(3 * place + 7 * index) % 96 for index in range(1 + 3 * place)] for place in range(len(names))]
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=3), adapter=names)
        llm.score_choices([[1, 2, 3, 4]], [[[5, 6], [7]]], adapter="nested_hydra")
        llm.route([4, 5, 6], adapter="sparse_fn")
        for family, asks in (
            ("sparse_fn", True),
            ("sparse_fn", False),
            ("instance", True),
        ):  # a trace of some tokens, and what was computed
            revision, manifest = llm._resolve(family)
            assert manifest is not None
            params = SamplingParams(temperature=0, max_tokens=3)
            llm._engine.add(Request(tuple(range(70)), params, revision, manifest.is_pooled, return_routing=asks))
        while llm._engine.has_work:
            llm._engine.step()
        made.write(root / "steps.bin")
    return root / "steps.bin"


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_nothing_is_found(sanitizer: str, recording: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    file, names = recording
    folder = tmp_path_factory.getbasetemp() / f"replay-{sanitizer.replace(',', '-')}"
    program = folder / "replay"
    if not program.exists():
        folder.mkdir(exist_ok=True)
        flags = ("-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
        objects = compile_objects(folder, flags)
        subprocess.run(
            ["g++", "-std=c++17", *flags, f"-I{SOURCES}", str(DRIVER), *map(str, objects), "-pthread", "-o", str(program)], check=True
        )
    for name in names[:1] if sanitizer == "thread" else names:
        for threads in ("1", "3"):
            done = subprocess.run([str(program), str(file), name, threads], capture_output=True, text=True, timeout=120, check=False)
            told = done.stderr[-3000:]
            if name == names[0]:
                assert done.returncode == 0, told
            else:  # another instruction set adds up otherwise, so its logits are not those recorded
                assert "Sanitizer" not in told, told
                assert "runtime error" not in told, told
