"""Every way in which an adapter folder can be broken, one line each, for a good adapter of any base.

Used in memory, through the store, and over HTTP, through a real server. The numbers are those of the list of bad input that the server
promises to survive. A folder whose pickle ran has a folder `ran` in it.
"""

import io
import json
import os
import shutil
import socket
import stat
import tarfile
import zipfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from families import base_tensors
from support import tiny_manifest
from torch import Tensor

from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.manifest import Manifest
from moa_serve.config import ModelConfig
from moa_serve.engine.self_test import trial_prompt
from moa_serve.errors import (
    AdapterConfigInvalid,
    AdapterCorrupt,
    AdapterError,
    AdapterIncomplete,
    AdapterMismatch,
    AdapterNotFinite,
    AdapterNotFound,
    AdapterPathDenied,
    AdapterTooLarge,
    AdapterUnsafePickle,
)

Damage = Callable[[Path], object]
HUGE_LAYERS = "0-2000000000"


@dataclass(frozen=True, slots=True)
class Bad:
    """A damage to a good folder, and the error by which it is refused.

    Args:
        param: the field that the error names.
        says: a part of its message.
        is_listed: the folder still looks like an adapter, so that a request for its name is told what is wrong with it.
    """

    case: int
    name: str
    damage: Damage
    error: type[AdapterError]
    param: str | None = None
    says: str = ""
    is_listed: bool = True

    def __str__(self) -> str:
        return f"{self.case} {self.name}"


class Code:
    """Its pickle makes a folder when it is loaded without care."""

    def __init__(self, folder: Path) -> None:
        self._mark = str(folder / "ran")

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self._mark,)


def has_run(folder: Path) -> bool:
    return (folder / "ran").exists()


def params(num_layers: int, **changes: Any) -> dict[str, Any]:
    """`adapter_params.json` of a LoRA on Q, as the authors' scripts write it."""
    return {
        "lora_layers": f"0-{num_layers}", "lora_rank": 4, "lora_targets": "Q", "lora_alpha": 4, "expert_num": 1, "hydra_moe": False,
        "prompt_len": 1, "p_adapter_layers": "0-0", "p_adapter_size": 1, "prompt_layers": "0-0", **changes,
    }  # fmt: skip


def params_tensors(num_layers: int, width: int) -> dict[str, Tensor]:
    """The tensors that belong to `params`."""
    layer = "llama.layers.{}.attention.lora_Q.lora_{}.weight"
    tensors = {layer.format(i, "A"): torch.ones(4, width) for i in range(num_layers)}
    return tensors | {layer.format(i, "B"): torch.ones(width, 4) for i in range(num_layers)}


def write_overflowing(folder: Path, config: dict[str, Any], token: int, context: int) -> None:
    """An adapter whose only expert overflows, and is chosen for one token alone: it passes every check that can be made beforehand."""
    router = {"select": {"kind": "constant", "threshold": 0.5}}
    manifest = tiny_manifest(ModelConfig.from_hf(config), "sparse_moa", targets=("V",), layers=[0], router=router)
    seen = base_tensors(config)["model.embed_tokens.weight"].double()  # what the router of layer 0 reads
    tokens = [*trial_prompt(config["vocab_size"], context), token]
    wanted = torch.full((len(tokens), 1), -10.0, dtype=torch.float64)
    wanted[-1] = 10
    weight = torch.linalg.pinv(seen[tokens]) @ wanted
    tensors = {name: torch.full(shape, 1e30) for name, shape in manifest.expected_tensors().items()}
    tensors |= {"layers.0.router.weight": weight.T.float(), "layers.0.router.bias": torch.zeros(1)}
    write_adapter(folder, manifest, tensors)


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _file(name: str, data: bytes | str) -> Damage:
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def _weights(data: bytes) -> Damage:
    return _file("adapter.safetensors", data)


def _config(text: str | bytes) -> Damage:
    return _file("adapter.json", text)


def _remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def _replace(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).rename(folder / "aside")
        make(folder / name)

    return damage


def _holes(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, 64 * 2**30)


def _then(first: Damage, second: Damage) -> Damage:
    def damage(folder: Path) -> None:
        first(folder)
        second(folder)

    return damage


def _socket(path: Path) -> None:
    """Bound from inside its folder: the name of a socket may have 107 bytes only."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def _device(path: Path) -> None:
    """/dev/zero under another name; a pipe where only root could make one."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except PermissionError:
        os.mkfifo(path)


def _linked_folder(folder: Path) -> None:
    folder.rename(folder.with_name(folder.name + ".aside"))
    folder.symlink_to(folder.name + ".aside")


