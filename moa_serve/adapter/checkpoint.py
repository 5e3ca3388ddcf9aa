"""Adapter files: bytes on disk to tensors in our own memory and back, strictly.

A file is opened once, without following links, judged by its size, and read whole: it is never mapped, so whoever can write the
folder can neither change nor crash what is being served. The format is told by content, never by trying again. Which tensors
belong to an adapter is the manifest's affair; what an adapter is called is the store's. Owns no state.
"""

import errno
import hashlib
import io
import json
import math
import os
import secrets
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Never

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from moa_serve import faults
from moa_serve.adapter import unpickle
from moa_serve.adapter.manifest import FORMAT, Manifest, Shape
from moa_serve.errors import (
    AdapterChanging,
    AdapterConfigInvalid,
    AdapterCorrupt,
    AdapterError,
    AdapterExists,
    AdapterIncomplete,
    AdapterMismatch,
    AdapterNotFinite,
    AdapterPathDenied,
    AdapterTooLarge,
    AdapterUnreadable,
    AdapterUnsafePickle,
)

CONFIG_FILE, WEIGHTS_FILE = "adapter.json", "adapter.safetensors"
MAX_JSON_BYTES, MAX_JSON_DEPTH = 2**20, 64
MAX_HEADER_BYTES = 2 * 2**20  # of a safetensors header: some 15,000 tensors, ten experts at every linear of a 70B
MAX_MEMBERS = 65_536  # of a zip archive: a tensor is one member
CHILD_SECONDS = 120  # wall time of the child process that unpickles
_SHOWN = 5  # findings that a message names; `problems` has all

_DENIED = {errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ENAMETOOLONG, errno.ENOTDIR}  # links, sockets, devices, impossible names


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """A regular file, whole, in memory of our own.

    Raises:
        AdapterIncomplete: there is no such file.
        AdapterPathDenied: it is a link, a folder, a pipe or a device.
        AdapterTooLarge: its size, judged before anything is read, is above `max_bytes`.
        AdapterUnreadable: permission or input error; a later try may work.
        AdapterChanging: it was written to meanwhile.
    """
    with _opened(path, max_bytes) as (file, before):
        data = file.read(before.st_size + 1)  # one more, to notice a file that grows
        after = os.fstat(file.fileno())
    if len(data) != before.st_size or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise AdapterChanging(f"{path.name}: changed while it was read; load it again when the copy is whole")
    return data


@contextmanager
def _opened(path: Path, max_bytes: int) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """A regular file of at most `max_bytes`, opened without following links, and its size and times at that moment."""
    try:  # O_NONBLOCK: opening a pipe must not wait for its writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _cannot_open(path.name, error) from None
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise AdapterPathDenied(f"{path.name}: is not a regular file; put the file itself there")
        if before.st_size > max_bytes:
            raise AdapterTooLarge(f"{path.name}: has {before.st_size:,} bytes, but this adapter may have {max_bytes:,}")
        if faults.active:
            faults.active.strike("read", name=[path.name, f"{path.parent.name}/{path.name}"])
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file, before
    except OSError as error:
        raise AdapterUnreadable(f"{path.name}: cannot be read ({error.strerror}); try again") from None
    finally:
        os.close(descriptor)


def _cannot_open(name: str, error: OSError | ValueError) -> AdapterError:
    if not isinstance(error, OSError):
        return AdapterPathDenied(f"{name!a}: is not a file name")
    if error.errno == errno.ENOENT:
        return AdapterIncomplete(f"{name}: there is no such file in the adapter's folder")
    if error.errno in _DENIED:
        return AdapterPathDenied(f"{name}: is a link or no regular file; put the file itself there")
    return AdapterUnreadable(f"{name}: cannot be opened ({error.strerror}); check its permissions and try again")


