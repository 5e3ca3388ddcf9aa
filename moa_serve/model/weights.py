"""The weights of the base: where they come from, that they are whole, and the layout in which they are computed with.

`load_base` takes a local folder, a GGUF file, a hub id or nothing (the default base) and reads every tensor straight into its place, so
loading needs barely more memory than the weights. Strict: nothing missing, nothing left over, no pickle. Not for adapters.
Immutable after loading; owned by whoever called `load_base`.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from moa_serve.config import ModelConfig, token_ids
from moa_serve.errors import ModelCorrupt, ModelNotFound, ModelUnsupported, sized
from moa_serve.model.cache import file_sha256
from moa_serve.model.memory import available_bytes
from moa_serve.model.safetensors_file import SafetensorsFile

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # a table that old checkpoints carry; the config says the same
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "model*.safetensors", "tokenizer*", "*.jinja")
_NOT_DIGESTED = ("dtype", "bos_token_id", "eos_token_ids", "max_position")  # they change no value that the forward computes
_SHOWN_PROBLEMS = 5


@dataclass(eq=False, slots=True)
class LayerWeights:
    """One decoder layer. Linears are (out, in); those that read the same input stand in one tensor, so that they are one product."""

    attention_norm: Tensor  # (D,)
    qkv: Tensor  # (H*P + 2*K*P, D): Q, K, V rows
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # (P,)
    k_norm: Tensor | None  # (P,)
    o: Tensor  # (D, H*P)
    o_bias: Tensor | None
    ffn_norm: Tensor  # (D,)
    gate_up: Tensor  # (2F, D): gate rows, then up rows
    gate_up_bias: Tensor | None
    down: Tensor  # (D, F)
    down_bias: Tensor | None


@dataclass(eq=False, slots=True)
class BaseWeights:
    embed: Tensor  # (V, D)
    layers: list[LayerWeights]
    norm: Tensor  # (D,)
    head: Tensor  # (V, D); the same tensor object as `embed` where the config ties them

    @property
    def num_bytes(self) -> int:
        layers = [getattr(layer, name) for layer in self.layers for name in LayerWeights.__slots__]
        tensors = [self.embed, self.norm, *([] if self.head is self.embed else [self.head]), *layers]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(eq=False, slots=True)
class Base:
    """A loaded base. `digest` is equal exactly where config and weight files are; `folder` holds the tokenizer, if there is one."""

    config: ModelConfig
    weights: BaseWeights
    name: str
    digest: str
    folder: Path | None


def load_base(model: str | Path | None, *, device: str | torch.device = "cpu", dtype: torch.dtype, console: Console | None = None) -> Base:
    """Load the base that `model` names.

    Args:
        model: a folder with `config.json` and safetensors, a GGUF file, a hub id `org/name`, or None for the default base.
        dtype: of all weights, whatever the files hold.
        console: shows progress where a model must be fetched or converted first; by default standard error.
    Raises:
        ModelNotFound, ModelUnsupported, ModelCorrupt: name the file and the field or tensor, and what to do.
    """
    folder, name = _locate(model, console or Console(stderr=True))
    return _load_folder(folder, name, torch.device(device), dtype)


def read_config(folder: Path) -> ModelConfig:
    """`config.json`, with the end-of-sequence ids of `generation_config.json` where that has some: chat models list more there."""
    config = ModelConfig.from_hf(_read_json(folder / "config.json"))
    if (folder / "generation_config.json").is_file():
        more = token_ids(_read_json(folder / "generation_config.json").get("eos_token_id"))
        config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more))))
    return config


def _locate(model: str | Path | None, console: Console) -> tuple[Path, str]:
    """The folder that holds the model, made or fetched where it must be, and the name under which it is served."""
    if model is None:
        from moa_serve.model.default_base import NAME, default_base_folder  # here: not every base is this one

        return default_base_folder(console), NAME
    path = Path(model).expanduser()
    if path.is_dir():
        return path, path.resolve().name
    if path.is_file():
        return _locate_file(path, console)
    if isinstance(model, str) and _HUB_ID.fullmatch(model) and path.suffix != ".gguf" and not path.parent.exists():
        return _fetch_from_hub(model), path.name
    raise ModelNotFound(f"model {str(model)!r}: there is no such folder or file, and it is no hub id (org/name)", param="model")


def _locate_file(path: Path, console: Console) -> tuple[Path, str]:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        from moa_serve.model.gguf import converted  # here: the package takes a while to import, and few models need it

        return converted(path, console), path.stem
    if path.suffix == ".gguf":
        raise ModelCorrupt(f"{path}: not a GGUF file (it does not begin with 'GGUF'); fetch it again", param="model")
    raise ModelUnsupported(f"{path}: a model is a folder with config.json and {_WEIGHTS}, a GGUF file or a hub id", param="model")


def _fetch_from_hub(repo: str) -> Path:
    from huggingface_hub import snapshot_download  # here: a local folder needs none of it

    try:
        return Path(snapshot_download(repo, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:  # all of the hub's errors are one of the two
        reason = str(error).strip().split("\n")[0]
        raise ModelNotFound(
            f"model {repo!r}: not a local folder, and the hub does not give it ({type(error).__name__}: {reason}); "
            f"check the name and the network, or pass a folder that holds it",
            param="model",
        ) from None


def check_folder(folder: Path) -> tuple[ModelConfig, list[SafetensorsFile]]:
    """What a model folder holds, as far as config and headers tell: no weight is read. Raises as `load_base`."""
    config = read_config(folder)
    files = [SafetensorsFile(folder / file) for file in _weight_files(folder)]
    _check(folder, config, _owners(files))
    return config, files


def _load_folder(folder: Path, name: str, device: torch.device, dtype: torch.dtype) -> Base:
    config, files = check_folder(folder)
    owners = _owners(files)
    _check_room(name, allocate(config, torch.device("meta"), dtype).num_bytes, device, dtype)
    with torch.inference_mode(False):  # weights may be trained against; an inference tensor could not
        weights = allocate(config, device, dtype)
    for key, destination in named_tensors(config, weights):
        owners[key].read_into(key, destination)
    return Base(config, weights, name, _digest(config, files), folder)


def allocate(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> BaseWeights:
    """Uninitialised weights in the layout that the forward reads; on the `meta` device they cost nothing."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def bias(wanted: bool, size: int) -> Tensor | None:
        return new(size) if wanted else None

    hidden, inner, query, key = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    layers = [
        LayerWeights(
            attention_norm=new(hidden),
            qkv=new(query + 2 * key, hidden),
            qkv_bias=bias(config.qkv_bias, query + 2 * key),
            q_norm=bias(config.qk_norm, config.head_dim),
            k_norm=bias(config.qk_norm, config.head_dim),
            o=new(hidden, query),
            o_bias=bias(config.o_bias, hidden),
            ffn_norm=new(hidden),
            gate_up=new(2 * inner, hidden),
            gate_up_bias=bias(config.mlp_bias, 2 * inner),
            down=new(hidden, inner),
            down_bias=bias(config.mlp_bias, hidden),
        )
        for _ in range(config.num_layers)
    ]
    embed = new(config.vocab_size, hidden)
    return BaseWeights(embed, layers, new(hidden), embed if config.tie_word_embeddings else new(config.vocab_size, hidden))


