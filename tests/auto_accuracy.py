"""How well a prompt tells which adapter is meant for it, by what can be asked of the prompt, and what that costs.

    python -m tests.auto_accuracy --data DIR --prompts 25
    python -m tests.auto_accuracy --data DIR --adapter science=FOLDER --adapter yesno=FOLDER

The shipped adapters, and those that are named, belong to tasks. Prompts of test files that no adapter has seen are given to each method, as
the adapters were trained (the paper's template around them) and bare; a method is right where it names an adapter of the prompt's task.
Fingerprints are made of training files only. A line for each method: accuracy with its standard error over prompts, and how many tokens
it computes for one prompt. The last line is a JSON object.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from moa_serve import LLM
from moa_serve.adapter.fingerprint import Fingerprint, buckets_of
from moa_serve.engine.engine import Collected, TokenEvent
from moa_serve.engine.routing import Routing
from moa_serve.engine.self_test import read_scores, score_request
from moa_serve.metrics.drift import Profile, divergence
from moa_serve.model.counters import expert_names
from moa_serve.model.weights import load_base
from moa_serve.text import Tokenizer
from moa_serve.train.data import read_examples
from moa_serve.train.prompts import prompt_text

ADAPTERS = Path(__file__).parents[1] / "adapters"
SHIPPED = {"math-soft": "math", "math-sparse": "math", "science-lora": "science"}
TRAINING = {
    "math": ("mawps/train_clean.json",),
    "science": ("ARC-Easy/train.json", "ARC-Challenge/train.json", "openbookqa/train.json"),
    "yesno": ("boolq/train.json",),
}
TESTS = {
    "math": ("mawps/test.json", "AddSub/test.json", "gsm8k/test.json"),
    "science": ("ARC-Easy/test.json", "ARC-Challenge/test.json", "openbookqa/test.json"),
    "yesno": ("boolq/test.json",),
}
BUCKETS = (64, 256, 1024, 4096)
FORMS = ("template", "bare")
PREFIX = 512  # tokens of a prompt that are looked at

Counts = npt.NDArray[np.float64]
Method = Callable[["Prompt"], str]  # gives a task


@dataclass
class Prompt:
    """`losses` and `routings` by adapter: what one forward of the prompt under it tells."""

    task: str
    source: str
    ids: list[int]
    losses: dict[str, float] = field(default_factory=dict)
    routings: dict[str, Routing] = field(default_factory=dict)


@dataclass
class Known:
    """What is asked of: the adapters with their tasks, and token counts of each task's training prompts."""

    llm: LLM
    tasks: dict[str, str]  # adapter -> task
    training: dict[str, Counter[int]]

    def profile(self, adapter: str) -> tuple[Profile, bool] | None:
        """And whether it is of mean weights."""
        _, manifest = self.llm._resolve(adapter)
        found = None if manifest is None else Profile.of(manifest)
        return None if found is None else (found, found.is_of_weights)


def naive_bayes(known: Known, buckets: int | None) -> Method:
    """The task under which the prompt's tokens are likeliest, each on its own, all tasks alike; tokens as they are or in hashed buckets."""
    size = known.llm.config.vocab_size if buckets is None else buckets

    def counted(ids: Sequence[int], weights: Sequence[int] | None = None) -> Counts:
        places = np.array(ids) if buckets is None else buckets_of(np.array(ids), buckets)
        return np.bincount(places, weights, minlength=size).astype(np.float64)

    logs = {}
    for task, counts in known.training.items():
        smoothed = counted(list(counts.keys()), list(counts.values())) + 1.0
        logs[task] = np.log(smoothed / smoothed.sum())
    return lambda prompt: max(logs, key=lambda task: float(counted(prompt.ids[:PREFIX]) @ logs[task]))


def fingerprint(known: Known) -> Method:
    """What `model: "auto"` does."""
    prints = {task: Fingerprint.of([list(counts.elements())]) for task, counts in known.training.items()}
    return lambda prompt: min(prints, key=lambda task: prints[task].cost(prompt.ids))


