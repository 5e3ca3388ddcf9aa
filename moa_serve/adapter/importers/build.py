"""What the importers share: reading weights, refusing config fields, building a manifest.

An importer turns one foreign folder into a manifest and tensors of format version 1. It decides nothing about names or memory.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moa_serve.adapter.checkpoint import read_pickle, read_safetensors, read_safetensors_header
from moa_serve.adapter.manifest import FORMAT, BaseShape, Manifest
from moa_serve.config import ModelConfig
from moa_serve.errors import AdapterConfigInvalid, AdapterUnsupported


@dataclass(frozen=True, slots=True)
class Imported:
    """An importer's result; tensors have our names and shapes, warnings say what was dropped or guessed."""

    manifest: Manifest
    tensors: dict[str, Tensor]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How files may be read: pickles in a child process or not, the most bytes that a file may have, and whether values are wanted.

    `is_header_only`: tensors come without values (on the meta device), so that every check of names, shapes and sizes is the same code.
    """

    isolate: bool
    max_file_bytes: int
    is_header_only: bool = False


class NoHeader(Exception):
    """Only the header was wanted, but the weights are a pickle, which has none."""


def read_weights(folder: Path, safetensors_name: str, pickle_name: str, options: ReadOptions) -> dict[str, Tensor]:
    """The safetensors file if there is one: the pickle beside it is then not even opened."""
    if os.path.lexists(folder / safetensors_name):  # a link there is refused by the reader, it does not bring the pickle back
        return read_tensors(folder / safetensors_name, options)
    if options.is_header_only:
        raise NoHeader
    return read_pickle(folder / pickle_name, max_bytes=options.max_file_bytes, isolate=options.isolate)


def read_tensors(path: Path, options: ReadOptions) -> dict[str, Tensor]:
    """A safetensors file, or its header alone."""
    read = read_safetensors_header if options.is_header_only else read_safetensors
    return read(path, max_bytes=options.max_file_bytes)


def refuse_variant(wanted: str | None, fitting: tuple[str, ...], file: str) -> None:
    """Raises AdapterConfigInvalid where the variant that the user asked for cannot be what the files are."""
    if wanted is not None and wanted not in fitting:
        raise AdapterConfigInvalid(f"variant {wanted!r} does not fit {file}, which is {' or '.join(fitting)}", param="variant")


def refuse_fields(raw: Mapping[str, Any], known: frozenset[str], file: str) -> None:
    """Raises AdapterUnsupported with every field outside `known` that says anything: null, false and empty say nothing."""
    problems = [f"{key}: is not served" for key, value in raw.items() if key not in known and not _says_nothing(value)]
    if problems:
        field = problems[0].partition(":")[0]
        raise AdapterUnsupported(f"{file}: {'; '.join(problems[:5])}", param=field, problems=problems)


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or value in ([], {}, "none")


def config_error(file: str, problems: Mapping[str, str]) -> AdapterConfigInvalid:
    """One error for all problems of a config file (field -> what is wrong; at least one)."""
    lines = [f"{field}: {problem}" for field, problem in problems.items()]
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return AdapterConfigInvalid(f"{file}: {lines[0]}{more}", param=next(iter(problems)), problems=lines)


def build_manifest(config: ModelConfig, variant: str, router: Mapping[str, Any], experts: list[dict[str, Any]], file: str) -> Manifest:
    """A manifest for the served base: foreign files do not say what base they are for, their tensors' shapes must fit it."""
    if not experts:
        raise AdapterConfigInvalid(f"{file}: no layer has any expert")
    base = BaseShape.of(config).model_dump()
    try:
        return Manifest.parse({"format": FORMAT, "base": base, "variant": variant, "router": dict(router), "experts": experts})
    except AdapterConfigInvalid as error:
        raise AdapterConfigInvalid(f"{file}: {error.problems[0]}", param=error.param, problems=error.problems) from None


def flatten_gates(tensors: dict[str, Tensor]) -> None:
    """Both of the authors' lines store a prompt's gates as (1, H, 1, 1); ours are (H,)."""
    for name, tensor in tensors.items():
        if name.endswith(".prompt_gate") and tensor.ndim == 4 and tensor.shape[0] == tensor.shape[2] == tensor.shape[3] == 1:
            tensors[name] = tensor.flatten()


def hidden_widths(tensors: Mapping[str, Tensor], names: Mapping[int, str], num_layers: int) -> int | list[int]:
    """`router.hidden` from the rows of each layer's w1 (`names`: layer -> tensor): one number, or one for each layer of the base."""
    widths = {layer: tensors[name].shape[0] for layer, name in names.items() if name in tensors and tensors[name].ndim == 2}
    if len(set(widths.values())) == 1:
        return next(iter(widths.values()))
    return [widths.get(layer, 0) for layer in range(num_layers)]
