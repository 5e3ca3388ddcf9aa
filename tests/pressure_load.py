"""What sparsity under pressure is worth: an overloaded server with it and without, latency and right answers.

    python -m tests.pressure_load --data mawps

Real servers over the default base take turns, wave by wave: one that leaves thresholds alone (off), the same once more (control,
which tells how much the machine wavered), and one for each `--scale`. In a wave so many clients as there are places ask every question of
the data once, streaming and greedy, and come again as soon as they are answered, so the queue is full but for the beginning. Right is what
`moa-serve eval` calls right: the last number of the answer. Adapters that are made up (`--made-up`) are larger and answer nonsense, so
only their times count: they show from where on skipping experts pays. Clients share the processors with the servers. Nothing else should
run.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it, so that modules here have one name

from agreement import Scrape
from servers import Running, running_command

from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.manifest import TARGETS
from moa_serve.bench.serve import Client, RequestRefused, Target, Transcript, Wave
from moa_serve.bench.synthetic import SPARE_TOKENS, of_recipe, tuned
from moa_serve.bench.timing import Spread, interleaved, quiet, ratio
from moa_serve.bench.workload import Pages
from moa_serve.llm import new_model, open_base
from moa_serve.train.data import Example
from moa_serve.train.prompts import prompt_text
from moa_serve.train.recipe import Recipe
from moa_serve.train.scoring import Estimate, Verdict, estimate, judge_text, paired_difference, read_task

SHIPPED = Path(__file__).parents[1] / "adapters"
MADE_UP = {
    "rank32": Recipe(variant="sparse_moa", targets=TARGETS, rank=32, bottleneck=64),
    "rank64": Recipe(variant="sparse_moa", targets=TARGETS, rank=64, bottleneck=128),
    "experts16": Recipe(variant="adamole", targets=TARGETS, rank=8, num_experts=(16,)),
}
OFF, CONTROL = "off", "control"
_AGAIN_SECONDS = 0.05  # a place is free a moment after its answer's last byte
_SPREAD = 4.0
_EXPERTS = ("experts", "router")


@dataclass(frozen=True, slots=True)
class Told:
    """A wave, and what the server's metrics and answers say of it.

    Args:
        skipped: share of the experts' evaluations.
        step_seconds, expert_seconds: mean of a step, and of routers and experts in it; None where the backend does not time parts.
        raised: share of the answers that came under a raised threshold.
    """

    wave: Wave
    skipped: float
    step_seconds: float | None
    expert_seconds: float | None
    raised: float
    verdicts: tuple[Verdict, ...]


@dataclass
class Bench:
    """Waves of one adapter against one server.

    Args:
        examples: every one is asked once in a wave.
        ends: whether an answer ends where the model ends it.
    """

    client: Client
    runner: asyncio.Runner
    adapter: str
    examples: Sequence[Example]
    clients: int
    max_tokens: int
    ends: bool
    told: list[Told] = field(default_factory=list)

    def run(self) -> float:
        salt = f"{self.adapter} {len(self.told)}"  # nobody finds another wave's pages; within a wave all begin alike
        bodies = [self._body(example, salt) for example in self.examples]
        before = self._scrape()
        with quiet():
            seconds, transcripts = self.runner.run(self._wave(bodies))
        change = _Change(before, self._scrape(), self.adapter)
        texts = [_text(transcript) for transcript in transcripts]
        wave = Wave.of(seconds, [transcript.read() for transcript in transcripts])
        verdicts = tuple(judge_text(example, text) for example, (text, _) in zip(self.examples, texts, strict=True))
        raised = sum(scale is not None for _, scale in texts) / len(texts)
        self.told.append(Told(wave, change.skipped, *change.step(), raised, verdicts))
        return seconds

    def _body(self, example: Example, salt: str) -> bytes:
        body = json.loads(self.client.content(self.adapter, prompt_text(example), self.max_tokens))
        return json.dumps(body | {"cache_salt": salt, "ignore_eos": not self.ends}).encode()

    async def _wave(self, bodies: Sequence[bytes]) -> tuple[float, list[Transcript]]:
        """Seconds from the first question to the last answer; what came, in the questions' order."""
        transcripts: dict[int, Transcript] = {}
        left = iter(enumerate(bodies))

        async def ask_on() -> None:
            for index, body in left:
                transcripts[index] = await self._ask(body)

        start = time.perf_counter()
        await asyncio.gather(*(ask_on() for _ in range(self.clients)))
        return time.perf_counter() - start, [transcripts[index] for index in range(len(bodies))]

    async def _ask(self, body: bytes) -> Transcript:
        while True:
            try:
                return await self.client.complete(body)
            except RequestRefused as refused:
                if refused.status != 503:
                    raise
                await asyncio.sleep(_AGAIN_SECONDS)

    def _scrape(self) -> Scrape:
        return Scrape(httpx.get(f"{self.client.target.url}/metrics").text)


