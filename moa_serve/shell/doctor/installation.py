"""Checks that look and do not compute: Python, packages, compiler, native library, processor, memory, base, disk, GPU.

Each asks the parts that serve (`native.library`, `model.memory`, ...), so that it says what a server would find. Nothing is fetched or
built. Texts may hold paths, for the person who reads them; report.py takes them out of what is sent to others.
"""

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement

from moa_serve.config import ModelConfig
from moa_serve.errors import MoaError, ModelError, ModelNotFound, ModelUnsupported
from moa_serve.llm import resolve
from moa_serve.model.cache import cache_dir
from moa_serve.model.default_base import NAME, fetched_folder
from moa_serve.model.memory import available_bytes
from moa_serve.model.weights import allocate, check_folder
from moa_serve.native import compile as native_compile
from moa_serve.native import library as native
from moa_serve.native.threads import num_threads, quotas
from moa_serve.settings import ServerSettings
from moa_serve.shell.doctor.findings import Finding, Subject, Verdict

_REBUILD = "build it with a C++ compiler: python -m moa_serve.native.compile, or install the package again"
_DEFAULT_WEIGHTS = 134_515_008  # of the default base
_PROCESS_BYTES = 2**30  # of torch and Python, and a small KV cache
_DISK_BYTES = 2**30  # the default base takes half of it while it is fetched and converted
_RESERVED_FILES, _USUAL_FILES = 128, 1024  # what a server keeps for other things than connections; a usual limit
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_SMI_SECONDS = 10


# -- software


def python(subject: Subject) -> Finding:
    found = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()}"
    libc = " ".join(filter(None, platform.libc_ver()))
    return Finding("ok", f"{found}, {libc}" if libc else found)


def packages(subject: Subject) -> Finding:
    """Whether what moa_serve requires is there, in versions that it takes."""
    wrong, count = [], 0
    for text in importlib.metadata.requires("moa_serve") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    if wrong:
        return Finding("failed", "; ".join(wrong), "install the package again: pip install moa_serve")
    return Finding("ok", f"{count} required packages, all in versions that fit")


def torch_build(subject: Subject) -> Finding:
    """Which torch, and whether it fits the devices that are there."""
    has_driver = _NVIDIA_DRIVER.exists() or shutil.which("nvidia-smi") is not None
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU"
    found = f"torch {torch.__version__}, built for {build}"
    if torch.version.cuda is None and torch.version.hip is None:
        if has_driver or subject.device == "cuda":
            there = "there is an NVIDIA driver" if has_driver else "CUDA was asked for"
            return Finding("failed" if subject.device == "cuda" else "warning", f"{found}, but {there}", "install a CUDA build of torch")
        return Finding("ok", found)
    if has_driver and not torch.cuda.is_available():
        return Finding("warning", f"{found}, but it cannot use the driver", "update the driver, or install torch for its CUDA version")
    return Finding("ok", found if torch.cuda.is_available() else f"{found}; there is no GPU, so a CPU build would do")


def triton(subject: Subject) -> Finding:
    try:
        return Finding("ok", f"triton {importlib.metadata.version('triton')}")
    except importlib.metadata.PackageNotFoundError:
        if subject.is_on_gpu:
            return Finding("warning", "not installed: torch computes alone on the GPU", "pip install triton")
        return Finding("skipped", "not installed; only a GPU has use for it")


def compiler(subject: Subject) -> Finding:
    """The native library is built with it, and triton's kernels are started with what it builds."""
    try:
        return Finding("ok", _first_line([native_compile.find_compiler(), "--version"]))
    except native_compile.CannotCompile as error:
        needed = subject.is_on_gpu or not _has_native()
        return Finding("warning", str(error), "install g++ or clang++") if needed else Finding("ok", f"{error}; not needed, all is built")


def native_library(subject: Subject) -> Finding:
    """Whether it was built from these sources and runs on this processor."""
    try:
        native.instruction_sets()
    except native.NativeUnavailable as error:
        is_wanted = subject.backend == "native"
        return Finding("failed" if is_wanted else "warning", f"{error}; on a CPU torch serves, several times slower", _REBUILD)
    found = f"{native.status()}; sources {native_compile.stamp()[:12]}"
    if "does not know" in found:
        return Finding("warning", found, "install a newer compiler and build it again: python -m moa_serve.native.compile")
    return Finding("ok", found)


# -- the machine


def processor(subject: Subject) -> Finding:
    flags, name = _processor()
    known = {
        "AVX2": "avx2",
        "FMA": "fma",
        "AVX-512": "avx512f",
        "AVX-512 bfloat16": "avx512_bf16",
        "AMX": "amx_tile",
        "AMX bfloat16": "amx_bf16",
    }
    has = [label for label, flag in known.items() if flag in flags]
    found = f"{name}: {', '.join(has) or 'no vector instructions that are used here'}"
    if not subject.is_on_gpu and not {"avx2", "fma"} <= flags:
        return Finding("warning", found, "torch serves here, slowly; the native library needs x86-64 with AVX2 and FMA")
    return Finding("ok", found)


