"""The doctor must not call ill what is well, and above all not well what is ill: each check meets what it is there for."""

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from families import TINY, base_tensors, write_base
from native_tools import SETS
from typer.testing import CliRunner, Result

from moa_serve import LLM, Completion
from moa_serve.__main__ import app
from moa_serve.bench import goals
from moa_serve.bench.timing import Spread
from moa_serve.config import ModelConfig
from moa_serve.engine.request import TokenLogprob
from moa_serve.errors import InvalidRequest
from moa_serve.model.cache import cache_dir
from moa_serve.native import library as native
from moa_serve.shell import terminal
from moa_serve.shell.doctor import findings, golden, installation, parity, report, speed
from moa_serve.shell.doctor.checks import COMPUTING, INSTALLATION
from moa_serve.shell.doctor.findings import Check, Checked, Finding, Subject
from moa_serve.shell.doctor.installation import Gpu, judged_gpu
from moa_serve.shell.doctor.made_up import RECIPES, SMALL, write_family, written
from moa_serve.shell.doctor.made_up import TINY as TINY_GOLDEN

ON_CPU = Subject(device="cpu")
BACKENDS = ["torch", pytest.param("native", marks=pytest.mark.skipif(not SETS, reason="the native library is not built"))]
HAS_CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MOA_") and name != "MOA_CACHE_DIR"]:
        monkeypatch.delenv(name)


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """It is loaded anew in the test, and again after it."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.fixture
def without_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_NVIDIA_DRIVER", Path("/nowhere"))
    monkeypatch.setenv("PATH", "")


def is_bad(finding: Finding, verdict: str, *words: str) -> None:
    """It is told, and what to do is told, too."""
    assert finding.verdict == verdict, finding
    for word in words:
        assert word in finding.found, finding
    assert finding.advice


# -- installation


@pytest.mark.parametrize("check", [check for check in INSTALLATION if check.name != "base"], ids=lambda check: check.name)
def test_nothing_is_wrong_with_the_machine_that_runs_this(check: Check) -> None:
    """A check that warns of every machine is soon read by nobody; the default base may or may not have been fetched."""
    finding = check.look(ON_CPU)
    if check.name in ("native library", "compiler") and not SETS:
        pytest.skip("the native library is not built")
    assert finding.verdict in ("ok", "skipped"), finding
    assert finding.found


def test_a_package_that_is_missing_or_of_another_version_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch<2", "rich>=1", "no-such-package-as-this>=3", "absent; extra == 'train'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    finding = installation.packages(ON_CPU)
    is_bad(finding, "failed", "torch is 2.", "not <2", "no-such-package-as-this is missing")
    assert "rich" not in finding.found
    assert "absent" not in finding.found


@pytest.mark.parametrize(
    ("cuda", "has_driver", "device", "verdict", "word"),
    [
        (None, False, "auto", "ok", "built for CPU"),
        (None, True, "auto", "warning", "there is an NVIDIA driver"),
        (None, False, "cuda", "failed", "CUDA was asked for"),
        ("12.8", True, "auto", "warning", "cannot use the driver"),
        ("12.8", False, "auto", "ok", "a CPU build would do"),
    ],
)
@pytest.mark.usefixtures("without_driver")
def test_torch_must_fit_what_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str | None, has_driver: bool, device: str, verdict: str, word: str
) -> None:
    """A GPU that stands idle because torch was built for CPUs is the commonest mistake of all."""
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if has_driver:
        monkeypatch.setattr(installation, "_NVIDIA_DRIVER", tmp_path)
    finding = installation.torch_build(Subject(device=device))
    assert finding.verdict == verdict
    assert word in finding.found
    assert bool(finding.advice) == (verdict != "ok")


def test_triton_is_missed_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    assert installation.triton(ON_CPU).verdict == "skipped"
    is_bad(installation.triton(Subject(is_on_gpu=True)), "warning", "not installed")


@pytest.mark.usefixtures("without_driver")
def test_without_a_compiler_it_matters_whether_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image without one, whose library was built before, is well."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(installation, "_has_native", lambda: True)
    assert installation.compiler(ON_CPU).verdict == "ok"
    is_bad(installation.compiler(Subject(is_on_gpu=True)), "warning", "no C++ compiler")
    monkeypatch.setattr(installation, "_has_native", lambda: False)
    is_bad(installation.compiler(ON_CPU), "warning", "no C++ compiler")


@pytest.mark.skipif(not SETS, reason="the native library is not built")
@pytest.mark.usefixtures("fresh_library")
def test_a_library_of_other_sources_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an update without a rebuild torch serves, several times slower, and nothing else says so."""
    monkeypatch.setattr(native, "stamp", lambda: "0" * 32)
    is_bad(installation.native_library(ON_CPU), "warning", "built from other sources")
    is_bad(installation.native_library(replace(ON_CPU, backend="native")), "failed", "built from other sources")