class _Change:
    """Between two scrapes."""

    def __init__(self, before: Scrape, after: Scrape, adapter: str) -> None:
        self._before, self._after, self._adapter = before, after, adapter

    @property
    def skipped(self) -> float:
        met = self._more("moa_expert_evaluations_total", adapter=self._adapter)
        return self._more("moa_expert_evaluations_skipped_total", adapter=self._adapter) / met

    def step(self) -> tuple[float | None, float | None]:
        """(seconds of a step, of routers and experts in it)."""
        count = self._more("moa_steps_timed_total")
        if not count:
            return None, None
        parts = [self._more("moa_step_part_seconds_total", part=part) for part in _EXPERTS]
        return self._more("moa_step_part_seconds_total") / count, sum(parts) / count

    def _more(self, name: str, **labels: str) -> float:
        return self._after.total(name, **labels) - self._before.total(name, **labels)


def _text(transcript: Transcript) -> tuple[str, float | None]:
    """(the answer, the factor on its thresholds)."""
    text, scale = "", None
    for line in b"".join(piece for _, piece in transcript.pieces).split(b"\n"):
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            text += "".join(choice["text"] for choice in event["choices"])
            scale = event.get("moa", {}).get("threshold_scale", scale)
    return text, scale


def write_adapters(folder: Path, shipped: str, names: Sequence[str]) -> None:
    """The shipped one, and those that are made up; a Sparse MoA selects as many of its experts as the paper's."""
    shutil.copytree(SHIPPED / shipped, folder / shipped)
    if not names:
        return
    base, backend = open_base(None, backend="auto", device="cpu", dtype="auto")
    model = new_model(backend, base, "auto")
    pages = Pages(model, [16], spare=SPARE_TOKENS)
    for name in names:
        made = of_recipe(MADE_UP[name], base.config, seed=1)
        if made.manifest.variant == "sparse_moa":
            made = tuned(pages, made)
        # AdaMoLE's fresh scores are all alike, so that no small factor would leave anything out; spread, 83 % reach the threshold.
        spread = {key: tensor * (_SPREAD if key.endswith(".router.weight") else 1) for key, tensor in made.tensors.items()}
        write_adapter(folder / name, made.manifest, spread if made.manifest.variant == "adamole" else made.tensors)