def cores(subject: Subject) -> Finding:
    usable, quota = len(os.sched_getaffinity(0)), min(quotas(), default=None)
    physical = psutil.cpu_count(logical=False) or usable
    threads = num_threads()
    found = f"{physical} physical cores, {os.cpu_count()} processors, {usable} of them usable"
    if quota is not None:
        found += f", within a quota of {quota or 'less than one'}"
    found += f": {threads} {'thread' if threads == 1 else 'threads'} a step"
    if quota == 0:
        return Finding("warning", found, "a step is halted in its midst: raise the control group's CPU limit to whole cores")
    return Finding("ok", found)


def memory(subject: Subject) -> Finding:
    """What is free within the control groups' limits, against the base's weights."""
    free, total = available_bytes(torch.device("cpu")), psutil.virtual_memory().total
    found = f"{_gib(free)} free of {_gib(total)}"
    if subject.is_on_gpu:
        return Finding("ok", f"{found}; the weights go to the GPU")
    needed = _weight_bytes(subject)
    if needed is None:
        return Finding("ok", f"{found}; what the base takes is not known yet")
    found += f", of which the base's weights take {_gib(needed)}"
    if needed > free:
        return Finding("failed", found, "free some, raise the memory limit, or choose a smaller base, bfloat16 or --base-dtype int8")
    if needed + _PROCESS_BYTES > free:
        return Finding("warning", found, "little is left for the process and its KV cache: free some, or choose a smaller base")
    return Finding("ok", found)


def open_files(subject: Subject) -> Finding:
    """1024 is what most systems give a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Finding("ok", "no limit")
    connections = int(ServerSettings.model_fields["max_connections"].default)
    found = f"{soft:,}, enough for {max(1, min(connections, soft - _RESERVED_FILES)):,} connections of {connections:,}"
    if soft < _USUAL_FILES:
        how = f"ulimit -n {_USUAL_FILES}" if hard == resource.RLIM_INFINITY or hard >= _USUAL_FILES else "raise the hard limit"
        return Finding("warning", found, f"{how} before the start")
    return Finding("ok", found)


# -- files


def base(subject: Subject) -> Finding:
    """Whether the base is on this machine and whole, as far as headers tell. Fetches nothing."""
    named = NAME if subject.model is None else "the base of --model"
    try:
        folder = base_folder(subject.model)
        if folder is None:
            return Finding("warning", f"{named} was not fetched yet", "the first start fetches it, and needs a network for that")
        if folder.is_file():
            with folder.open("rb") as file:
                if file.read(4) != b"GGUF":
                    raise ModelUnsupported(f"{folder}: a model is a folder with config.json, a GGUF file or a hub id", param="model")
            return Finding("ok", f"{named} is a GGUF file of {_gib(folder.stat().st_size)}; the first start converts it")
        config, _ = check_folder(folder)
    except ModelError as error:
        return Finding("failed", str(error), "name another base with --model, or fetch this one again")
    except OSError as error:
        return Finding("failed", f"{named} cannot be read: {error}", "check the path and its permissions")
    weights = _num_weights(config)
    return Finding("ok", f"{named}: {config.architecture}, {config.num_layers} layers, {weights / 1e6:,.0f} million weights, whole")


def cache_folder(subject: Subject) -> Finding:
    folder = cache_dir()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())  # the root always does
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding(
            "warning",
            f"{folder} cannot be written ({error.strerror}): all is computed anew at each start",
            "set MOA_CACHE_DIR to a folder that can",
        )
    free = shutil.disk_usage(there).free
    found = f"{folder} can be written, {_gib(free)} free"
    if free < _DISK_BYTES:
        return Finding("warning", found, "free some space, or set MOA_CACHE_DIR to another disk")
    return Finding("ok", found)


# -- the GPU


@dataclass(frozen=True, slots=True)
class Gpu:
    """The one that would be used. None: neither torch nor nvidia-smi says.

    Args:
        is_built_for: whether torch has kernels for it.
        num_others: other processes that compute on it, as far as this one may see them.
        ecc_errors: uncorrected ones since the start.
    """

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    num_gpus: int
    is_built_for: bool = True
    driver: str | None = None
    num_others: int | None = None
    ecc: str | None = None
    ecc_errors: str | None = None
    mig: str | None = None


def gpu(subject: Subject) -> Finding:
    if not torch.cuda.is_available():
        if subject.device == "cuda":
            return Finding("failed", "CUDA was asked for, but torch finds no CUDA device", "see what is said of torch; or use --device cpu")
        return Finding("skipped", "none that torch can use")
    if not subject.is_on_gpu:
        return Finding("skipped", "there is one, but --device cpu was asked for")
    return judged_gpu(read_gpu(), _weight_bytes(subject))


def judged_gpu(found: Gpu, needed: int | None) -> Finding:
    """Args: needed: bytes of the base's weights; None: not known."""
    major, minor = found.capability
    said = f"{found.name}, compute capability {major}.{minor}, {_gib(found.free_bytes)} free of {_gib(found.total_bytes)}"
    said += f", driver {found.driver or 'unknown'}"
    said += f", one of {found.num_gpus}" if found.num_gpus > 1 else ""
    said += ", MIG is on" if found.mig == "Enabled" else ""
    said += f", ECC is {found.ecc.lower()}" if found.ecc in ("Enabled", "Disabled") else ""
    failures, warnings = [], []
    if not found.is_built_for:
        failures.append((f"torch has no kernels for {major}.{minor}", "install a torch build for this GPU"))
    if needed is not None and needed > found.free_bytes:
        failures.append((f"the base's weights take {_gib(needed)}", "free the GPU's memory, or choose a smaller base"))
    if (found.ecc_errors or "0").isdigit() and int(found.ecc_errors or 0):
        failures.append((f"{found.ecc_errors} uncorrected memory errors", "restart the machine; have the GPU looked at if they come again"))
    if found.capability < (8, 0):
        warnings.append(("below 8.0, bfloat16 products are slow or absent", "use --dtype float32, or a GPU of 8.0 and newer"))
    if found.num_others:
        others = "another process computes" if found.num_others == 1 else f"{found.num_others} other processes compute"
        warnings.append((f"{others} on it", "end them, or expect less memory and other times"))
    elif found.free_bytes < 0.8 * found.total_bytes:
        warnings.append(("somebody holds its memory", "look with nvidia-smi; a container does not see processes outside"))
    problems = failures + warnings
    verdict: Verdict = "failed" if failures else "warning" if warnings else "ok"
    details = {"gpu": asdict(found)}
    return Finding(verdict, "; ".join([said, *(what for what, _ in problems)]), "; ".join(how for _, how in problems), details)


