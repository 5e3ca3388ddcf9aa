"""A GGUF file gives the model that it was written from, tokenizer included, or a refusal that names its key."""

import io
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import ALPHABET, TOKENS, byte_level, write_gguf
from rich.console import Console
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moa_serve.config import RopeConfig
from moa_serve.errors import ModelCorrupt, ModelUnsupported
from moa_serve.model.weights import Base, load_base, named_tensors
from moa_serve.text import Tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(TOKENS),
    "max_position_embeddings": 256,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOA_CACHE_DIR", str(tmp_path / "cache"))


def random_model(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, **more})),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**{**SIZES, **more})),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **more})),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**{**SIZES, **more})),
    }[kind]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def load(path: Path) -> Base:
    return load_base(path, dtype=torch.float32, console=Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {"head_dim": 16}),
        ("qwen3", {}),
    ],
)
def test_tensors_come_back_in_their_order(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    """LLaMA's Q and K rows stand in another order in the file; left so, the model talks nonsense fluently."""
    model = random_model(kind, **more)
    base = load(write_gguf(tmp_path / "tiny.gguf", model))
    expected = model.state_dict()
    loaded = dict(named_tensors(base.config, base.weights))
    assert set(expected) - set(loaded) == ({"lm_head.weight"} if more.get("tie_word_embeddings") else set())
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name]), name
    assert (base.name, base.config.max_position, base.config.rms_norm_eps) == ("tiny", 256, 1e-5)
    assert base.config.rope == RopeConfig(model.config.rope_parameters["rope_theta"])


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
def test_stored_values_are_what_the_format_says(tmp_path: Path, kind: Kind) -> None:
    model = random_model("qwen3")
    base = load(write_gguf(tmp_path / "tiny.gguf", model, kind))
    for name, tensor in named_tensors(base.config, base.weights):
        expected = model.state_dict()[name]
        if expected.ndim > 1:
            expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(expected.numpy(), kind), kind))
            expected = expected if kind is Kind.F16 else expected.bfloat16().float()
        assert torch.equal(tensor, expected), name
    assert base.config.dtype == ("float16" if kind is Kind.F16 else "bfloat16")


def llama3_factors(factor: float, head_dim: int, theta: float = 1e4) -> np.ndarray[Any, Any]:
    """Wavelength by wavelength, as Llama 3.1's reference code says it."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_recognised(tmp_path: Path, factor: float) -> None:
    """The file has the divisors only; ignored, long texts fall apart."""
    extra = {"rope_freqs.weight": llama3_factors(factor, 32)}
    base = load(write_gguf(tmp_path / "tiny.gguf", random_model("llama"), extra=extra))
    assert base.config.rope == RopeConfig(1e4, "llama3", factor, 1.0, 4.0, 8192)


def test_scaling_by_a_constant(tmp_path: Path) -> None:
    change = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}
    base = load(write_gguf(tmp_path / "tiny.gguf", random_model("llama"), change=change))
    assert base.config.rope == RopeConfig(1e4, "linear", 2.5)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"attention.head_count": 0}, r"llama\.attention\.head_count is 0"),
        ({"attention.head_count_kv": [2, 1]}, r"attention\.head_count_kv is \[2, 1\]"),
        ({"rope.scaling.type": "yarn"}, r"rope\.scaling\.type"),
        ({"rope.dimension_count": 16}, r"rope\.dimension_count"),
        ({"attention.value_length": 16}, r"attention\.value_length"),
        ({"expert_count": 8}, r"llama\.expert_count"),
        ({"logit_scale": 2.0}, r"llama\.logit_scale"),
    ],
)
def test_what_is_not_served_names_its_key(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelUnsupported, match=key):
        load(write_gguf(tmp_path / "tiny.gguf", random_model("llama"), change=change))


def test_unknown_divisors_are_refused(tmp_path: Path) -> None:
    """LongRoPE keeps its factors under the same name as Llama 3."""
    extra = {"rope_freqs.weight": np.linspace(1, 4, 16, dtype=np.float32)}
    with pytest.raises(ModelUnsupported, match=r"rope_freqs\.weight"):
        load(write_gguf(tmp_path / "tiny.gguf", random_model("llama"), extra=extra))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelUnsupported, match=r"general\.architecture 'gemma3'"):
        load(tmp_path / "other.gguf")


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_model("llama"))
    whole = path.read_bytes()
    for damaged in (b"PK" + whole[2:], whole[:6], whole[:200], whole[:-64]):
        path.write_bytes(damaged)
        with pytest.raises(ModelCorrupt, match=r"tiny\.gguf"):
            load(path)


def test_tensors_must_fit_the_metadata(tmp_path: Path) -> None:
    model, extra = random_model("llama"), {"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}
    with pytest.raises(ModelCorrupt, match=r"attn_sinks\.weight is left over"):
        load(write_gguf(tmp_path / "a.gguf", model, extra=extra))
    with pytest.raises(ModelCorrupt, match=r"layers\.2\.\S+ is missing"):
        load(write_gguf(tmp_path / "b.gguf", model, change={"block_count": 3}))
    with pytest.raises(ModelCorrupt, match=r"llama\.context_length is missing"):
        load(write_gguf(tmp_path / "c.gguf", model, change={"context_length": None}))
    assert not list((tmp_path / "cache" / "bases").iterdir())  # nothing half made is left


def test_a_file_is_converted_once(tmp_path: Path) -> None:
    """Dequantising takes far longer than loading."""
    path, shown = write_gguf(tmp_path / "tiny.gguf", random_model("llama")), io.StringIO()
    folders = {load_base(path, dtype=torch.float32, console=Console(file=shown)).folder for _ in range(3)}
    assert len(folders) == 1
    assert shown.getvalue().count("Converting tiny.gguf") == 1


def test_a_damaged_conversion_is_made_again(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_model("llama"))
    base = load(path)
    assert base.folder is not None
    weights = base.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert load(path).digest == base.digest


def test_without_a_writable_cache_it_still_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only container has to serve what a writable one does."""
    path = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), tokenizer=byte_level("smollm"))
    expected = load(path).digest
    (tmp_path / "occupied").touch()
    monkeypatch.setenv("MOA_CACHE_DIR", str(tmp_path / "occupied"))
    base = load(path)
    assert base.digest == expected
    assert base.folder is not None
    assert Tokenizer.from_folder(base.folder) is not None