@pytest.mark.usefixtures("fresh_library")
def test_a_library_that_was_not_built_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    is_bad(installation.native_library(ON_CPU), "warning", "was not built")


def test_a_library_whose_compiler_was_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "instruction_sets", lambda: ["avx2"])
    monkeypatch.setattr(native, "status", lambda: "available: avx2; built without amx, which the compiler does not know")
    is_bad(installation.native_library(ON_CPU), "warning", "without amx")


def test_a_processor_without_avx2_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_processor", lambda: ({"sse2"}, "Old"))
    is_bad(installation.processor(ON_CPU), "warning", "Old")
    monkeypatch.setattr(installation, "_processor", lambda: ({"avx2", "fma", "amx_tile", "amx_bf16"}, "New"))
    assert installation.processor(ON_CPU) == Finding("ok", "New: AVX2, FMA, AMX, AMX bfloat16")


def test_a_quota_of_less_than_a_core_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "quotas", lambda: [4, 0])
    is_bad(installation.cores(ON_CPU), "warning", "less than one")
    monkeypatch.setattr(installation, "quotas", lambda: [4])
    assert "a quota of 4" in installation.cores(ON_CPU).found


@pytest.mark.parametrize(("more", "verdict"), [(-1, "failed"), (0, "warning"), (2**31, "ok")])
def test_memory_is_held_against_the_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: int, verdict: str) -> None:
    """Without room for the weights the start ends; with hardly more the process is killed later, which is worse."""
    subject = replace(ON_CPU, model=str(write_base(tmp_path / "base")), backend="torch")
    needed = installation._weight_bytes(subject)
    assert needed == sum(tensor.nbytes for tensor in base_tensors(TINY).values())
    monkeypatch.setattr(installation, "available_bytes", lambda device: needed + more)
    finding = installation.memory(subject)
    assert finding.verdict == verdict
    assert bool(finding.advice) == (verdict != "ok")


def test_few_open_files_are_told() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        is_bad(installation.open_files(ON_CPU), "warning", "256, enough for 128 connections of 1,024")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_cache_folder_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOA_CACHE_DIR", str(tmp_path / "file"))
    is_bad(installation.cache_folder(ON_CPU), "warning", "cannot be written")


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOA_CACHE_DIR", str(tmp_path / "not" / "yet"))
    assert installation.cache_folder(ON_CPU).verdict == "ok"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    is_bad(installation.cache_folder(ON_CPU), "warning", "0.0 GiB free")


@pytest.mark.parametrize("model", [None, "nobody/has-this-base"])
def test_a_base_that_was_not_fetched_is_told_and_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str | None) -> None:
    """Whoever asks how an installation is does not ask for a download."""
    monkeypatch.setenv("MOA_CACHE_DIR", str(tmp_path))
    is_bad(installation.base(replace(ON_CPU, model=model)), "warning", "not fetched yet")
    assert list(tmp_path.iterdir()) == []


def test_a_base_is_looked_at_without_reading_its_weights(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    subject = replace(ON_CPU, model=str(folder))
    assert installation.base(subject).verdict == "ok"
    (folder / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 4}))
    is_bad(installation.base(subject), "failed", "is missing")
    (folder / "model.safetensors").write_bytes(b"short")
    is_bad(installation.base(subject), "failed")
    is_bad(installation.base(replace(ON_CPU, model=str(folder / "config.json"))), "failed", "a GGUF file")
    is_bad(installation.base(replace(ON_CPU, model=str(tmp_path / "none"))), "failed", "no such folder")


# -- the GPU, made up


GOOD = Gpu("NVIDIA H100", (9, 0), 80 * 2**30, 79 * 2**30, 1, driver="570.1", num_others=0, ecc="Enabled", ecc_errors="0", mig="Disabled")


