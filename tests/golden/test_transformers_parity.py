"""The base alone against transformers: tiny random models of each kind, and the default base."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import ON_GPU, computing
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moa_serve import LLM, MoaError, SamplingParams

SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama_multi_head": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_key_value_heads": 4})),
    "llama_head_dim_apart": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=20)),
    "llama_scaled_rope": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LLAMA3)),
    "llama_linear_rope": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})
    ),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama_biases": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, head_dim=12, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "qwen3_biases_tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, attention_bias=True, tie_word_embeddings=True)),
}
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
TEXTS = [
    "The capital of France is", "Once upon a time there was", "def fibonacci(n):", "Water boils at", "The best way to learn a language is",
    "In 1969, the first", "Q: What is 12 times 7? A:", "My favourite poem begins with",
]  # fmt: skip


def logits_of(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["torch", *ON_GPU])
@pytest.mark.parametrize("kind", MODELS)
def test_tiny_models(kind: str, backend: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = MODELS[kind]().float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:  # transformers starts them at 0 and 1, where a missing one would not show
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path)
    rng = random.Random(5)
    prompts = [[rng.randrange(SHAPE["vocab_size"]) for _ in range(rng.randint(3, 90))] for _ in range(8)]
    with LLM(tmp_path, **computing(backend), dtype="float32", kv_cache_bytes=2**24) as llm:
        for prompt in prompts[:3]:
            torch.testing.assert_close(llm.logits(prompt), logits_of(model, prompt), atol=2e-4, rtol=1e-4)
        for prompt, completion in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
            expected = logits_of(model, prompt + completion.token_ids)[len(prompt) - 1 : -1].argmax(-1)
            assert completion.token_ids == expected.tolist()


@pytest.fixture(scope="module")
def default_base() -> Path:
    """The real base; it is fetched once and then cached."""
    try:
        with LLM(backend="torch", device="cpu", dtype="bfloat16", kv_cache_bytes=2**26) as llm:
            folder = llm.folder
    except MoaError as error:
        pytest.skip(f"no default base here: {error}")
    assert folder is not None
    return folder


def greedy_against(default_base: Path, dtype: str) -> list[tuple[float, float]]:
    """(gap, spacing) at each of 8 x 64 places where transformers, given the same beginning, would have chosen another token.

    One pass over prompt and completion says what it would have chosen everywhere. `gap` is how much less it gives our token, `spacing`
    the distance of neighbouring numbers of the dtype at that size.
    """
    model = LlamaForCausalLM.from_pretrained(default_base, dtype=getattr(torch, dtype)).eval()
    parted = []
    with LLM(default_base, backend="torch", device="cpu", dtype=dtype, kv_cache_bytes=2**28) as llm:
        assert llm.tokenizer is not None
        prompts = [llm.tokenizer.encode(text, parse_special=True) for text in TEXTS]
        if dtype == "float32":
            for prompt in prompts[:3]:
                torch.testing.assert_close(llm.logits(prompt), logits_of(model, prompt), atol=2e-4, rtol=1e-4)
        for prompt, completion in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
            theirs = logits_of(model, prompt + completion.token_ids)[len(prompt) - 1 : -1]
            for row, token in zip(theirs, completion.token_ids, strict=True):
                best = row.max()
                if int(row.argmax()) != token:
                    spacing = 2.0 ** math.floor(math.log2(abs(float(best)))) * torch.finfo(getattr(torch, dtype)).eps
                    parted.append((float(best - row[token]), spacing))
    return parted


def test_default_base_in_float32(default_base: Path) -> None:
    assert greedy_against(default_base, "float32") == []


def test_default_base_in_bfloat16(default_base: Path) -> None:
    """Logits of 16 to 64 are 0.125 to 0.25 apart in bfloat16: texts part where the two best are equal or neighbours, and rarely."""
    parted = greedy_against(default_base, "bfloat16")
    print(f"{len(parted)} of {len(TEXTS) * 64} places part")  # noqa: T201
    assert all(gap <= max(0.1, spacing) for gap, spacing in parted), parted
    assert len(parted) <= 0.04 * len(TEXTS) * 64