def _header(entries: str | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with this header, whatever it says."""
    header = entries.encode() if isinstance(entries, str) else entries
    return len(header).to_bytes(8, "little") + header + data


def _entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _bomb(_: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(8 * 2**20))
    return buffer.getvalue()


def _lying_zip(_: Path) -> bytes:
    """A stored member that says in the directory that it has 4 GB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
        archive.infolist()[0].file_size = 2**32 - 2
    return buffer.getvalue()


def _tar(folder: Path) -> bytes:
    """The format of torch before 0.1.10: a tar file of pickles."""
    buffer, code = io.BytesIO(), saved(Code(folder), _use_new_zipfile_serialization=False)
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(code)
            archive.addfile(member, io.BytesIO(code))
    return buffer.getvalue()


def _peft(data: bytes) -> Damage:
    """A folder of PEFT's, where the config says too little to bound the file."""

    def damage(folder: Path) -> None:
        clear(folder)
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_model.safetensors").write_bytes(data)

    return damage


def bad_adapters(manifest: Manifest, tensors: dict[str, Tensor]) -> list[Bad]:
    """The table, for a good folder of this manifest (one LoRA expert, Q, in every layer) and these tensors."""
    raw = manifest.model_dump(mode="json", exclude_none=True)
    num_layers, width = manifest.base.num_layers, manifest.base.hidden_size
    whole = safetensors.torch.save(tensors)
    header_size = 8 + int.from_bytes(whole[:8], "little")
    first = tensors["layers.0.Q.lora_A"]
    overlapping = ",".join(f'"t{i}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' for i in range(100_000))

    def changed(**changes: Tensor | None) -> Damage:
        """Change tensors of the good adapter ("__" stands for "."); None leaves one out."""
        table: dict[str, Tensor | None] = {**tensors, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
        return _weights(safetensors.torch.save({name: tensor for name, tensor in table.items() if tensor is not None}))

    def expert(text: str | None = None, **changes: Any) -> Damage:
        """Change fields of the manifest's only expert; `text` replaces ALPHA in the file."""
        config = json.dumps(raw | {"experts": [raw["experts"][0] | changes]})
        return _config(config if text is None else config.replace('"ALPHA"', text))

    def header(**entries: Any) -> Damage:
        return _weights(_header(json.dumps(entries), bytes(8)))

    def meta(make: Callable[[Path], Any], file: str = "adapter.pth", **changes: Any) -> Damage:
        """Make it a folder of the authors' Meta line."""

        def damage(folder: Path) -> None:
            clear(folder)
            (folder / "adapter_params.json").write_text(json.dumps(params(num_layers, **changes)))
            value = make(folder)
            (folder / file).write_bytes(value if isinstance(value, bytes) else saved(value))

        return damage

    other_width = {name: torch.ones([2 * size if size == width else size for size in tensor.shape]) for name, tensor in tensors.items()}
    experts = [{"name": f"Q/{i}", "kind": "lora", "target": "Q", "layers": [0], "rank": 1, "alpha": 1} for i in range(65)]
    many = raw | {"variant": "molora", "router": {"site": "linear", "input": "linear", "activation": "softmax"}, "experts": experts}
    return [
        Bad(1, "code in a zip pickle", meta(lambda f: {"a": Code(f)}), AdapterUnsafePickle),
        Bad(
            1, "code in a legacy pickle", meta(lambda f: saved({"a": Code(f)}, _use_new_zipfile_serialization=False)), AdapterUnsafePickle
        ),
        Bad(1, "code in a tar of pickles", meta(_tar), AdapterUnsafePickle),
        Bad(
            2, "training checkpoint", meta(lambda _: {"model": {}, "args": Namespace(lr=1)}), AdapterUnsafePickle,
            says="extract_adapter_from_checkpoint",
        ),
        Bad(
            2, "training checkpoint under its own name", meta(lambda _: {"args": Namespace(lr=1)}, "checkpoint-9.pth"), AdapterIncomplete,
            says="adapter.pth",
        ),
        Bad(3, "pickle named safetensors", lambda f: (f / "adapter.safetensors").write_bytes(saved({"a": Code(f)})), AdapterCorrupt),
        Bad(4, "packed members", meta(_bomb), AdapterTooLarge),
        Bad(4, "member of a declared 4 GB", meta(_lying_zip), AdapterTooLarge),
        Bad(5, "empty", _weights(b""), AdapterCorrupt),
        Bad(5, "cut in the length", _weights(whole[:7]), AdapterCorrupt),
        Bad(5, "cut in the header", _weights(whole[:20]), AdapterCorrupt),
        Bad(5, "cut behind the header", _weights(whole[:header_size]), AdapterCorrupt),
        Bad(5, "cut in the data", _weights(whole[: (header_size + len(whole)) // 2]), AdapterCorrupt),
        Bad(5, "last byte missing", _weights(whole[:-1]), AdapterCorrupt),
        Bad(6, "header of length 0", _weights(bytes(8)), AdapterCorrupt),
        Bad(6, "header above the file", _weights(len(whole).to_bytes(8, "little") + whole[8:]), AdapterCorrupt),
        Bad(6, "header of 2^63-1", _weights((2**63 - 1).to_bytes(8, "little")), AdapterCorrupt),
        Bad(6, "header not UTF-8", _weights(_header(b'{"\xff":1}')), AdapterCorrupt),
        Bad(6, "header is no JSON", _weights(_header("{")), AdapterCorrupt),
        Bad(6, "header is no object", _weights(_header("[]")), AdapterCorrupt),
        Bad(6, "header too deep", _weights(_header("[" * 100_000)), AdapterCorrupt),
        Bad(6, "100,000 overlapping tensors", _peft(_header(f"{{{overlapping}}}", bytes(4))), AdapterCorrupt),
        Bad(7, "trailing bytes", _weights(whole + b"more"), AdapterCorrupt),
        Bad(7, "hole", header(a=_entry([1], 4, 8)), AdapterCorrupt),
        Bad(7, "overlap", header(a=_entry([2], 0, 8), b=_entry([1], 4, 8)), AdapterCorrupt),
        Bad(7, "shape overflows", header(a=_entry([2**62, 8], 0, 8)), AdapterCorrupt),
        Bad(7, "shape below zero", header(a=_entry([-2], 0, 8)), AdapterCorrupt),
        Bad(7, "unknown dtype", header(a=_entry([8], 0, 8, "F9")), AdapterCorrupt),
        Bad(7, "whole numbers", changed(layers__0__Q__lora_A=torch.ones(first.shape, dtype=torch.int32)), AdapterCorrupt),
        Bad(8, "tensor missing", changed(layers__0__Q__lora_A=None), AdapterMismatch, says="layers.0.Q.lora_A: missing"),
        Bad(8, "tensor too much", changed(layers__0__Q__lora_C=torch.ones(1)), AdapterMismatch, says="layers.0.Q.lora_C"),
        Bad(8, "wrong shape", changed(layers__0__Q__lora_A=torch.ones(width, 4)), AdapterMismatch),
        Bad(8, "weights of another width", _weights(safetensors.torch.save(other_width)), AdapterMismatch),
        Bad(
            8, "config of another width", _config(json.dumps(raw | {"base": raw["base"] | {"hidden_size": 2 * width}})), AdapterMismatch,
            says="base.hidden_size",
        ),
        Bad(9, "base weight", changed(model__embed_tokens__weight=torch.ones(manifest.base.vocab_size, width)), AdapterMismatch),
        Bad(9, "base weight instead", changed(model__norm__weight=torch.ones(width), layers__0__Q__lora_A=None), AdapterMismatch),
        Bad(10, "NaN", changed(layers__0__Q__lora_A=torch.full_like(first, float("nan"))), AdapterNotFinite),
        Bad(10, "infinity", changed(layers__0__Q__lora_A=torch.full_like(first, float("inf"))), AdapterNotFinite),
        Bad(10, "one NaN in bfloat16", changed(layers__0__Q__lora_A=_one_nan(first).bfloat16()), AdapterNotFinite),
        Bad(13, "no weights", _remove("adapter.safetensors"), AdapterIncomplete),
        Bad(13, "no config", _remove("adapter.json"), AdapterIncomplete, is_listed=False),
        Bad(13, "empty folder", clear, AdapterIncomplete, is_listed=False),
        Bad(13, "no folder", shutil.rmtree, AdapterNotFound, is_listed=False),
        Bad(14, "empty config", _config(""), AdapterConfigInvalid),
        Bad(14, "config is no JSON", _config("adapter"), AdapterConfigInvalid),
        Bad(14, "config is no object", _config("[]"), AdapterConfigInvalid),
        Bad(14, "config above 1 MiB", _config(" " * (2**20 + 1)), AdapterConfigInvalid),
        Bad(14, "config too deep", _config("[" * 100_000), AdapterConfigInvalid),
        Bad(14, "config deep where anything may stand", _config(json.dumps(raw | {"training": _deep(100)})), AdapterConfigInvalid),
        Bad(14, "config not UTF-8", _config(b'{"a": "\xff"}'), AdapterConfigInvalid),
        Bad(14, "config in UTF-16", _config(json.dumps(raw).encode("utf-16")), AdapterConfigInvalid),
        Bad(14, "config with a lone surrogate", _config(json.dumps(raw | {"license": "\ud800"})), AdapterConfigInvalid),
        Bad(14, "config with NaN", _config('{"format": NaN}'), AdapterConfigInvalid),
        Bad(14, "config with one key twice", _config('{"format": 1, "format": 1}'), AdapterConfigInvalid),
        Bad(14, "config of another format", _config(json.dumps(raw | {"format": "moa-adapter/2"})), AdapterConfigInvalid, param="format"),
        Bad(14, "config with an unknown key", _config(json.dumps(raw | {"auto_map": {}})), AdapterConfigInvalid, param="auto_map"),
        Bad(15, "layer outside the base", expert(layers=[0, num_layers]), AdapterConfigInvalid, param="experts"),
        Bad(15, "layers reversed", expert(layers=[1, 0]), AdapterConfigInvalid, param="experts.0.layers"),
        Bad(15, "layer 2e9", expert(layers=[2_000_000_000]), AdapterConfigInvalid, param="experts.0.layers"),
        Bad(15, "layer -1", expert(layers=[-1]), AdapterConfigInvalid, param="experts.0.layers"),
        Bad(15, "rank 0", expert(rank=0), AdapterConfigInvalid, param="experts.0.rank"),
        Bad(15, "rank -1", expert(rank=-1), AdapterConfigInvalid, param="experts.0.rank"),
        Bad(15, "rank 513", expert(rank=513), AdapterConfigInvalid, param="experts.0.rank"),
        Bad(
            15, "65 inner experts", expert(inner={"variant": "molora", "num_experts": 65}), AdapterConfigInvalid,
            param="experts.0.inner.num_experts",
        ),
        Bad(15, "65 experts at one linear", _config(json.dumps(many)), AdapterConfigInvalid, param="experts"),
        Bad(15, "alpha 10000", expert(alpha=10_000), AdapterConfigInvalid, param="experts.0.alpha"),
        Bad(15, "alpha NaN", expert("NaN", alpha="ALPHA"), AdapterConfigInvalid),
        Bad(15, "alpha 1e999", expert("1e999", alpha="ALPHA"), AdapterConfigInvalid),
        Bad(15, "the authors' layers 0-2e9", meta(lambda _: b"", lora_layers=HUGE_LAYERS), AdapterConfigInvalid, param="lora_layers"),
        Bad(15, "the authors' layers reversed", meta(lambda _: b"", lora_layers="2-0"), AdapterConfigInvalid, param="lora_layers"),
        Bad(15, "the authors' rank 0", meta(lambda _: b"", lora_rank=0), AdapterConfigInvalid, param="lora_rank"),
        Bad(15, "the authors' 65 experts", meta(lambda _: b"", expert_num=65), AdapterConfigInvalid, param="expert_num"),
        Bad(
            15, "the authors' huge prompt", meta(lambda _: b"", prompt_layers="0-1", prompt_len=10**9), AdapterConfigInvalid,
            param="prompt_len",
        ),
        Bad(15, "the authors' alpha 1e5", meta(lambda _: b"", lora_alpha=1e5), AdapterConfigInvalid, param="lora_alpha"),
        Bad(16, "pipe", _replace("adapter.safetensors", os.mkfifo), AdapterPathDenied),
        Bad(16, "pipe as config", _replace("adapter.json", os.mkfifo), AdapterPathDenied),
        Bad(16, "device", _replace("adapter.safetensors", _device), AdapterPathDenied),
        Bad(16, "socket", _replace("adapter.safetensors", _socket), AdapterPathDenied),
        Bad(16, "folder as a file", _replace("adapter.safetensors", os.mkdir), AdapterPathDenied),
        Bad(16, "link", _replace("adapter.safetensors", lambda path: path.symlink_to("aside")), AdapterPathDenied),
        Bad(16, "link as config", _replace("adapter.json", lambda path: path.symlink_to("aside")), AdapterPathDenied),
        Bad(17, "folder is a link", _linked_folder, AdapterPathDenied, param="path", is_listed=False),
        Bad(18, "64 GB of holes", _holes("adapter.safetensors"), AdapterTooLarge),
        Bad(18, "64 GB of holes in a pickle", _then(meta(lambda _: b""), _holes("adapter.pth")), AdapterTooLarge),
        Bad(
            18, "more than the tensors take", _weights(safetensors.torch.save(tensors | {"padding": torch.zeros(2**20)})), AdapterTooLarge
        ),
    ]  # fmt: skip


def _one_nan(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed[-1, -1] = float("nan")
    return changed


def _deep(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value