def tokenizer(tmp_path: Path, metadata: dict[str, Any]) -> Tokenizer:
    base = load(write_gguf(tmp_path / "tiny.gguf", random_model("llama"), tokenizer=metadata))
    assert base.folder is not None
    found = Tokenizer.from_folder(base.folder)
    assert found is not None
    return found


@pytest.mark.parametrize(("pre", "bos"), [("smollm", []), ("llama-bpe", [1]), ("qwen2", [])])
def test_byte_level_tokenizers(tmp_path: Path, pre: str, bos: list[int]) -> None:
    """Merges stay inside words, control tokens are control tokens, and only Llama 3 begins with one by itself."""
    found = tokenizer(tmp_path, byte_level(pre, **{"tokenizer.chat_template": "{{ messages }}"}))
    the = TOKENS.index("Ġthe")
    assert found.encode(" the the<|user|>", parse_special=True) == [*bos, the, the, 1]
    text = "Ünï 中文 😀 12345 don't\r\n\n  x "
    assert found.decode(found.encode(text, parse_special=False)) == text
    assert found.special_ids == {0, 1}
    assert (found.special_tokens["bos_token"], found.chat_template) == ("<|user|>", "{{ messages }}")


def test_digits_are_words_of_their_own(tmp_path: Path) -> None:
    """One by one or by threes: a merge across the border would give ids that the model never saw."""
    tokens = [*TOKENS, "12", "123", "1234"]
    merges = ["1 2", "12 3", "123 4"]
    more = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2), "tokenizer.ggml.merges": merges}
    model, found = random_model("llama", vocab_size=len(tokens)), {}
    for pre in ("smollm", "llama-bpe", "qwen2"):
        metadata = byte_level(pre, **more, **{"tokenizer.ggml.add_bos_token": False})
        folder = load(write_gguf(tmp_path / f"{pre}.gguf", model, tokenizer=metadata)).folder
        assert folder is not None
        loaded = Tokenizer.from_folder(folder)
        assert loaded is not None
        found[pre] = [loaded.token_text(index) for index in loaded.encode("1234", parse_special=False)]
    assert found == {"smollm": list("1234"), "llama-bpe": ["123", "4"], "qwen2": list("1234")}


def sentencepiece(**more: Any) -> dict[str, Any]:
    pieces = ["▁", "a", "b", "c", "ab", "abc", "▁a", "▁abc", "</", "s>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **more,
    }


def test_sentencepiece_tokenizers(tmp_path: Path) -> None:
    """Scores rank the merges, unknown characters are bytes, and the text of a control token never merges into it."""
    metadata = sentencepiece()
    tokens = metadata["tokenizer.ggml.tokens"]
    base = load(write_gguf(tmp_path / "tiny.gguf", random_model("llama", vocab_size=len(tokens)), tokenizer=metadata))
    assert base.folder is not None
    found = Tokenizer.from_folder(base.folder)
    assert found is not None
    assert [tokens[i] for i in found.encode("abc ab", parse_special=False)] == ["<s>", "▁abc", "▁", "ab"]
    assert 2 not in found.encode("</s>", parse_special=False)
    assert found.encode("a</s>", parse_special=True)[-1] == 2
    for text in ("naïve 😀 abc", "  two", "<0x41>", "</s>"):
        assert found.decode(found.encode(text, parse_special=False)) == text


@pytest.mark.parametrize(
    ("change", "error", "key"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, ModelUnsupported, r"tokenizer\.ggml\.pre 'tekken'"),
        ({"tokenizer.ggml.model": "t5"}, ModelUnsupported, r"tokenizer\.ggml\.model 't5'"),
        ({"tokenizer.ggml.token_type": [3]}, ModelCorrupt, r"tokenizer\.ggml\.token_type"),
        ({"tokenizer.ggml.merges": ["z zz"]}, ModelCorrupt, "does not fit"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 9999}, ModelCorrupt, "bos"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt_are_refused(tmp_path: Path, change: dict[str, Any], error: type[Exception], key: str) -> None:
    """A tokenizer that splits differently gives other ids, and answers that are only a little worse."""
    with pytest.raises(error, match=key):
        tokenizer(tmp_path, {**byte_level("smollm"), **change})


def test_the_alphabet_is_whole() -> None:
    assert len(set(ALPHABET)) == 256
