"""A base loads whole and equal to what transformers reads, from every place it may lie in, or is refused by name."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from moa_serve.errors import ModelCorrupt, ModelNotFound, ModelUnsupported
from moa_serve.model import weights
from moa_serve.model.cache import file_sha256, warn_read_only
from moa_serve.model.weights import load_base, named_tensors

transformers_logging.disable_progress_bar()
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, Callable[[], Any]] = {
    "llama3": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, head_dim=16, tie_word_embeddings=True, rope_parameters={**LLAMA3, "original_max_position_embeddings": 64})
    ),
    "llama_biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=24)),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOA_CACHE_DIR", str(tmp_path / "cache"))


def random_model(kind: str) -> Any:
    """Every parameter random, so that none can be mistaken for another: norms and biases are born as ones and zeros."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder with the tied model, in one file."""
    random_model("llama3").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("kind", MODELS)
def test_every_tensor_is_where_it_belongs(tmp_path: Path, kind: str) -> None:
    """Q, K, V and gate, up share a tensor here; exchanged rows would still have the right shape."""
    model = random_model(kind)
    model.save_pretrained(tmp_path / kind)
    base = load_base(tmp_path / kind, dtype=torch.float32)
    expected = model.state_dict()
    if base.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
        assert base.weights.head is base.weights.embed
    loaded = dict(named_tensors(base.config, base.weights))
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name]), name
    layer = base.weights.layers[1]
    names = [f"model.layers.1.self_attn.{letter}_proj.weight" for letter in "qkv"]
    assert torch.equal(layer.qkv, torch.cat([expected[name] for name in names]))
    assert torch.equal(layer.gate_up, torch.cat([expected[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]))
    assert (base.name, base.folder) == (kind, tmp_path / kind)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_in_the_dtype_that_is_asked_for(llama: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    rewrite(llama, lambda tensors: tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()}))
    base = load_base(llama, dtype=dtype)
    expected = load_file(llama / "model.safetensors")
    for name, tensor in named_tensors(base.config, base.weights):
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype)), name


def test_conversion_in_small_pieces_is_the_same(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are converted through a small buffer; its border falls into tensors of every real model."""
    monkeypatch.setattr("moa_serve.model.safetensors_file._CHUNK_BYTES", 28)
    base = load_base(llama, dtype=torch.bfloat16)
    expected = load_file(llama / "model.safetensors")
    for name, tensor in named_tensors(base.config, base.weights):
        assert torch.equal(tensor, expected[name].bfloat16()), name


def test_shards_are_one_model(tmp_path: Path, llama: Path) -> None:
    random_model("llama3").save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    one, many = load_base(llama, dtype=torch.float32), load_base(tmp_path / "sharded", dtype=torch.float32)
    for (name, left), (_, right) in zip(named_tensors(one.config, one.weights), named_tensors(many.config, many.weights), strict=True):
        assert torch.equal(left, right), name


def test_harmless_leftovers_are_let_be(llama: Path) -> None:
    """Old checkpoints carry RoPE tables, and some tools write a tied head twice."""

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(llama, add)
    base = load_base(llama, dtype=torch.float32)
    assert base.weights.head is base.weights.embed


def test_all_that_does_not_fit_is_named_at_once(llama: Path) -> None:
    """One finding a run would mean one run a finding; nothing is half loaded."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.norm.weight"] = torch.ones(31)
        tensors["lm_head.weight"] = torch.zeros(64, 32)  # tied by the config, but another matrix: which one is meant?

    rewrite(llama, spoil)
    with pytest.raises(ModelCorrupt, match="do not fit") as caught:
        load_base(llama, dtype=torch.float32)
    assert sorted(caught.value.problems) == [
        "lm_head.weight is left over",
        "model.layers.0.self_attn.q_proj.bias is left over",
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.norm.weight is [31], but the config says [32]",
    ]


def test_damaged_files_are_refused(llama: Path) -> None:
    """A download that stopped must not become zeros in the weights."""
    path = llama / "model.safetensors"
    whole = path.read_bytes()
    huge = (2**63 - 1).to_bytes(8, "little")
    for damaged in (b"", whole[:100], whole[:-1], whole + b"0", huge + whole[8:], whole[:8] + b"\xff" + whole[9:]):
        path.write_bytes(damaged)
        with pytest.raises(ModelCorrupt, match=r"model\.safetensors"):
            load_base(llama, dtype=torch.float32)