def nearest_mean(known: Known, embed: Counts) -> Method:
    """The task whose training prompts' mean embedding is nearest by cosine, the mean of all tasks taken away."""
    means = {task: _mean(embed, list(counts.elements())) for task, counts in known.training.items()}
    middle = np.mean(list(means.values()), axis=0)

    def likeness(prompt: Prompt, task: str) -> float:
        mine, theirs = _mean(embed, prompt.ids[:PREFIX]) - middle, means[task] - middle
        return float(mine @ theirs / (np.linalg.norm(mine) * np.linalg.norm(theirs) + 1e-12))

    return lambda prompt: max(means, key=lambda task: likeness(prompt, task))


def _mean(embed: Counts, ids: Sequence[int]) -> Counts:
    counts = np.bincount(ids, minlength=len(embed)).astype(np.float64)
    places = counts.nonzero()[0]
    mean: Counts = counts[places] @ embed[places] / counts.sum()
    return mean


def by_loss(known: Known, adapters: Sequence[str]) -> Method:
    """The adapter under which the prompt is likeliest. Relative to the base it is the same one: the base's loss is one for all."""
    return lambda prompt: known.tasks[min(adapters, key=lambda name: prompt.losses[name])]


def by_drift(known: Known, adapters: Sequence[str]) -> Method:
    """The adapter whose routers do with the prompt what is most like their training (metrics/drift.py)."""

    def drift(prompt: Prompt, name: str) -> float:
        found = known.profile(name)
        _, manifest = known.llm._resolve(name)
        assert found is not None
        assert manifest is not None
        profile, is_of_weights = found
        expected = profile.aligned(expert_names(manifest))
        assert expected is not None
        routing = prompt.routings[name]
        table = (routing.weights if is_of_weights else routing.selected.float()).mean(1)
        shares = np.concatenate([table[layer, : len(names)].numpy() for layer, names in enumerate(routing.experts)]).astype(np.float64)
        return divergence(np.clip(shares, 0, 1), expected)

    return lambda prompt: known.tasks[min(adapters, key=lambda name: drift(prompt, name))]


def read_prompts(data: Path, tokenizer: Tokenizer, task: str, form: str, limit: int) -> list[Prompt]:
    """`limit` prompts of each test file, spread evenly over it."""
    found = []
    for source in TESTS[task]:
        examples = read_examples(data / source, "cloze", needs_output=False)
        step = max(1, len(examples) // limit)
        for example in examples[::step][:limit]:
            text = prompt_text(example) if form == "template" else example.instruction
            found.append(Prompt(task, source, tokenizer.encode(text, parse_special=False)))
    return found


def count_training(data: Path, tokenizer: Tokenizer, task: str) -> Counter[int]:
    counts: Counter[int] = Counter()
    for source in TRAINING[task]:
        for example in read_examples(data / source, "cloze"):
            counts.update(tokenizer.encode(prompt_text(example), parse_special=False))
    return counts


class _Job:
    """One prompt under one adapter while it runs."""

    def __init__(self, known: Known, prompt: Prompt, name: str) -> None:
        revision, manifest = known.llm._resolve(name)
        self._prompt, self._name, self._manifest = prompt, name, manifest
        request = score_request(prompt.ids[:PREFIX], revision, manifest)
        self.request = replace(request, collect_logits=False, prompt_logprobs=0)

    def take(self, event: TokenEvent, collected: Collected | None) -> bool:
        assert event.error is None, event.error
        if collected is not None:
            scores = [score.logprob for score in collected.prompt_logprobs]
            self._prompt.losses[self._name] = -sum(scores) / max(1, len(scores))
            _, routing = read_scores(collected, self._manifest, len(self.request.prompt_ids))
            if routing is not None:
                self._prompt.routings[self._name] = routing
        return False


def compute(known: Known, prompts: Sequence[Prompt]) -> None:
    """One forward of each prompt under each adapter, in mixed batches, through the step that serves."""
    jobs = [_Job(known, prompt, name) for name in known.tasks for prompt in prompts]

    def show_done(done: int) -> None:
        sys.stderr.write(f"\r{done} of {len(jobs)} forwards")

    known.llm._run(jobs, show_done)
    sys.stderr.write("\n")


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, required=True, help="with mawps, ARC-Easy, ...")
    arguments.add_argument("--prompts", type=int, default=25, help="of each test file")
    arguments.add_argument("--adapter", action="append", default=[], help="task=FOLDER of a further adapter; tasks: " + ", ".join(TESTS))
    arguments.add_argument("--counts-only", action="store_true", help="only the methods that compute nothing, of all tasks with data")
    options = arguments.parse_args()
    named = dict(item.split("=", 1)[::-1] for item in options.adapter)  # folder -> task
    folders = {name: ADAPTERS / name for name in SHIPPED} | {Path(folder).name: Path(folder) for folder in named}
    tasks = SHIPPED | {Path(folder).name: task for folder, task in named.items()}
    base = load_base(None, device=torch.device("cpu"), dtype=torch.float32)
    embed = base.weights.embed.numpy().astype(np.float64)
    del base
    with LLM(adapters={} if options.counts_only else folders, device="cpu", max_num_seqs=64) as llm:
        assert llm.tokenizer is not None
        served = list(TESTS) if options.counts_only else sorted(set(tasks.values()))
        training = {task: count_training(options.data, llm.tokenizer, task) for task in served}
        known = Known(llm, {} if options.counts_only else tasks, training)
        methods = make_methods(known, embed)
        report = {}
        for form in FORMS:
            prompts = [prompt for task in served for prompt in read_prompts(options.data, llm.tokenizer, task, form, options.prompts)]
            if known.tasks:
                compute(known, prompts)
            report[form] = {name: judge(method, prompts, forwards) for name, (method, forwards) in methods.items()}
            report[form]["always the most frequent"] = frequent(prompts)
            show(form, report[form])
    sys.stdout.write(json.dumps({"tasks": known.tasks, "prompts": options.prompts, "accuracy": report}) + "\n")
    return 0


