"""From a folder to an Adapter: tells the format by the files that are there, and holds every adapter to the same checks.

| file | format |
|---|---|
| adapter.json | ours, version 1 |
| adapter_params.json | the authors' Meta line (meta.py) |
| adapter_config.json, peft_type SOFTMOA or SPARSEMOA | the authors' Hugging Face line (hf_moa.py) |
| adapter_config.json otherwise | PEFT LoRA (peft.py) |

Pure: files in, tensors out; safe in a loader thread.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_finite,
    check_tensors,
    match_tensors,
    read_json,
    revision_of,
)
from moa_serve.adapter.importers import hf_moa, meta, peft
from moa_serve.adapter.importers.build import Imported, NoHeader, ReadOptions, read_tensors, refuse_variant
from moa_serve.adapter.manifest import FORMAT, Manifest
from moa_serve.config import ModelConfig
from moa_serve.errors import (
    AdapterConfigInvalid,
    AdapterIncomplete,
    AdapterNotFound,
    AdapterUnreadable,
)

CONFIG_FILES = (CONFIG_FILE, meta.CONFIG_FILE, peft.CONFIG_FILE)
_FILES = (*CONFIG_FILES, WEIGHTS_FILE, meta.PICKLE_FILE, peft.SAFETENSORS_FILE, peft.PICKLE_FILE)
MAX_FILE_BYTES = 4 * 2**30  # where the expected size is not known before the file is read
_HEADER_BYTES, _HEADER_BYTES_PER_TENSOR = 2**20, 512

_Read = Callable[[Path, str | None, ModelConfig, ReadOptions], Imported]


def read_adapter(
    source: AdapterSource,
    config: ModelConfig,
    *,
    base_digest: str | None = None,
    isolate: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Adapter:
    """Read one adapter folder of any format and validate it against the served base; all or nothing.

    Args:
        base_digest: of the served base's weights; an adapter that names another one only gets a warning.
        isolate: unpickle `.pth` and `.bin` in a child process with limits.
    Raises:
        AdapterError: one of its classes, with every single finding in `problems`.
    """
    folder = Path(source.path)
    _check_folder(folder)
    label, read = _format_of(folder)
    imported = read(folder, source.variant, config, ReadOptions(isolate, max_file_bytes))
    check_finite(imported.tensors)
    warnings = list(imported.warnings)
    made_for = imported.manifest.base.digest
    if base_digest and made_for and made_for != base_digest:
        warnings.append("the adapter was made for a base of this shape with other weights (base.digest differs)")
    revision = revision_of(imported.manifest, imported.tensors)
    return Adapter(imported.manifest, imported.tensors, revision, label, tuple(warnings))


def read_manifest(source: AdapterSource, config: ModelConfig, *, max_file_bytes: int = MAX_FILE_BYTES) -> Manifest | None:
    """Judge a folder by its config and the header of its tensors, without reading their values: whether it fits the base.

    Returns:
        None where the weights are a pickle: it has no header, so only `read_adapter` can tell.
    Raises:
        AdapterError: as `read_adapter`, but for what only the values show (NaN).
    """
    folder = Path(source.path)
    _check_folder(folder)
    _, read = _format_of(folder)
    try:
        return read(folder, source.variant, config, ReadOptions(True, max_file_bytes, is_header_only=True)).manifest
    except NoHeader:
        return None


Signature = tuple[tuple[str, int, int, int], ...]


def signature_of(folder: str | os.PathLike[str]) -> Signature:
    """Name, size, and times of content and of mode of every file that can be part of an adapter: equal means that nothing has changed."""
    found = []
    for name in _FILES:
        try:
            state = os.lstat(os.path.join(folder, name))
        except OSError:
            continue
        found.append((name, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    return tuple(found)


def has_config(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like an adapter: it has one of the three config files, readable or not."""
    return any(os.path.lexists(os.path.join(folder, name)) for name in CONFIG_FILES)


def _check_folder(folder: Path) -> None:
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise AdapterUnreadable(f"{folder}: cannot be opened ({error.strerror}); check its permissions") from None
    if not is_folder:
        raise AdapterNotFound(f"{folder}: there is no such folder")
    if not has_config(folder):
        raise AdapterIncomplete(f"{folder}: is no adapter: it has none of {', '.join(CONFIG_FILES)}")


def _format_of(folder: Path) -> tuple[str, _Read]:
    if os.path.lexists(folder / CONFIG_FILE):
        return FORMAT, _read_own
    if os.path.lexists(folder / meta.CONFIG_FILE):
        return "meta", meta.read
    raw = read_json(folder / peft.CONFIG_FILE)
    if not isinstance(raw, dict):
        raise AdapterConfigInvalid(f"{peft.CONFIG_FILE}: must be a JSON object")
    return ("hf_moa", hf_moa.read) if raw.get("peft_type") in hf_moa.PEFT_TYPES else ("peft", peft.read)


def _read_own(folder: Path, variant: str | None, config: ModelConfig, options: ReadOptions) -> Imported:
    manifest = Manifest.parse(read_json(folder / CONFIG_FILE))
    refuse_variant(variant, (manifest.variant,), CONFIG_FILE)
    manifest.check_base(config)
    expected = manifest.expected_tensors()
    size = 4 * manifest.num_parameters + _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * len(expected)
    tensors = read_tensors(folder / WEIGHTS_FILE, replace(options, max_file_bytes=min(size, options.max_file_bytes)))
    match = match_tensors(expected, tensors)
    check_tensors(match.problems, match.leftover)
    return Imported(manifest, match.tensors)


__all__ = ["CONFIG_FILES", "MAX_FILE_BYTES", "Signature", "check_adapter", "has_config", "read_adapter", "signature_of"]
