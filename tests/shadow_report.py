"""What sparsity costs by the shadow check, on real prompts; and what the check costs who asks.

    python -m tests.shadow_report --data DIR            gap, KL and flips of answers to DIR/mawps/test.json
    python -m tests.shadow_report --rounds 5            the cost to real traffic

Real servers over the default base and the shipped adapters. With `--data`, every answer is sampled: the prompts are sent as the adapter
was trained on them, greedy, and its numbers are read from /metrics when all are scored. With `--rounds`, a server with the check and one
without take turns: a few streams of requests, a pause after which the check is at work on them, and then the streams that count, which end
it; the next turn waits until nothing is left to score. Nothing else should run.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it, so that modules here have one name

from agreement import Scrape
from servers import Running, running_command

from moa_serve.bench.serve import FIGURES, Client, Load, Target, Wave
from moa_serve.bench.timing import Spread, interleaved, quiet, ratio
from moa_serve.train.data import read_examples
from moa_serve.train.prompts import prompt_text

ADAPTERS = Path(__file__).parents[1] / "adapters"
PAUSE_SECONDS = 0.8  # after which the check is at work: it waits for half a second of quiet
console = Console(stderr=True, width=120)


def command(share: float) -> list[str]:
    return [sys.executable, "-m", "moa_serve", "serve", "--port", "0", "--adapters-dir", str(ADAPTERS), "--shadow-share", str(share)]


class Server:
    def __init__(self, stack: ExitStack, share: float) -> None:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.running: Running = stack.enter_context(running_command(command(share), place))
        self.share = share

    def scrape(self) -> Scrape:
        return Scrape(httpx.get(f"{self.running.url}/metrics").text)

    def wait_until_scored(self, num_answers: int) -> Scrape:
        """Every answer so far is scored or skipped."""
        while True:
            page = self.scrape()
            if page.total("moa_shadow_requests_total") + page.total("moa_shadow_skipped_total") >= num_answers * self.share:
                return page
            time.sleep(0.2)


# -- what sparsity costs


def score(options: argparse.Namespace) -> dict[str, Any]:
    prompts = [prompt_text(example) for example in read_examples(options.data / "mawps" / "test.json")][: options.prompts]
    with ExitStack() as stack, httpx.Client(timeout=600) as client:
        server, started = Server(stack, 1.0), time.perf_counter()
        for start in range(0, len(prompts), options.together):  # fewer than are kept until it is quiet
            body = {
                "model": options.model,
                "max_tokens": options.max_tokens,
                "temperature": 0,
                "prompt": prompts[start:][: options.together],
            }
            body |= {"moa": options.moa} if options.moa else {}
            client.post(f"{server.running.url}/v1/completions", json=body).raise_for_status()
            server.wait_until_scored(min(start + options.together, len(prompts)))
        page = server.scrape()
        told = client.get(f"{server.running.url}/v1/adapters/{options.model}/experts").json()
        seconds = time.perf_counter() - started
    assert told["shadow"] is not None, "the adapter left nothing out"
    found = {name: page.total(f"moa_shadow_{name}_total", adapter=options.model) for name in ("requests", "tokens", "skipped")}
    found |= {
        "adapter": options.model,
        "options": options.moa,
        **told["shadow"],
        "evaluations_skipped": told["skipped"],
        "seconds": seconds,
    }
    table = Table("adapter", "options", "answers", "tokens", "mean gap, nats", "mean KL, nats", "flip rate", "experts left out")
    options_shown = json.dumps(options.moa) if options.moa else "its own"
    figures = [f"{found['mean_gap']:.4f}", f"{found['mean_kl']:.4f}", f"{100 * found['flip_rate']:.2f} %", _percent(told["skipped"])]
    table.add_row(options.model, options_shown, f"{found['requests']:.0f}", f"{found['tokens']:.0f}", *figures)
    console.print(table)
    return found


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


# -- what it costs who asks


class Bench:
    def __init__(self, runner: asyncio.Runner, server: Server, options: argparse.Namespace) -> None:
        self.runner, self.server, self.options = runner, server, options
        self.load = Load(max_tokens=options.max_tokens, requests_per_stream=options.requests)
        self.client = Client(Target("ours", server.running.url))
        self.waves: list[Wave] = []
        self.num_asked = 1  # by `prepare`
        runner.run(self.client.prepare([options.model]))

    def run(self) -> float:
        turn = 2 * len(self.waves)
        self.runner.run(self._wave(turn))
        time.sleep(PAUSE_SECONDS)
        with quiet():
            self.waves.append(self.runner.run(self._wave(turn + 1)))
        self.server.wait_until_scored(self.num_asked)
        return self.waves[-1].seconds

    async def _wave(self, turn: int) -> Wave:
        async def stream(prompts: list[str]) -> list[Any]:
            bodies = [self.client.content(self.options.model, prompt, self.load.max_tokens) for prompt in prompts]
            return [await self.client.complete(body) for body in bodies]

        prompts, started = self.load.prompts(self.options.streams, turn), time.perf_counter()
        self.num_asked += self.options.streams * self.options.requests
        transcripts = await asyncio.gather(*(stream(mine) for mine in prompts))
        seconds = time.perf_counter() - started
        return Wave.of(seconds, [transcript.read() for mine in transcripts for transcript in mine])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack, asyncio.Runner() as runner:
        benches = {name: Bench(runner, Server(stack, share), options) for name, share in (("off", 0.0), ("on", 1.0))}
        interleaved({name: partial(bench.run) for name, bench in benches.items()}, options.rounds)
        num_scored = benches["on"].server.scrape().total("moa_shadow_requests_total")
    waves = {name: bench.waves[1:] for name, bench in benches.items()}  # the first round warms up
    table = Table("shadow check", "tokens/s", "TTFT p50, ms", "TTFT p99, ms", "gap p50, ms", "gap p99, ms")
    told: dict[str, Any] = {"waves": {name: [wave.to_json() for wave in found] for name, found in waves.items()}, "scored": num_scored}
    values = {name: {figure: [getattr(wave, figure) for wave in found] for figure in FIGURES} for name, found in waves.items()}
    for name, found in values.items():
        table.add_row(name, *(f"{(1 if figure == FIGURES[0] else 1e3) * Spread.of(found[figure]).median:.1f}" for figure in FIGURES))
    ratios = {figure: ratio(values["on"][figure], values["off"][figure]) for figure in FIGURES}
    table.add_row("on / off", *(f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})" for spread in ratios.values()))
    console.print(table)
    console.print(f"{num_scored:.0f} answers were scored between the waves")
    return told | {"ratios": {figure: spread.to_json() for figure, spread in ratios.items()}}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, help="folder of the data sets: score answers to its mawps/test.json")
    arguments.add_argument("--model", default="math-sparse", help="an adapter that leaves experts out, by itself or with --moa")
    arguments.add_argument("--moa", type=json.loads, help='routing options of the requests, as {"top_k": 2}')
    arguments.add_argument("--prompts", type=int, default=200)
    arguments.add_argument("--together", type=int, default=16, help="prompts in a request")
    arguments.add_argument("--rounds", type=int, default=0, help="measure the cost to real traffic in so many rounds")
    arguments.add_argument("--streams", type=int, default=4)
    arguments.add_argument("--requests", type=int, default=2, help="of each stream in a wave, one after another")
    arguments.add_argument("--max-tokens", type=int, default=48)
    options = arguments.parse_args()
    if options.data is None and not options.rounds:
        arguments.error("give --data DIR, --rounds N, or both")
    found = {} if options.data is None else {"score": score(options)}
    found |= {"traffic": measure(options)} if options.rounds else {}
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
