"""What `moa.return_routing` costs those who ask, and those who only share their steps.

    python -m tests.routing_cost --rounds 5

A real server over the default base and the shipped adapters. Waves take turns: `--streams` that ask or do not ask, alone, and as many
beside as many neighbours of the same adapter, who never ask. What counts: tokens/s with asking over without, of the streams themselves and
of their neighbours. The client shares the processors, and reads what is asked for. Nothing else should run.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it, so that modules here have one name

from servers import Running, running_command

from moa_serve.bench.serve import Client, Load, Target, Transcript, Wave
from moa_serve.bench.timing import Spread, interleaved, quiet, ratio

ADAPTERS = Path(__file__).parents[1] / "adapters"
KINDS = {"alone": (False, False), "alone, asking": (True, False), "neighbours": (False, True), "neighbours of who asks": (True, True)}


@dataclass
class Bench:
    """Waves against one server; `waves` of each kind, of the neighbours where there are some."""

    client: Client
    runner: asyncio.Runner
    model: str
    streams: int
    load: Load
    waves: dict[str, list[Wave]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    answer_bytes: dict[str, list[int]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def run(self, kind: str) -> float:
        asks, has_neighbours = KINDS[kind]
        turn = len(self.waves[kind])
        prompts = self.load.prompts(self.streams * (1 + has_neighbours), turn)
        own = {"cache_salt": f"{kind} {turn}"}  # the same prompts, and nobody finds another wave's pages
        asking = own | {"moa": {"return_routing": True}}
        bodies = [self._bodies(mine, asking if asks and stream < self.streams else own) for stream, mine in enumerate(prompts)]
        with quiet():
            wave, size = self.runner.run(self._wave(bodies))
        self.waves[kind].append(wave)
        self.answer_bytes[kind].append(size)
        return wave.seconds

    def _bodies(self, prompts: Sequence[str], more: dict[str, Any]) -> list[bytes]:
        bodies = [json.loads(self.client.content(self.model, prompt, self.load.max_tokens)) for prompt in prompts]
        return [json.dumps(body | more).encode() for body in bodies]

    async def _wave(self, bodies: Sequence[Sequence[bytes]]) -> tuple[Wave, int]:
        """Of the last `streams` streams: neighbours, where there are some; and the bytes of the first stream's first answer."""
        ends: dict[int, float] = {}
        started = time.perf_counter()

        async def stream(index: int) -> list[Transcript]:
            transcripts = [await self.client.complete(body) for body in bodies[index]]
            ends[index] = time.perf_counter()
            return transcripts

        transcripts = await asyncio.gather(*(stream(index) for index in range(len(bodies))))
        counted = range(len(bodies) - self.streams, len(bodies))
        answers = [transcript.read() for index in counted for transcript in transcripts[index]]
        return Wave.of(max(ends[index] for index in counted) - started, answers), sum(len(piece) for _, piece in transcripts[0][0].pieces)


def measure(server: Running, options: argparse.Namespace) -> Bench:
    load = Load(max_tokens=options.max_tokens, requests_per_stream=options.requests)
    with asyncio.Runner() as runner:
        bench = Bench(Client(Target("ours", server.url)), runner, options.model, options.streams, load)
        runner.run(bench.client.prepare([options.model]))
        interleaved({kind: partial(bench.run, kind) for kind in KINDS}, options.rounds)
    for waves in bench.waves.values():
        del waves[:1]  # the first round warms up
    return bench


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="math-soft", help="an adapter with a router")
    arguments.add_argument("--streams", type=int, default=8)
    arguments.add_argument("--requests", type=int, default=2, help="of each stream in a wave, one after another")
    arguments.add_argument("--max-tokens", type=int, default=64)
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "moa_serve", "serve", "--port", "0", "--adapters-dir", str(ADAPTERS)]
        with running_command(command, Path(place)) as server:
            bench = measure(server, options)
    table = Table("wave", "tokens/s", "gap p50, ms", "gap p99, ms", "TTFT p50, ms", "bytes/token")
    for kind, waves in bench.waves.items():
        figures = [
            Spread.of([scale * (getattr(wave, name) or 0.0) for wave in waves]).median
            for name, scale in (("tokens_per_second", 1), ("gap_p50_seconds", 1e3), ("gap_p99_seconds", 1e3), ("ttft_p50_seconds", 1e3))
        ]
        table.add_row(kind, *(f"{figure:.1f}" for figure in figures), f"{bench.answer_bytes[kind][-1] / options.max_tokens:.0f}")
    console = Console(stderr=True)
    console.print(table)
    speeds = {kind: [wave.tokens_per_second for wave in waves] for kind, waves in bench.waves.items()}
    ratios = {
        "who asks": ratio(speeds["alone, asking"], speeds["alone"]),
        "neighbours": ratio(speeds["neighbours of who asks"], speeds["neighbours"]),
    }
    for name, spread in ratios.items():
        console.print(f"{name}: {spread.median:.3f} of the tokens/s without asking ({spread.low:.3f} to {spread.high:.3f})")
    found = {kind: [wave.to_json() for wave in waves] for kind, waves in bench.waves.items()}
    sys.stdout.write(json.dumps({"waves": found, "ratios": {name: spread.to_json() for name, spread in ratios.items()}}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