def read_gpu() -> Gpu:
    """What torch and, where it is there, nvidia-smi say of torch's first device."""
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    which = getattr(properties, "uuid", None)
    lines = _smi("--query-gpu=driver_version,ecc.mode.current,ecc.errors.uncorrected.volatile.total,mig.mode.current", which)
    told = [None if "N/A" in word else word for word in lines[0].split(", ")] if lines else []
    driver, ecc, errors, mig = told if len(told) == 4 else (None,) * 4
    processes = _smi("--query-compute-apps=pid", which)
    others = None if processes is None else sum(line.isdigit() and int(line) != os.getpid() for line in processes)
    capability = (properties.major, properties.minor)
    is_built_for = _is_built_for(capability, torch.cuda.get_arch_list())
    return Gpu(properties.name, capability, total, free, torch.cuda.device_count(), is_built_for, driver, others, ecc, errors, mig)


def _smi(query: str, uuid: object) -> list[str] | None:
    """Lines of nvidia-smi, of one GPU where it knows it by this name: it does not know the parts of MIG."""
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    found = None if uuid is None else _lines([*command, "-i", f"GPU-{uuid}"])
    return _lines(command) if found is None else found


def _is_built_for(capability: tuple[int, int], architectures: list[str]) -> bool:
    """sm_ binaries run on their major version from their minor version on, compute_ code on everything newer."""
    for one in architectures:
        kind, _, digits = one.rstrip("af").partition("_")
        built = (int(digits[:-1]), int(digits[-1]))
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


# -- for the report


def machine() -> dict[str, Any]:
    """Facts without which a figure says little, and nothing that tells whose machine it is."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor()[1],
        "num_processors": os.cpu_count(),
        "num_threads": num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def _processor() -> tuple[set[str], str]:
    """(flags, name), as Linux tells them; none and the machine's word elsewhere."""
    with suppress(OSError):
        told = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in told.items()}
        return set(fields.get("flags", "").split()), fields.get("model name", platform.machine())
    return set(), platform.machine()


def base_folder(model: str | None) -> Path | None:
    """Where it is on this machine, a file where that is a GGUF; None where it must be fetched first. Raises ModelNotFound."""
    if model is None:
        return fetched_folder()
    path = Path(model).expanduser().absolute()
    if path.exists():
        return path
    if model.count("/") != 1 or path.parent.exists():
        raise ModelNotFound("the base of --model: there is no such folder or file", param="model")
    from huggingface_hub import try_to_load_from_cache  # here: a local folder needs none of it

    found = try_to_load_from_cache(model, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _weight_bytes(subject: Subject) -> int | None:
    """Of the base in the dtype that would be served; None where only its conversion or download would tell."""
    with suppress(MoaError, OSError):
        folder = base_folder(subject.model)
        if folder is None or folder.is_file():
            return None if subject.model is not None else _DEFAULT_WEIGHTS * _itemsize(subject)
        return _num_weights(check_folder(folder)[0]) * _itemsize(subject)
    return None


def _itemsize(subject: Subject) -> int:
    return resolve(subject.backend, subject.device, "auto")[2].itemsize


def _num_weights(config: ModelConfig) -> int:
    return allocate(config, torch.device("meta"), torch.int8).num_bytes


def _has_native() -> bool:
    try:
        return bool(native.instruction_sets())
    except native.NativeUnavailable:
        return False


def _first_line(command: list[str]) -> str:
    return (_lines(command) or ["says nothing of its version"])[0]


def _lines(command: list[str]) -> list[str] | None:
    """What it prints; None where it is not there or fails."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True, stdin=subprocess.DEVNULL)
        return [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return None


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