def make_methods(known: Known, embed: Counts) -> dict[str, tuple[Method, int]]:
    """By name, each with how many forwards of a prompt it takes."""
    found: dict[str, tuple[Method, int]] = {"token counts": (naive_bayes(known, None), 0)}
    found |= {f"token counts, {buckets} buckets": (naive_bayes(known, buckets), 0) for buckets in BUCKETS}
    found["fingerprint (served)"] = fingerprint(known), 0
    found["mean embedding"] = nearest_mean(known, embed), 0
    if known.tasks:
        routed = [name for name in known.tasks if known.profile(name) is not None]
        found["loss of the prompt"] = by_loss(known, list(known.tasks)), len(known.tasks)
        if len({known.tasks[name] for name in routed}) > 1:
            found["routing against training's"] = by_drift(known, routed), len(routed)
    return found


def judge(method: Method, prompts: Sequence[Prompt], forwards: int) -> dict[str, float | dict[str, float]]:
    right: dict[str, list[bool]] = {}
    for prompt in prompts:
        right.setdefault(prompt.source, []).append(method(prompt) == prompt.task)
    total = [is_right for each in right.values() for is_right in each]
    share = sum(total) / len(total)
    tokens = forwards * sum(min(len(prompt.ids), PREFIX) for prompt in prompts) / len(prompts)
    by_source = {source: sum(each) / len(each) for source, each in right.items()}
    return {"right": share, "error": math.sqrt(share * (1 - share) / len(total)), "tokens": tokens, "by_source": by_source}


def frequent(prompts: Sequence[Prompt]) -> dict[str, float | dict[str, float]]:
    (task, _), *_ = Counter(prompt.task for prompt in prompts).most_common(1)
    return judge(lambda prompt: task, prompts, 0)


def show(form: str, lines: Mapping[str, Mapping[str, float | dict[str, float]]]) -> None:
    for name, line in lines.items():
        sources = line["by_source"]
        assert isinstance(sources, dict)
        each = "  ".join(f"{source.split('/')[0]} {share:.0%}" for source, share in sources.items())
        sys.stderr.write(f"{form:9} {name:28} {line['right']:6.1%} ± {line['error']:.1%}  {line['tokens']:5.0f} tokens   {each}\n")


if __name__ == "__main__":
    sys.exit(main())
