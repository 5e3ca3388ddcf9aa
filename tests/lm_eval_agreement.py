"""EleutherAI's lm-evaluation-harness against a running server: the same questions, asked over HTTP and of transformers in its own process.

    python -m tests.lm_eval_agreement --python PYTHON

`PYTHON` has lm_eval and peft (an environment of its own, so that its many dependencies stay out of this one); by default this one. On
local task files, in float32, on the default base or the folder that --model names, and on a PEFT LoRA adapter with random weights on it:
`local-completions` with our server against `hf`. Exit code 0 where log-likelihoods agree to 1e-3 and greedy texts to the letter, and
where there is no lm_eval.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from moa_serve.config import ModelConfig
from moa_serve.model.default_base import default_base_folder

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it, so that modules here have one name

from servers import Running, running_command

TOLERANCE = 1e-3
_QUESTIONS = [
    ("The capital of France is", ["Paris", "Rome", "a river"]),
    ("Water freezes at a temperature of", ["0 degrees Celsius", "80 degrees Celsius"]),
    ("Two and two make", ["four", "five", "seven hundred"]),
    ("The opposite of hot is", ["cold", "warm", "a table", "Überraschung"]),
    ("In winter, many birds fly", ["south", "to the moon"]),
    ("She opened the door and", ["walked in.", "purple seventeen."]),
]
_CHOOSE = """\
task: moa_choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
_WRITE = """\
task: moa_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def write_tasks(folder: Path) -> None:
    data = folder / "data.json"
    data.write_text("".join(json.dumps({"question": question, "choices": choices}) + "\n" for question, choices in _QUESTIONS))
    for name, text in (("choose", _CHOOSE), ("write", _WRITE)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))


def write_peft_lora(folder: Path, config: ModelConfig, *, rank: int = 4) -> None:
    """A LoRA of Q, V and DOWN as PEFT writes it, that changes every answer a little."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (heads, config.hidden_size),
        "self_attn.v_proj": (kv, config.hidden_size),
        "mlp.down_proj": (config.hidden_size, config.intermediate_size),
    }
    tensors = {}
    for layer in range(config.num_layers):
        for name, (rows, columns) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.05
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = [name.rpartition(".")[2] for name in shapes]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None, "inference_mode": True}))


def evaluate(python: str, tasks: Path, out: Path, model: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """One record for each question and task: what the model said of it, in the order of the questions."""
    command = [python, "-m", "lm_eval", "run", "--model", model, "--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())]
    command += ["--tasks", "moa_choose,moa_write", "--include_path", str(tasks), "--log_samples", "--output_path", str(out)]
    done = subprocess.run([*command, "--batch_size", "1", "--device", "cpu"], capture_output=True, text=True, cwd=tasks)
    if done.returncode:
        raise SystemExit(f"lm_eval failed with {model}:\n{done.stderr[-4000:]}")
    records = []
    for file in sorted(out.rglob("samples_*.jsonl"), key=lambda file: file.name):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        records += sorted(lines, key=lambda line: int(line["doc_id"]))
    return records


def differences(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Iterator[float]:
    """Of each log-likelihood; infinite where one says greedy and the other not, or where generated texts differ."""
    assert len(ours) == len(theirs) == 2 * len(_QUESTIONS), "every question is answered by both"
    for one, other in zip(ours, theirs, strict=True):
        for (mine,), (yours,) in zip(one["resps"], other["resps"], strict=True):
            if isinstance(mine, str):
                yield 0.0 if mine == yours else float("inf")
            else:
                yield abs(float(mine[0]) - float(yours[0])) if str(mine[1]) == str(yours[1]) else float("inf")


def compare(server: Running, python: str, base: Path, adapter: Path, folder: Path, console: Console) -> bool:
    table = Table("model", "log-likelihoods", "texts", "largest difference")
    is_well, answers = True, {}
    for name, more in (("base", {}), (adapter.name, {"peft": adapter})):
        http = {
            "model": name,
            "base_url": f"{server.url}/v1/completions",
            "num_concurrent": 1,
            "max_length": 512,
        }
        ours = answers[name] = evaluate(python, folder / "tasks", folder / f"{name}-http", "local-completions", http)
        local = {"pretrained": base, "dtype": "float32", **more}
        theirs = evaluate(python, folder / "tasks", folder / f"{name}-hf", "hf", local)
        found = list(differences(ours, theirs))
        table.add_row(name, str(sum(len(choices) for _, choices in _QUESTIONS)), str(len(_QUESTIONS)), f"{max(found):.2g}")
        is_well &= max(found) <= TOLERANCE
    console.print(table)
    assert max(differences(answers["base"], answers[adapter.name])) > 100 * TOLERANCE, "the adapter changes what the base says"
    return is_well


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.lm_eval_agreement", description="lm_eval over HTTP against lm_eval in its process."
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter of an environment with lm_eval and peft")
    parser.add_argument("--model", type=Path, help="folder of the base; the default base if omitted")
    parser.add_argument("--backend", default="auto", choices=["auto", "native", "torch"])
    arguments = parser.parse_args()
    console = Console()
    if subprocess.run([arguments.python, "-c", "import lm_eval, peft"], capture_output=True).returncode:
        console.print(
            f"{arguments.python} has no lm_eval and peft, so there is nothing to compare; pip install 'lm_eval\\[api,hf]' peft there"
        )
        return 0
    base = (arguments.model or default_base_folder(console)).resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tasks").mkdir()
        write_tasks(folder / "tasks")
        adapter = folder / "adapters" / "lora"
        write_peft_lora(adapter, ModelConfig.from_hf(json.loads((base / "config.json").read_text())))
        command = [sys.executable, "-m", "moa_serve", "serve", "--model", str(base), "--served-model-name", "base", "--port", "0"]
        command += ["--adapters-dir", str(adapter.parent), "--dtype", "float32", "--backend", arguments.backend, "--max-model-len", "1024"]
        with running_command(command, folder) as server:
            is_well = compare(server, arguments.python, base, adapter, folder, console)
    console.print("they agree" if is_well else f"they differ by more than {TOLERANCE:g}")
    return 0 if is_well else 1


if __name__ == "__main__":
    raise SystemExit(main())