def test_quantised_tensors_are_refused_by_name(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(ModelUnsupported, match=r"model\.norm\.weight is I8"):
        load_base(llama, dtype=torch.float32)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN', "\xff"])
def test_a_config_that_is_no_object_is_corrupt(llama: Path, text: str) -> None:
    (llama / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelCorrupt, match=r"config\.json"):
        load_base(llama, dtype=torch.float32)


def test_missing_parts_say_what_belongs_there(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"neither model\.safetensors nor"):
        load_base(llama, dtype=torch.float32)
    (llama / "config.json").unlink()
    (llama / "some.gguf").touch()
    with pytest.raises(ModelNotFound, match=r"pass the \.gguf file itself"):
        load_base(llama, dtype=torch.float32)


def test_pickles_are_never_read(llama: Path) -> None:
    """Unpickling runs what the file says."""
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ModelUnsupported, match=r"pytorch_model\.bin"):
        load_base(llama, dtype=torch.float32)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "gone.safetensors"])
def test_an_index_names_only_files_beside_it(llama: Path, file: str) -> None:
    """Else a model folder could read any file of the machine."""
    (llama / "model.safetensors").rename(llama.parent / "model.safetensors")
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises((ModelCorrupt, ModelNotFound), match=Path(file).name):
        load_base(llama, dtype=torch.float32)


@pytest.mark.parametrize(
    "model", ["./nothing", "/nothing/here", "~/nothing-of-the-kind", "a/b/c", "missing.gguf", "models/x", "SmolLM", Path("a/b")]
)
def test_what_looks_like_a_path_is_not_asked_for_on_the_hub(model: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing mistake in a path must not send the name of a private folder to a public service."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(weights, "_fetch_from_hub", lambda repo: pytest.fail(f"asked the hub for {repo}"))
    with pytest.raises(ModelNotFound):
        load_base(model, dtype=torch.float32)


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFound, match="check the name and the network"):
        load_base("no-such-org/no-such-model", dtype=torch.float32)


def test_the_chat_models_further_ends_of_sequence_count(llama: Path) -> None:
    """Llama 3 Instruct ends turns with an id that only generation_config.json names; without it chats never stop."""
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    assert load_base(llama, dtype=torch.float32).config.eos_token_ids == (2, 9)


def test_the_digest_follows_content_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    """KV blocks and packed adapters are kept under it: equal bases share them, different ones must not."""
    first = load_base(llama, dtype=torch.float32).digest
    copy = shutil.copytree(llama, tmp_path / "copy")
    (copy / "generation_config.json").unlink()
    assert load_base(copy, dtype=torch.bfloat16).digest == first
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    changed = load_base(copy, dtype=torch.float32).digest
    (copy / "config.json").write_text(json.dumps(config))
    rewrite(copy, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert len({first, changed, load_base(copy, dtype=torch.float32).digest}) == 3


def test_a_changed_file_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = file_sha256(path)
    assert file_sha256(path) == first
    path.write_bytes(b"three")
    assert file_sha256(path) != first


def test_a_read_only_cache_means_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A read-only container must serve; a file where the folder should be fails for root too."""
    (tmp_path / "occupied").touch()
    monkeypatch.setenv("MOA_CACHE_DIR", str(tmp_path / "occupied"))
    warn_read_only.cache_clear()
    (tmp_path / "file").write_bytes(b"one")
    with caplog.at_level(logging.WARNING):
        digests = {file_sha256(tmp_path / "file") for _ in range(3)}
    assert len(digests) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_loading_takes_barely_more_memory_than_the_weights(tmp_path: Path) -> None:
    """Peak memory is what the machine must have; a mapped file or a second copy would double it. For a base on another device the machine
    needs a piece of a tensor at a time: `meta` stands for a GPU that may hold more than the machine does."""
    sizes = {**SIZES, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 16384, "head_dim": 64}
    LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16().save_pretrained(tmp_path / "model")
    script = """
import sys, torch
from moa_serve.model.weights import load_base, named_tensors

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.empty(9, device=sys.argv[3]).copy_(torch.empty(9, dtype=torch.bfloat16))  # what torch loads for a first copy is no weight
before = peak()
base = load_base(sys.argv[1], dtype=getattr(torch, sys.argv[2]), device=sys.argv[3])
print((peak() - before) / sum(t.nbytes for _, t in named_tensors(base.config, base.weights)))
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's count of memory")
    for dtype, device in (("bfloat16", "cpu"), ("float32", "cpu"), ("bfloat16", "meta")):
        command = [sys.executable, "-c", script, str(tmp_path / "model"), dtype, device]
        ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert (ratio < 0.4) if device == "meta" else (0.5 < ratio <= 1.2), (dtype, device, ratio)