def test_a_good_gpu_is_ok() -> None:
    finding = judged_gpu(GOOD, 16 * 2**30)
    assert finding.verdict == "ok"
    assert finding.found == "NVIDIA H100, compute capability 9.0, 79.0 GiB free of 80.0 GiB, driver 570.1, ECC is enabled"
    assert judged_gpu(Gpu("any", (9, 0), 2, 2, 1), None).verdict == "ok"


@pytest.mark.parametrize(
    ("changed", "verdict", "word"),
    [
        ({"capability": (7, 5)}, "warning", "below 8.0"),
        ({"num_others": 1}, "warning", "another process computes on it"),
        ({"num_others": 2}, "warning", "2 other processes compute on it"),
        ({"free_bytes": 40 * 2**30}, "warning", "somebody holds its memory"),
        ({"free_bytes": 2**30}, "failed", "weights take 16.0 GiB"),
        ({"is_built_for": False}, "failed", "no kernels for 9.0"),
        ({"ecc_errors": "3"}, "failed", "3 uncorrected memory errors"),
    ],
)
def test_what_is_wrong_with_a_gpu_is_told(changed: dict[str, Any], verdict: str, word: str) -> None:
    is_bad(judged_gpu(replace(GOOD, **changed), 16 * 2**30), verdict, word)


@pytest.mark.parametrize(
    ("capability", "architectures", "is_built"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_100"], True),
    ],
)
def test_kernels_run_on_their_major_version_and_portable_code_on_newer(
    capability: tuple[int, int], architectures: list[str], is_built: bool
) -> None:
    assert installation._is_built_for(capability, architectures) is is_built


