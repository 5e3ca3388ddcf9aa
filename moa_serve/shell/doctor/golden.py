"""Golden numbers that the package carries: what the torch definition gives in float32 on a CPU for the made-up base and adapters.

The definition itself is held to the authors' numbers by tests/golden; a test holds this file to the definition. Written by

    python -m moa_serve.shell.doctor.golden
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moa_serve.llm import LLM
from moa_serve.shell.doctor.made_up import TINY, has_router, prompt_ids, written

FILE = Path(__file__).parent / "golden.safetensors"
BASE = "base"  # the entry of the base alone
PROMPTS = [prompt_ids(length, TINY["vocab_size"], seed) for seed, length in enumerate((20, 13))]
KV_CACHE_BYTES = 2**24


def compute(llm: LLM) -> dict[str, Tensor]:
    """By `NAME/row/logits` (T, V) float32 and, where there is a router, `NAME/row/selected` (L, T, E) bool; of the base, too."""
    found = {}
    for row, prompt in enumerate(PROMPTS):
        found[f"{BASE}/{row}/logits"] = llm.logits(prompt)
        for name in llm.adapters:
            found[f"{name}/{row}/logits"] = llm.logits(prompt, adapter=name)
            if has_router(name):
                found[f"{name}/{row}/selected"] = llm.route(prompt, adapter=name).selected
    return found


def read() -> Mapping[str, Tensor]:
    return load_file(FILE)


def main() -> None:
    torch.set_num_threads(1)
    with (
        written(TINY) as (base, adapters),
        LLM(base, adapters=adapters, backend="torch", device="cpu", dtype="float32", kv_cache_bytes=KV_CACHE_BYTES) as llm,
    ):
        save_file(compute(llm), FILE)
    sys.stdout.write(f"{FILE.name}: {FILE.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