def measure(servers: dict[str, Running], examples: Sequence[Example], options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Of each adapter the waves of each server."""
    found: dict[str, Any] = {}
    with asyncio.Runner() as runner:
        clients = {name: Client(Target(name, server.url)) for name, server in servers.items()}
        for adapter in (options.adapter, *options.made_up):
            asked = examples if adapter == options.adapter else examples[: options.made_up_requests]
            benches = {
                name: Bench(client, runner, adapter, asked, options.clients, options.max_tokens, adapter == options.adapter)
                for name, client in clients.items()
            }
            for client in clients.values():
                runner.run(client.prepare([adapter]))
            with console.status(f"asking {adapter}"):
                interleaved({name: partial(bench.run) for name, bench in benches.items()}, options.rounds, warmups=0)
            found[adapter] = {name: bench.told for name, bench in benches.items()}
            show(console, adapter, found[adapter], is_judged=adapter == options.adapter)
    return found


def accuracy(told: Sequence[Told]) -> list[Verdict]:
    """Of each question its mean over the waves: the same question asked again is no new evidence."""
    rows = zip(*(one.verdicts for one in told), strict=True)
    return [Verdict(statistics.mean(verdict.value for verdict in row)) for row in rows]


def show(console: Console, adapter: str, told: dict[str, list[Told]], *, is_judged: bool) -> None:
    titles = ["server", "tokens/s", "TTFT ms", "p99", "gap ms", "p99", "step ms", "experts", "skipped", "raised"]
    table = Table(*titles, *(["right %"] if is_judged else []), title=f"{adapter}, {len(told[OFF][0].verdicts)} questions a wave")
    for name, found in told.items():
        times = [_median(found, f"{what}_{quantile}_seconds") for what in ("ttft", "gap") for quantile in ("p50", "p99")]
        steps, shares = [one.step_seconds for one in found if one.step_seconds is not None], shares_of(found)
        cells = [name, f"{_median(found, 'tokens_per_second'):.1f}", *(f"{1000 * value:.1f}" for value in times)]
        cells += [f"{1000 * statistics.median(steps):.1f}", f"{statistics.median(shares):.1%}"] if steps else ["", ""]
        cells += [f"{statistics.median(one.skipped for one in found):.1%}", f"{statistics.median(one.raised for one in found):.0%}"]
        if is_judged:
            cells.append(_percent(_estimate(accuracy(found))))
        table.add_row(*cells)
    console.print(table)
    for line in compared(told, is_judged=is_judged):
        console.print(line)


def shares_of(told: Sequence[Told]) -> list[float]:
    """Of routers and experts in a step, wave by wave; none where the backend does not time parts."""
    return [one.expert_seconds / one.step_seconds for one in told if one.step_seconds and one.expert_seconds is not None]


def compared(told: dict[str, list[Told]], *, is_judged: bool) -> Iterator[str]:
    if shares := shares_of(told[OFF]):
        yield f"without routers and experts a step would take {statistics.median(shares):.1%} less: no factor saves more"
    for name in told:
        if name == OFF:
            continue
        parts = []
        for what, figure in (("tokens/s", "tokens_per_second"), ("TTFT", "ttft_p50_seconds"), ("gap p99", "gap_p99_seconds")):
            spread = ratio(*([getattr(one.wave, figure) for one in told[which]] for which in (name, OFF)))
            parts.append(f"{what} {spread.median:.3f} ({spread.low:.3f} to {spread.high:.3f})")
        if is_judged and (difference := paired_difference(accuracy(told[name]), accuracy(told[OFF]))) is not None:
            parts.append(f"right {_percent(difference, '+')} points")
        yield f"{name} / off: {', '.join(parts)}"


def _median(told: Sequence[Told], figure: str) -> float:
    return Spread.of([getattr(one.wave, figure) or 0.0 for one in told]).median


def _estimate(verdicts: Sequence[Verdict]) -> Estimate:
    found = estimate([verdict.value for verdict in verdicts], [1.0] * len(verdicts))
    assert found is not None, "there are questions"
    return found


def _percent(found: Estimate, sign: str = "") -> str:
    return f"{100 * found.value:{sign}.1f} ± {100 * found.standard_error:.1f}"


def to_json(found: dict[str, dict[str, list[Told]]], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "adapters": {
            adapter: {
                name: {
                    "right": asdict(_estimate(accuracy(waves))) if adapter == options.adapter else None,
                    "waves": [
                        one.wave.to_json() | {key: getattr(one, key) for key in ("skipped", "step_seconds", "expert_seconds", "raised")}
                        for one in waves
                    ],
                }
                for name, waves in told.items()
            }
            for adapter, told in found.items()
        },
    }


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, required=True, help="questions: a folder with test.json, or a file, as of moa-serve eval")
    arguments.add_argument("--limit", type=int, help="of the questions; all if omitted")
    arguments.add_argument("--adapter", default="math-sparse", help="of those that are shipped")
    arguments.add_argument("--scale", type=float, action="append", help="highest factor, a server for each; 1.5 if omitted")
    arguments.add_argument("--made-up", action="append", choices=[*MADE_UP, "none"], help="again for more; rank64 and experts16 if omitted")
    arguments.add_argument("--made-up-requests", type=int, default=48, help="questions of a wave with one of those")
    arguments.add_argument("--rows", type=int, default=8, help="that a server computes at once (max_num_seqs)")
    arguments.add_argument("--waiting", type=int, default=24, help="requests that may wait; clients are rows and these together")
    arguments.add_argument("--max-tokens", type=int, default=48)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    options.clients = options.rows + options.waiting
    options.scale = options.scale or [1.5]
    options.made_up = [name for name in options.made_up or ("rank64", "experts16") if name != "none"]
    console = Console(stderr=True, width=140)
    examples = read_task(options.data, "authors", limit=options.limit).examples
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        with console.status("making adapters"):
            write_adapters(folder / "adapters", options.adapter, options.made_up)
        command = [sys.executable, "-m", "moa_serve", "serve", "--port", "0", "--adapters-dir", str(folder / "adapters")]
        command += ["--kv-cache-bytes", str(2**28), "--max-num-seqs", str(options.rows), "--max-waiting", str(options.waiting)]
        command += ["--queue-timeout-seconds", "600"]  # a slow machine is not to end what it is asked
        flags: dict[str, list[str]] = {OFF: [], CONTROL: []}
        flags |= {f"{scale:g}": ["--pressure-threshold-scale", str(scale), "--pressure-waiting", "1"] for scale in options.scale}
        servers = {}
        for name, more in flags.items():
            (own := folder / name).mkdir()  # with its log
            servers[name] = stack.enter_context(running_command([*command, *more], own))
        version = httpx.get(f"{servers[OFF].url}/version").json()
        console.print(f"{version['base']}, {version['backend']} ({version['native']}), {version['dtype']}")
        found = measure(servers, examples, options, console)
    sys.stdout.write(json.dumps({"server": version, **to_json(found, options)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