def test_a_gpu_is_read_with_and_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tool may be missing, or not know a part of MIG by its name; then less is known, and nothing fails."""
    properties = SimpleNamespace(name="NVIDIA A10", major=8, minor=6, uuid="abc")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: properties)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (3, 4))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_80"])
    monkeypatch.setenv("PATH", str(tmp_path), prepend=None)
    plain = Gpu("NVIDIA A10", (8, 6), 4, 3, 2)
    assert installation.read_gpu() == plain
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        f"#!/bin/sh\ncase \"$*\" in *GPU-abc*) exit 6;; *apps*) echo {os.getpid()}; echo 7;; *) echo '570.1, Enabled, 0, [N/A]';; esac\n"
    )
    tool.chmod(0o755)
    assert installation.read_gpu() == replace(plain, driver="570.1", num_others=1, ecc="Enabled", ecc_errors="0")


@pytest.mark.skipif(HAS_CUDA, reason="there is a CUDA device")
def test_a_gpu_that_is_asked_for_and_absent_fails() -> None:
    is_bad(installation.gpu(Subject(device="cuda", is_on_gpu=True)), "failed", "finds no CUDA device")


# -- lists of checks


def test_a_check_that_raises_has_failed_and_the_others_go_on() -> None:
    def broken(subject: Subject) -> Finding:
        raise KeyError("x")

    def refused(subject: Subject) -> Finding:
        raise InvalidRequest("backend: cannot be had; take another")

    heard: list[str] = []
    checks = [Check("a", broken), Check("b", refused), Check("c", lambda subject: Finding("ok", "fine"))]
    found = list(findings.run(checks, Subject(on_progress=heard.append)))
    assert [(one.name, one.finding.verdict) for one in found] == [("a", "failed"), ("b", "failed"), ("c", "ok")]
    assert found[1].finding.found == "backend: cannot be had; take another"
    assert heard == ["a", "b", "c"]
    assert findings.verdict_of(found) == "do not trust it, because a and b failed"
    assert findings.verdict_of(found + found[:1]) == "do not trust it, because a, b and a failed"


def test_a_warning_is_no_reason_for_distrust() -> None:
    found = [Checked("bench", Finding("warning", "slow"), 1.0), Checked("GPU", Finding("skipped", "none"), 0.0)]
    assert findings.trusted(found)
    assert findings.verdict_of(found) == "trust it, and read what is said of bench"
    assert findings.verdict_of(found[1:]) == "trust it"


# -- parity


def test_the_golden_numbers_are_the_definitions() -> None:
    """Where the definition changes and the file does not, every installation would be called ill."""
    with written(TINY_GOLDEN) as (base, adapters), parity._definition(base, adapters) as llm:
        close = parity.closeness(golden.compute(llm), golden.read())
    assert max(one.largest for one in close.values()) <= 5e-5
    assert not sum(one.flips for one in close.values())
    assert {"base", *RECIPES} == set(close)
    assert golden.FILE.stat().st_size < 300_000


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", [parity.golden_numbers, parity.swaps, parity.kernels], ids=lambda check: check.__name__)
def test_what_serves_here_is_right(check: Callable[[Subject], Finding], backend: str) -> None:
    before = os.environ.get("MOA_CACHE_DIR"), torch.get_num_threads()
    finding = check(replace(ON_CPU, backend=backend))
    assert finding.verdict == ("skipped" if (check, backend) == (parity.kernels, "torch") else "ok"), finding
    assert before == (os.environ.get("MOA_CACHE_DIR"), torch.get_num_threads())


@pytest.mark.skipif(not SETS, reason="the native library is not built")
def test_a_backend_that_computes_another_adapter_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = parity._opened

    def altered(subject: Subject, base: Any, adapters: Any, **more: Any) -> LLM:
        if subject.backend == "native":
            write_family(adapters["adamole"], "adamole", SMALL, seed=5)
        return opened(subject, base, adapters, **more)

    monkeypatch.setattr(parity, "_opened", altered)
    finding = parity.kernels(replace(ON_CPU, backend="native"))
    is_bad(finding, "failed", "logits off: adamole by", "other greedy tokens: adamole")
    assert "soft_moa" not in finding.found


def test_golden_numbers_that_are_not_met_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    altered = dict(golden.read())
    altered["lora/1/logits"] = altered["lora/1/logits"] + 1e-3
    altered["mola/0/selected"] = altered["mola/0/selected"].clone()
    altered["mola/0/selected"][0, 2, 1] ^= True
    monkeypatch.setattr(golden, "read", lambda: altered)
    finding = parity.golden_numbers(replace(ON_CPU, backend="torch"))
    is_bad(finding, "failed", "lora is off by 1.0e-03", "mola selects 1 other experts")
    assert "adamole" not in finding.found


def test_a_number_that_is_none_is_not_close() -> None:
    """NaN is less than nothing and more than nothing."""
    found = dict(golden.read())
    found["prompt/0/logits"] = found["prompt/0/logits"].clone()
    found["prompt/0/logits"][3, 3] = float("nan")
    close = parity.closeness(found, golden.read())
    assert [text.split()[0] for text in parity.misses_exact(close)] == ["prompt"]
    assert [text.split()[0] for text in parity.misses_bfloat16(close)] == ["prompt"]


def test_bfloat16_may_be_off_a_little_and_flip_few_selections() -> None:
    """Logits behind a flip are another expert's, and do not count; too many flips do."""
    expected, key = golden.read(), "sparse_moa/0/selected"
    found = dict(expected) | {"lora/0/logits": expected["lora/0/logits"] + 0.03}
    found[key] = expected[key].clone()
    found[key][1, 7, 0] ^= True
    found["sparse_moa/0/logits"] = expected["sparse_moa/0/logits"].clone()
    found["sparse_moa/0/logits"][7:] += 9
    assert parity.misses_bfloat16(parity.closeness(found, expected)) == []
    found["sparse_moa/0/logits"][6] += 0.7
    found["lora/0/logits"] = expected["lora/0/logits"] + 0.08
    assert [text.split()[0] for text in parity.misses_bfloat16(parity.closeness(found, expected))] == ["sparse_moa", "lora"]
    found[key] = ~expected[key]
    found["sparse_moa/1/selected"] = ~expected["sparse_moa/1/selected"]
    assert "sparse_moa selects 396 of 396 other experts (limit 1.5%)" in parity.misses_bfloat16(parity.closeness(found, expected))


def test_what_stays_of_an_adapter_after_a_swap_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    load = LLM.load_adapter

    def stale(llm: LLM, name: str, source: Any) -> Any:
        known = Path(getattr(source, "path", source))
        return load(llm, name, known.with_name("soft_moa") if name == "soft_moa" else source)

    monkeypatch.setattr(LLM, "load_adapter", stale)
    is_bad(parity.swaps(replace(ON_CPU, backend="torch")), "failed", "other tokens after a swap: another (turn 5)")