def read_json(path: Path) -> Any:
    """A small JSON file (at most 1 MiB), without the freedoms of Python's parser: no NaN, no duplicate keys, no overflow.

    Raises:
        AdapterConfigInvalid: and what `read_bytes` raises.
    """

    def refuse(reason: str) -> Never:
        raise AdapterConfigInvalid(f"{path.name}: {reason}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            refuse("the same key is given twice")
        return table

    def finite(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse("a number is out of range")

    try:
        text = read_bytes(path, max_bytes=MAX_JSON_BYTES).decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=lambda _: refuse("NaN or Infinity"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # an escaped half of a surrogate pair is no text that can be sent on
    except AdapterTooLarge:
        refuse(f"is larger than {MAX_JSON_BYTES:,} bytes")
    except UnicodeError:
        refuse("is not UTF-8 text")
    except RecursionError:
        refuse("is nested too deep")
    except ValueError:  # JSONDecodeError, and whole numbers of more digits than Python takes
        refuse("is not valid JSON")
    if _is_deep(value):
        refuse(f"is nested deeper than {MAX_JSON_DEPTH}")
    return value


def _is_deep(value: Any) -> bool:
    """Deeper than anything meant: recursive code that comes later, such as the digest's, must not meet it."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return bool(level)


def read_safetensors(path: Path, *, max_bytes: int) -> dict[str, Tensor]:
    """The tensors of a safetensors file: float32, bfloat16 or float16, each in its own memory.

    Raises:
        AdapterCorrupt: the header does not describe the file to the byte, or another format bears its name; and what `read_bytes` raises.
    """
    return _decode(read_bytes(path, max_bytes=max_bytes), path.name)


def read_safetensors_header(path: Path, *, max_bytes: int) -> dict[str, Tensor]:
    """What `read_safetensors` would give, without the values: tensors on the meta device, from the header and the file's size alone.

    Raises:
        As `read_safetensors`, but for what only the values can show.
    """
    with _opened(path, max_bytes) as (file, before):
        start = file.read(8)
        length = _header_length(start, before.st_size, path.name)
        header = file.read(length)
    try:
        tensors = _parse_header(header, before.st_size - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError):  # RecursionError is a RuntimeError
        raise _bad_header(path.name) from None
    _check_dtypes(tensors, path.name)
    return tensors


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_DTYPES |= {"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}


def _parse_header(header: bytes, num_bytes: int) -> dict[str, Tensor]:
    """Tensors without values; they must fill the file's `num_bytes` of data without a hole. Raises many kinds of error."""
    # Calling Python back for each object (`dict` itself is no Python), the parser lets other threads on; else it keeps the interpreter.
    table = json.loads(header.decode("utf-8"), object_pairs_hook=lambda pairs: dict(pairs))
    table.pop("__metadata__", None)
    end = 0
    tensors = {}
    for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
        if not all(type(number) is int and number >= 0 for number in (*entry["shape"], *entry["data_offsets"])):
            raise ValueError(name)
        tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
        start, stop = entry["data_offsets"]
        if start != end or stop - start != tensor.numel() * tensor.element_size():
            raise ValueError(name)
        tensors[name], end = tensor, stop
    if end != num_bytes:
        raise ValueError("the data ends elsewhere")
    return tensors


def _header_length(data: bytes, size: int, name: str) -> int:
    """Of a safetensors file of `size` bytes that begins with `data`."""
    length = int.from_bytes(data[:8], "little")
    if MAX_HEADER_BYTES < length <= size - 8:
        raise AdapterCorrupt(f"{name}: has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read, join its tensors")
    if size < 8 or length > size - 8:
        kind = "a zip or pickle file" if data.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")) else "cut off or no safetensors file"
        raise AdapterCorrupt(f"{name}: is {kind}; copy or convert it again")
    return length


def _bad_header(name: str) -> AdapterCorrupt:
    return AdapterCorrupt(f"{name}: the header does not describe the file (cut off, damaged or not safetensors); copy it again")


def _decode(data: bytes, name: str) -> dict[str, Tensor]:
    length = _header_length(data, len(data), name)
    try:
        _parse_header(data[8 : 8 + length], len(data) - 8 - length)  # what is no header must not reach the library, which stops all threads
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, TypeError, KeyError, AssertionError, RuntimeError, OverflowError):
        raise _bad_header(name) from None
    _check_dtypes(tensors, name)
    return tensors


def _check_dtypes(tensors: Mapping[str, Tensor], name: str) -> None:
    wrong = [
        f"{key}: dtype {tensor.dtype} instead of float32, bfloat16 or float16" for key, tensor in tensors.items() if not _is_float(tensor)
    ]
    if wrong:
        raise AdapterCorrupt(f"{name}: {_shown(wrong)}", problems=wrong)


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype in unpickle.FLOATS


def read_pickle(path: Path, *, max_bytes: int, isolate: bool = False) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote: a flat dict of names and float tensors, nothing else.

    Args:
        isolate: unpickle in a child process with limits of its own, for files that come from others (about two seconds).
    Raises:
        AdapterUnsafePickle: not such a dict, or not torch's zip format; no code of the file ever runs.
        AdapterTooLarge: the archive's directory declares more than `max_bytes`, or packed members; and what `read_bytes` raises.
    """
    data = read_bytes(path, max_bytes=max_bytes)
    _inspect_zip(data, path.name, max_bytes)
    if isolate:
        return _unpickle_isolated(data, path.name)
    try:
        return unpickle.load(data)
    except unpickle.UnsafePickleError as error:
        raise AdapterUnsafePickle(f"{path.name}: {error}") from None


def _inspect_zip(data: bytes, name: str, max_bytes: int) -> None:
    """Judge an archive by its directory alone, before torch sees it."""
    if data.count(b"PK\x01\x02") > MAX_MEMBERS:  # every entry of a directory starts so: bounds what zipfile builds
        raise AdapterTooLarge(f"{name}: the archive has more than {MAX_MEMBERS:,} members")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, OverflowError):
        raise AdapterUnsafePickle(
            f"{name}: is not in torch's zip format (an old or bare pickle, a tar file, or damaged); save the tensors as safetensors"
        ) from None
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
        raise AdapterTooLarge(f"{name}: the archive's members are packed; torch.save stores them as they are, so save it again")
    declared = sum(member.file_size for member in members)
    if declared > min(max_bytes, len(data)):
        raise AdapterTooLarge(f"{name}: the archive declares {declared:,} bytes, more than the {min(max_bytes, len(data)):,} that it may")
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise AdapterUnsafePickle(f"{name}: is a TorchScript program, not a table of tensors")


def _unpickle_isolated(data: bytes, name: str) -> dict[str, Tensor]:
    try:  # -P: the child must not find modules beside the script or in the working folder
        child = subprocess.run(
            [sys.executable, "-P", unpickle.__file__], input=data, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=CHILD_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise AdapterUnsafePickle(f"{name}: unpickling took longer than {CHILD_SECONDS} s; save the tensors as safetensors") from None
    if child.returncode != 0 or child.stdout[:1] not in (b"+", b"-"):
        raise AdapterUnsafePickle(f"{name}: unpickling failed or met its limits of memory and time; save the tensors as safetensors")
    if child.stdout[:1] == b"-":
        raise AdapterUnsafePickle(f"{name}: {child.stdout[1:].decode()}")
    return _decode(child.stdout[1:], name)


@dataclass(frozen=True, slots=True)
class TensorMatch:
    """What `match_tensors` found: our tensors, the file's names that none of them took, and what is missing or misshapen."""

    tensors: dict[str, Tensor]
    leftover: list[str]
    problems: list[str]


def match_tensors(
    expected: Mapping[str, Shape], found: Mapping[str, Tensor], sources: Callable[[str], Sequence[str]] = lambda name: (name,)
) -> TensorMatch:
    """Find every expected tensor among those of a file.

    Args:
        sources: our name -> the file's names, whose tensors are stacked by rows in equal parts.
    """
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    used: set[str] = set()
    for name, shape in expected.items():
        names = sources(name)
        used.update(names)
        part = (shape[0] // len(names), *shape[1:])
        wrong = [_finding(source, found.get(source), part) for source in names]
        problems += [finding for finding in wrong if finding]
        if not any(wrong):
            tensors[name] = found[names[0]] if len(names) == 1 else torch.cat([found[source] for source in names])
    return TensorMatch(tensors, [name for name in found if name not in used], problems)


def _finding(name: str, tensor: Tensor | None, shape: Shape) -> str | None:
    if tensor is None:
        return f"{name}: missing"
    return None if tuple(tensor.shape) == shape else f"{name}: has shape {list(tensor.shape)} instead of {list(shape)}"


def check_tensors(problems: Sequence[str], leftover: Sequence[str]) -> None:
    """Raises AdapterMismatch if anything is missing, misshapen or left over; base weights are left over too: the base is frozen."""
    findings = [*problems, *(f"{name}: does not belong to this adapter" for name in leftover)]
    if findings:
        raise AdapterMismatch(f"the tensors do not fit: {_shown(findings)}", problems=findings)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises AdapterNotFinite with every tensor that holds a NaN or an infinity: 0 * NaN would reach other rows."""
    wrong = [f"{name}: holds NaN or infinity" for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise AdapterNotFinite(f"{_shown(wrong)}; train it again or take an earlier checkpoint", problems=wrong)


def _shown(findings: Sequence[str]) -> str:
    more = f" (and {len(findings) - _SHOWN} more)" if len(findings) > _SHOWN else ""
    return "; ".join(findings[:_SHOWN]) + more


def revision_of(manifest: Manifest, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of the canonical manifest and of name, dtype, shape and bytes of every tensor in order of name."""
    digest = hashlib.sha256(json.dumps(manifest.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_adapter(folder: str | os.PathLike[str], manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Write `adapter.safetensors` and then `adapter.json`, each whole or not at all; a folder of ours is overwritten.

    Raises:
        AdapterMismatch, AdapterNotFinite: the tensors are not those of the manifest; nothing is written.
        AdapterExists: the folder holds something that is not an adapter of this format.
        AdapterUnreadable: the folder cannot be made or written.
    """
    match = match_tensors(manifest.expected_tensors(), tensors)
    check_tensors(match.problems, match.leftover)
    check_finite(tensors)
    target = Path(folder)
    config = json.dumps(manifest.model_dump(mode="json", exclude_none=True), indent=1, allow_nan=False) + "\n"
    try:
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()) and not is_own_folder(target):
            raise AdapterExists(f"{target}: is not empty and holds no {FORMAT} adapter; give a new folder")
        replace_file(target / WEIGHTS_FILE, safetensors.torch.save({name: tensors[name].contiguous() for name in sorted(tensors)}))
        replace_file(target / CONFIG_FILE, config.encode())  # last: a new folder is an adapter only when it is whole
    except OSError as error:
        raise AdapterUnreadable(f"{target}: cannot be written ({error.strerror})") from None


def is_own_folder(folder: Path) -> bool:
    """Whether `write_adapter` may overwrite it."""
    try:
        raw = read_json(folder / CONFIG_FILE)
    except AdapterError:
        return False
    return isinstance(raw, dict) and raw.get("format") == FORMAT


def replace_file(path: Path, data: bytes) -> None:
    """Write beside, sync, rename over, sync the folder: after a crash there is the old file or the new one. Raises OSError."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        if faults.active:
            faults.active.strike("write", name=path.name)
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
