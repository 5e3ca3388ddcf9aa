"""A real server over a large random base, on any device: does each adapter answer alone as it does in a mix, and what does the mix cost?

    python -m tests.mixed_server --device cuda                     llama-3.2-1b's shapes, in the dtype of the device
    python -m tests.mixed_server --device cuda --dtype float32     the answers must be equal
    python -m tests.mixed_server --device cpu --shapes tiny        in small
    python -m tests.mixed_server --folder FOLDER                   and what was made is kept, as for `moa-serve bench --model FOLDER/base`

Makes the base and an adapter of each of eight families in a temporary folder, in the paper's sizes. Every model answers some prompts by
itself, one request at a time, then all of them at once: greedy texts must be equal in float32, and are counted in bfloat16, where a batch
of another size rounds otherwise. Then the base alone, one family and all eight take turns under 1 and 32 streams. Nothing else should run.
The last line of standard output is the result as JSON.
"""

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import tokenizers
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it, so that modules here have one name

from servers import running_command

from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.bench.serve import Load, Target, measure
from moa_serve.bench.synthetic import synthetic
from moa_serve.bench.timing import Spread
from moa_serve.model.weights import allocate, named_tensors, read_config

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
SHAPES = {"tiny": (64, 96, 2, 4, 2, 512), "smollm2-135m": (576, 1536, 30, 9, 3, 49_152), "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128_256)}
FAMILIES = ("soft_moa", "sparse_moa", "soft_moa_instance", "molora", "hydralora", "mola", "adamole", "lora")
PROMPTS = ("The captain looked at the sea and said", "one two three", "Tom had 12 apples and ate 5 of them. How many are left?")


def write_base(folder: Path, shapes: str, device: str) -> None:
    """Random weights whose activations keep their size from layer to layer, and a tokenizer in which every id is some text."""
    folder.mkdir(parents=True)
    shape = dict(zip(_SIZES, SHAPES[shapes], strict=True))
    rest = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0}
    config = {**shape, **rest, "tie_word_embeddings": False, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    generator = torch.Generator(where).manual_seed(0)
    parsed = read_config(folder)
    tensors = {}
    for name, tensor in named_tensors(parsed, allocate(parsed, torch.device("meta"), torch.bfloat16)):
        drawn = torch.randn(tensor.shape, generator=generator, device=where)
        scale = 1.0 if "embed" in name else tensor.shape[-1] ** -0.5
        tensors[name] = (1 + 0.1 * drawn if name.endswith("norm.weight") else scale * drawn).bfloat16().cpu()
    save_file(tensors, folder / "model.safetensors")
    symbols = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = [*symbols, *(f"w{index}" for index in range(len(symbols), shape["vocab_size"]))]
    backend = tokenizers.Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))


def write_adapters(folder: Path, base: Path) -> None:
    config = read_config(base)
    for seed, family in enumerate(FAMILIES):
        made = synthetic(family, config, seed, scale=0.05)
        write_adapter(folder / family, made.manifest, made.tensors)


async def answers(url: str, jobs: Sequence[tuple[str, str]], max_tokens: int, at_once: int) -> list[str]:
    """Greedy texts, in the order of the jobs."""
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(timeout=300) as client:

        async def ask(model: str, prompt: str) -> str:
            body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
            async with gate:
                reply = await client.post(f"{url}/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
            return str(reply.json()["choices"][0]["text"])

        return await asyncio.gather(*(ask(model, prompt) for model, prompt in jobs))


def compare(url: str, max_tokens: int) -> tuple[int, int, float]:
    """(jobs whose mixed answer is the one alone, jobs, share of characters before the first difference)."""
    jobs = list(itertools.product(("base", *FAMILIES), PROMPTS))
    alone = asyncio.run(answers(url, jobs, max_tokens, at_once=1))
    mixed = asyncio.run(answers(url, jobs, max_tokens, at_once=len(jobs)))
    assert len(set(alone)) > len(jobs) // 2, "adapters without an effect would agree whatever happens"
    common = [
        sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
        for a, b in zip(alone, mixed, strict=True)
    ]
    return sum(a == b for a, b in zip(alone, mixed, strict=True)), len(jobs), sum(common) / sum(map(len, alone))


MIXES = {"base": ["base"], "soft_moa": ["soft_moa"], "eight families": list(FAMILIES)}


def throughput(url: str, streams: Sequence[int], max_tokens: int, rounds: int) -> Iterator[tuple[int, str, Spread, Spread | None]]:
    """(streams, mix, tokens/s, median gap in seconds)."""
    for count in streams:
        speeds: dict[str, list[float]] = {mix: [] for mix in MIXES}
        gaps: dict[str, list[float]] = {mix: [] for mix in MIXES}
        for turn in range(rounds):
            load = Load(prompt_words=8, max_tokens=max_tokens, requests_per_stream=2, seed=turn)
            for mix, names in MIXES.items():
                [found] = measure([Target("ours", url)], load, streams=[count], models=names, rounds=1).measured
                speeds[mix] += [wave.tokens_per_second for wave in found.waves]
                gaps[mix] += [wave.gap_p50_seconds for wave in found.waves if wave.gap_p50_seconds is not None]
        for mix in MIXES:
            yield count, mix, Spread.of(speeds[mix]), Spread.of(gaps[mix]) if gaps[mix] else None


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    arguments.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    arguments.add_argument("--shapes", default="llama-3.2-1b", choices=SHAPES)
    arguments.add_argument("--folder", type=Path, help="to make base and adapters in, and keep them")
    arguments.add_argument("--streams", default="1,32", help="at the same time; empty: answers are compared, and nothing is timed")
    arguments.add_argument("--max-tokens", type=int, default=64)
    arguments.add_argument("--rounds", type=int, default=3)
    options, flags = arguments.parse_known_args()  # the rest is for `moa-serve serve`
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        with console.status("making a base and adapters"):
            write_base(folder / "base", options.shapes, options.device)
            write_adapters(folder / "adapters", folder / "base")
        command = [sys.executable, "-m", "moa_serve", "serve", "--model", str(folder / "base"), "--port", "0", "--backend", "torch"]
        command += ["--adapters-dir", str(folder / "adapters"), "--device", options.device, "--dtype", options.dtype, *flags]
        with running_command(command, folder) as server:
            about = httpx.get(f"{server.url}/version").json()
            equal, jobs, common = compare(server.url, options.max_tokens)
            console.print(
                f"{about['device']}, {about['dtype']}: {equal} of {jobs} mixed answers are those alone; {common:.1%} before they part"
            )
            streams = [int(part) for part in options.streams.split(",")] if options.streams else []
            found = list(throughput(server.url, streams, options.max_tokens, options.rounds))
    table = Table("streams", "models", "tokens/s", "to the base", "gap, ms")
    bases = {count: speed.median for count, mix, speed, _ in found if mix == "base"}
    for count, mix, speed, gap in found:
        ratio = speed.median / bases[count]
        table.add_row(str(count), mix, f"{speed.median:.0f}", f"{ratio:.2f}", "" if gap is None else f"{1000 * gap.median:.2f}")
    console.print(table)
    timed = [{"streams": count, "models": mix, "tokens_per_second": speed.median} for count, mix, speed, _ in found]
    result = {"device": about["device"], "dtype": about["dtype"], "equal": equal, "jobs": jobs, "common": common, "timed": timed}
    sys.stdout.write(json.dumps(result) + "\n")
    return 0 if equal == jobs or about["dtype"] != "float32" else 1


if __name__ == "__main__":
    sys.exit(main())