@pytest.mark.parametrize(("second_best", "is_same"), [(-0.7, False), (-0.5002, True)])
def test_tokens_part_only_where_two_are_as_good(second_best: float, is_same: bool) -> None:
    """Two devices round differently, and where two tokens tie both are right; what follows is then another text."""

    def completion(*token_ids: int) -> Completion:
        top = ((5, -0.5), (6, second_best))
        return Completion("", list(token_ids), [TokenLogprob(one, -0.5, 1, top) for one in token_ids], "length")

    assert parity._same_tokens(completion(5, 5), completion(5, 5))
    assert parity._same_tokens(completion(6, 9), completion(5, 5)) is is_same
    assert not parity._same_tokens(completion(9, 5), completion(5, 5))
    assert not parity._same_tokens(completion(5), completion(5, 5))


# -- bench


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bench_measures_any_backend_and_missed_goals_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str
) -> None:
    """Each goal with its own number of rows; what a tiny base gives is far from them, or not."""
    monkeypatch.setenv("MOA_CACHE_DIR", str(tmp_path))  # nobody else writes there meanwhile
    monkeypatch.setattr(goals, "DISTINCT_TO_BASE_ON_GPU", 0.0)
    monkeypatch.setattr(goals, "adapter_to_base_on_gpu", lambda rows: 1e9)
    heard: list[str] = []
    subject = replace(ON_CPU, backend=backend, on_progress=heard.append)
    before = sorted(cache_dir().rglob("*"))
    finding = speed.measured(subject, "tiny", ModelConfig.from_hf(SMALL), rounds=2, inner_steps=1)
    is_bad(finding, "warning", "6 of 7 goals met", "distinct soft_moa, 35 slots at 32", "goal 0")
    assert finding.details is not None
    rows = finding.details["rows"]
    cases = ["base", "control", "soft_moa", "sparse_moa"]
    assert [(row["rows"], row["case"]) for row in rows] == [
        *((rows, case) for rows in (1, 16, 32) for case in cases),
        *((32, f"{case}, 35 slots") for case in ("base", "control", "distinct soft_moa")),
    ]
    assert all(row["ms"]["median"] > 0 for row in rows)
    assert [row["to_base"]["median"] for row in rows if row["case"] == "base"] == [1, 1, 1]
    assert heard[-1] == "bench: decoding 32 rows"
    assert sorted(cache_dir().rglob("*")) == before
    monkeypatch.setattr(goals, "DISTINCT_TO_BASE_ON_GPU", 1e9)
    assert speed.measured(subject, "tiny", ModelConfig.from_hf(SMALL), rounds=1, inner_steps=1).verdict == "ok"


def test_the_goals_are_those_of_a_gpu() -> None:
    assert [goals.adapter_to_base_on_gpu(rows) for rows in (1, 2, 16, 64)] == [1.05, None, 1.03, 1.03]
    assert (goals.DISTINCT_ADAPTERS, goals.DISTINCT_TO_BASE_ON_GPU) == (32, 1.1)


def test_the_larger_base_is_for_the_larger_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(speed, "measured", lambda subject, name, config: asked.append(name))
    for size in (16, 24, 80):
        properties = SimpleNamespace(total_memory=size * 2**30)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda index, found=properties: found)
        speed.bench(Subject(is_on_gpu=True))
    assert asked == ["llama-3.2-1b", "llama-3.1-8b", "llama-3.1-8b"]
    assert speed.bench(Subject(is_on_gpu=True, is_quick=True)).verdict == "skipped"
    assert speed.bench(ON_CPU).verdict == "skipped"