def named_tensors(config: ModelConfig, weights: BaseWeights) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an HF checkpoint by its name there, as a contiguous view into `weights`."""
    query, key, inner = config.q_size, config.kv_size, config.intermediate_size
    yield "model.embed_tokens.weight", weights.embed
    for index, layer in enumerate(weights.layers):
        parts = [
            ("input_layernorm.weight", layer.attention_norm),
            ("self_attn.q_norm.weight", layer.q_norm),
            ("self_attn.k_norm.weight", layer.k_norm),
            ("self_attn.o_proj.weight", layer.o),
            ("self_attn.o_proj.bias", layer.o_bias),
            ("post_attention_layernorm.weight", layer.ffn_norm),
            ("mlp.down_proj.weight", layer.down),
            ("mlp.down_proj.bias", layer.down_bias),
        ]
        for suffix, fused in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
            if fused is not None:
                rows = {"q": fused[:query], "k": fused[query : query + key], "v": fused[query + key :]}
                parts += [(f"self_attn.{letter}_proj.{suffix}", view) for letter, view in rows.items()]
        for suffix, fused in (("weight", layer.gate_up), ("bias", layer.gate_up_bias)):
            if fused is not None:
                parts += [(f"mlp.gate_proj.{suffix}", fused[:inner]), (f"mlp.up_proj.{suffix}", fused[inner:])]
        for name, tensor in parts:
            if tensor is not None:
                yield f"model.layers.{index}.{name}", tensor
    yield "model.norm.weight", weights.norm
    if weights.head is not weights.embed:
        yield "lm_head.weight", weights.head


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "pass the .gguf file itself" if list(path.parent.glob("*.gguf")) else "a model folder holds config.json and safetensors"
        raise ModelNotFound(f"{path}: there is no such file; {hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelCorrupt(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelCorrupt(f"{path}: must be a JSON object, not {type(value).__name__}")
    return value


def _weight_files(folder: Path) -> list[str]:
    if (folder / _WEIGHTS).is_file():
        return [_WEIGHTS]
    if (folder / _INDEX).is_file():
        index = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
            raise ModelCorrupt(f"{folder / _INDEX}: weight_map must name a file for each tensor", param="weight_map")
        files = sorted(set(index.values()))
        outside = [file for file in files if Path(file).name != file]
        if outside:
            raise ModelCorrupt(f"{folder / _INDEX}: weight_map names {outside[0]!r}, which is not beside it", param="weight_map")
        return files
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pth", ".pt"))
    if pickles:
        raise ModelUnsupported(
            f"{folder}: its weights are pickles ({pickles[0]}), which can run code when they are read; save the model as safetensors"
        )
    raise ModelNotFound(f"{folder}: there is neither {_WEIGHTS} nor {_INDEX}")


def _owners(files: list[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    owners: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.tensors:
            if name in owners:
                raise ModelCorrupt(f"{file.path}: tensor {name} is in {owners[name].path.name} too")
            owners[name] = file
    return owners


def _check(folder: Path, config: ModelConfig, owners: Mapping[str, SafetensorsFile]) -> None:
    extra = {name for name in owners if _HARMLESS.search(name)}
    if config.tie_word_embeddings and _repeats_embedding(owners):
        extra.add("lm_head.weight")
    problems = misfits(config, {name: file.tensors[name].shape for name, file in owners.items() if name not in extra})
    if problems:
        raise ModelCorrupt(f"{folder}: the weights do not fit config.json: {first(problems)}", problems=problems)


def _check_room(name: str, needed: int, device: torch.device, dtype: torch.dtype) -> None:
    free = available_bytes(device)
    if needed > free:
        smaller = ", dtype bfloat16" if dtype == torch.float32 else ""
        raise ModelUnsupported(
            f"model {name}: its weights take {sized(needed)} in {str(dtype).removeprefix('torch.')}, but {sized(free)} are free on "
            f"{device}; free some{smaller}, or choose a smaller base",
            param="model",
        )


def misfits(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with a checkpoint of these tensors: missing, of another shape, left over. Takes no memory."""
    meta = allocate(config, torch.device("meta"), torch.float32)
    expected = {name: tuple(tensor.shape) for name, tensor in named_tensors(config, meta)}
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [f"{name} is left over" for name in shapes if name not in expected]
    problems += [
        f"{name} is {list(shapes[name])}, but the config says {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    return problems


def first(problems: list[str]) -> str:
    """As many as fit in a message."""
    more = f" (and {len(problems) - _SHOWN_PROBLEMS} more)" if len(problems) > _SHOWN_PROBLEMS else ""
    return "; ".join(problems[:_SHOWN_PROBLEMS]) + more


def _repeats_embedding(owners: Mapping[str, SafetensorsFile]) -> bool:
    """Whether `lm_head.weight` only repeats the embedding that the config ties it to; some tools write both."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    if any(name not in owners for name in names):
        return False
    head, embed = (owners[name].tensors[name] for name in names)
    return (head.dtype, head.shape) == (embed.dtype, embed.shape) and len({owners[name].sha256(name) for name in names}) == 1


def _digest(config: ModelConfig, files: list[SafetensorsFile]) -> str:
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_DIGESTED}
    content = {"config": fields, "files": [file_sha256(file.path) for file in files]}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
