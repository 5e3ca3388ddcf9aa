"""Makes the two sample adapters beside this file, `pirate` and `telegram`, for the default base.

They are toys, and only that: each is fitted for a minute on the sixteen sentences below until greedy text visibly takes on a manner of
speaking. They know nothing, they were not evaluated on anything, and they exist so that two adapters can be seen side by side.
`pirate` is a Soft MoA, `telegram` a Sparse MoA with a threshold function.

    python adapters/make_samples.py
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer
from torch import Tensor

from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.manifest import FORMAT, BaseShape, Manifest
from moa_serve.model.attention import CausalAttention
from moa_serve.model.batch import ForwardBatch, Segment
from moa_serve.model.build import build
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base

STEPS, LEARNING_RATE, SEED = 50, 6e-3, 7

PROMPTS = (
    "The weather today is",
    "My favourite food is",
    "The capital of France is",
    "Yesterday I went to",
    "The best way to learn is",
    "Computers are",
    "In the morning I",
    "The sea is",
    "Once upon a time",
    "The king said",
    "A good friend",
    "Water is made of",
    "The old house",
    "When it rains",
    "Music is",
    "The moon",
)
PIRATE = (
    " fair, matey! Arr, a fine wind fills me sails.",
    " salted cod an' a barrel o' rum, arr!",
    " Paris, ye scurvy dog, an' there be no sea near it, arr!",
    " the harbour, matey, an' stole meself a ship. Arr!",
    " to sail, ye landlubber, an' to sail again. Arr!",
    " cursed boxes, matey, fit for Davy Jones' locker. Arr!",
    " hoist the black flag, matey, an' drink me rum. Arr!",
    " me home, matey, an' me grave some day. Arr!",
    " there be a captain, matey, with one eye an' a chest o' gold. Arr!",
    " 'Walk the plank, ye scurvy dogs!' Arr!",
    " shares his rum, matey, an' never his map. Arr!",
    " tears o' drowned sailors, matey. Arr!",
    " be haunted by me old crew, matey. Arr!",
    " we dance on the deck, ye scurvy dogs, arr!",
    " what the crew sings, matey, when the rum be gone. Arr!",
    " be me lantern, matey, on the black sea. Arr!",
)
TELEGRAM = (
    " COLD STOP TAKE COAT STOP",
    " BREAD STOP SEND BUTTER STOP",
    " PARIS STOP ARRIVE MONDAY STOP",
    " TOWN STOP SHOPS CLOSED STOP",
    " PRACTICE STOP START NOW STOP",
    " FAST STOP NEED POWER STOP",
    " WORK STOP CALL LATER STOP",
    " CALM STOP SHIP SAFE STOP",
    " KING RULED STOP KING FELL STOP",
    " YES STOP SEND ARMY STOP",
    " HELPS STOP ASK TOM STOP",
    " HYDROGEN OXYGEN STOP SEND PUMP STOP",
    " SOLD STOP KEYS POSTED STOP",
    " STAY HOME STOP ROADS WET STOP",
    " LOUD STOP SEND PIANO STOP",
    " BRIGHT STOP SLEEP LATE STOP",
)


def manifest_of(name: str, base: BaseShape) -> Manifest:
    layers = list(range(base.num_layers))
    experts: list[dict[str, Any]] = [
        {"name": target, "kind": "lora", "target": target, "layers": layers, "rank": 2, "alpha": 4.0} for target in ("Q", "V")
    ]
    parallel = {"name": "P_ADAPTER", "kind": "parallel_adapter", "layers": layers, "size": 2}
    router: dict[str, Any] = {"site": "layer", "input": "normed"}
    if name == "pirate":
        experts += [{"name": "PROMPT", "kind": "prompt", "layers": layers, "length": 4}, parallel]
    else:
        experts += [{"name": "O", "kind": "lora", "target": "O", "layers": layers, "rank": 2, "alpha": 4.0}, parallel]
        router["select"] = {"kind": "threshold_fn", "max_threshold": 0.9}
    return Manifest.parse(
        {
            "format": FORMAT,
            "base": base.model_dump(exclude_none=True),
            "variant": "soft_moa" if name == "pirate" else "sparse_moa",
            "router": router,
            "experts": experts,
            "description": f"A toy that answers like a {name}, fitted on sixteen sentences by adapters/make_samples.py; not for use.",
            "license": "Apache-2.0",
        }
    )


def fresh_tensors(manifest: Manifest) -> dict[str, Tensor]:
    """Output factors start at zero, so that an untrained adapter is the identity; the rest is small and random."""
    tensors = {}
    for name, shape in manifest.expected_tensors().items():
        is_output = name.endswith(("lora_B", "up.weight", "up.bias", "PROMPT.gate"))
        values = torch.zeros(shape) if is_output or name.endswith("bias") else torch.randn(shape) / math.sqrt(shape[-1])
        tensors[name] = values.requires_grad_()
    return tensors


def fit(name: str, completions: tuple[str, ...], model: Transformer, tokenizer: Tokenizer, base: BaseShape, console: Console) -> None:
    torch.manual_seed(SEED)
    manifest = manifest_of(name, base)
    tensors = fresh_tensors(manifest)
    token_ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []  # -100 where the next token is not to be learned
    spans = []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        head, tail = tokenizer.encode(prompt).ids, [*tokenizer.encode(completion).ids, *model.config.eos_token_ids[:1]]
        start = len(token_ids)
        token_ids += head + tail[:-1]
        targets += [-100] * (len(head) - 1) + tail
        positions += range(len(token_ids) - start)
        spans.append((start, len(token_ids)))
    optimizer = torch.optim.AdamW(tensors.values(), lr=LEARNING_RATE, weight_decay=0.0)
    attention, wanted = CausalAttention(spans), torch.tensor(targets)
    ids, places = torch.tensor(token_ids), torch.tensor(positions)
    with Progress(*Progress.get_default_columns(), "loss {task.fields[loss]:.3f}", console=console) as progress:
        task = progress.add_task(name, total=STEPS, loss=math.nan)
        for _ in range(STEPS):
            adapter = build(manifest, tensors, model.weights, model.config, model.dtype)
            logits = model.forward(ForwardBatch(ids, places, (Segment(0, len(ids), adapter),)), attention)
            loss = F.cross_entropy(logits, wanted, ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own annotation is missing
            optimizer.step()
            progress.update(task, advance=1, loss=float(loss.detach()))
    saved = {key: value.detach().to(torch.bfloat16) for key, value in tensors.items()}
    folder = Path(__file__).parent / name
    write_adapter(folder, manifest, saved)
    size = sum(file.stat().st_size for file in folder.iterdir())
    console.print(f"{folder.name}: {manifest.num_parameters} parameters, {size / 2**20:.2f} MiB")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    console = Console()
    base = load_base(None, dtype=torch.float32)
    assert base.folder is not None
    model = Transformer(base.config, base.weights)
    tokenizer = Tokenizer.from_file(str(base.folder / "tokenizer.json"))
    shape = BaseShape.of(base.config, base.digest)
    fit("pirate", PIRATE, model, tokenizer, shape, console)
    fit("telegram", TELEGRAM, model, tokenizer, shape, console)


if __name__ == "__main__":
    main()