# -- the command


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What computes is tested above."""
    monkeypatch.setattr("moa_serve.shell.doctor.checks.COMPUTING", COMPUTING[-1:])


def doctor(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


@pytest.mark.usefixtures("few_checks")
def test_json_tells_all_that_was_found(tmp_path: Path) -> None:
    model, file = write_base(tmp_path / "base"), tmp_path / "report.json"
    result = doctor("--device", "cpu", "--model", model, "--json", file)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert list(found) == ["schema", "moa_serve", "date", "asked", "machine", "checks", "goals", "is_trusted", "verdict"]
    assert (found["schema"], found["is_trusted"]) == ("moa-doctor/1", True)
    assert found["asked"] == {"model": "another base", "backend": "auto", "device": "cpu", "quick": False}
    assert [one["name"] for one in found["checks"]] == [*(check.name for check in INSTALLATION), "bench"]
    for one in found["checks"]:
        assert list(one) == ["name", "verdict", "found", "advice", "details", "seconds"]
    assert found["machine"]["memory_bytes"] == psutil.virtual_memory().total
    assert found["verdict"] == result.stdout.splitlines()[-1]


@pytest.mark.usefixtures("few_checks")
def test_json_says_nothing_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is made to be attached to a public report: no host, no user, no path, no key, not even in the text of an error."""
    home = tmp_path / "homes" / "Mrs Jones"
    (home / "secret base").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "jonesy")
    monkeypatch.setenv("MOA_API_KEY", "sk-very-private")
    monkeypatch.setenv("MOA_CACHE_DIR", str(home / "cache of jonesy"))
    monkeypatch.setenv("CXX", str(home / "no-such-compiler"))
    monkeypatch.setattr(platform, "node", lambda: "jones-laptop")
    monkeypatch.chdir(home)
    result = doctor("--device", "cpu", "--model", "secret base", "--json", "report.json")
    assert result.exit_code == 1
    assert "secret base" in result.stdout  # who looks at the terminal is told all
    text = (home / "report.json").read_text()
    assert "[path]: there is no such file" in text
    for private in ("jones", "Jones", "secret", "sk-very", "homes", str(tmp_path), str(Path.cwd()), sys.prefix):
        assert private not in text, private


def test_names_are_taken_out_of_texts_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "box-7")
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    text = "on box-7, ann's annual ~/x and '/a/b c' (/usr/lib/z.so): 3 tokens/s of 5/6"
    assert report.without_private(text) == "on [host], [user]'s annual [path] and '[path] c' ([path]): 3 tokens/s of 5/6"
    assert report.without_private("see /a/b c/d", ["/a/b c"]) == "see [path]"


@pytest.mark.skipif(HAS_CUDA, reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_exit_1_and_nothing_is_computed() -> None:
    result = doctor("--device", "cuda")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("do not trust it, because ")
    assert "GPU" in result.stdout.splitlines()[-1]
    assert result.stdout.count("there is no CUDA device to compute on") == len(COMPUTING)


@pytest.mark.parametrize("arguments", [("--device", "tpu"), ("--json", "no/such/folder/x.json"), ("--bench",)])
def test_wrong_usage_is_exit_2(arguments: tuple[str, ...]) -> None:
    result = doctor(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.usefixtures("few_checks")
def test_the_table_shows_figures_and_advice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = speed.Row(16, "soft_moa", Spread(2.0, 1.9, 2.1), goals.Judged(Spread(1.05, 1.04, 1.06), 1.03))
    details = {"base": "tiny", "backend": "torch", "dtype": "float32", "context": 128, "rows": [row.to_json()]}
    checked = [
        Checked("bench", Finding("warning", "slow \x1b[31m", "wait", details), 1.0),
        Checked("GPU", Finding("failed", "none", "buy one"), 1.0),
    ]
    report.show(terminal.output(), checked)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "\x1b" not in "".join(lines)
    assert [" ".join(line.split()) for line in lines if line.strip()] == [
        "check found",
        lines[2].strip(),
        "warning bench slow \\x1b[31m",
        "-> wait",
        "failed GPU none",
        "-> buy one",
        "tiny, torch, float32, a decode step behind 128 tokens",
        "rows case ms to base goal",
        next(line.strip() for line in lines[8:] if "──" in line),
        "16 soft_moa 2.00 (1.90-2.10) 1.050 (1.040-1.060) ! <= 1.03",
        "do not trust it, because GPU failed",
    ]


def test_the_real_command_trusts_this_machine(tmp_path: Path) -> None:
    """All of it in a process of its own, as it is typed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MOA_")}
    model = write_base(tmp_path / "base")
    command = [sys.executable, "-m", "moa_serve", "doctor", "--quick", "--device", "cpu", "--model", str(model)]
    result = subprocess.run(command, env=kept | {"MOA_CACHE_DIR": str(tmp_path / "cache")}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].startswith("trust it")
    assert "golden parity" in result.stdout
    assert result.stderr == ""
    assert not (tmp_path / "cache").exists()
