"""A real server whose step is the GPU's kernels, in Triton's interpreter: what clients get is what the definition says."""

import concurrent.futures
from pathlib import Path
from typing import Any

import httpx
import openai
from servers import Running, running, write_adapters, write_talking_base

ASKED: list[tuple[str, dict[str, Any]]] = [
    ("base", {}),
    ("soft", {}),
    ("mola_layerwise", {}),
    ("instance", {}),
    ("soft", {"threshold": 0.5, "disable": ["DOWN"]}),
]


def answers(server: Running) -> list[str]:
    """All at once: some share a step, and there are fewer slots than adapters."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=120) as client:

        def ask(model: str, moa: dict[str, Any]) -> str:
            body = {"ignore_eos": True} | ({"moa": moa} if moa else {})
            found = client.completions.create(model=model, prompt="an answer", max_tokens=4, temperature=0, extra_body=body)
            return str(found.choices[0].text)

        with concurrent.futures.ThreadPoolExecutor(len(ASKED)) as pool:
            return list(pool.map(lambda asked: ask(*asked), ASKED))


def test_answers_and_metrics_are_those_of_the_torch_backend(tmp_path: Path) -> None:
    """The backend is chosen by a flag and told; slots are made for the adapters that lie in the folder."""
    write_talking_base(tmp_path / "base")
    write_adapters(tmp_path / "adapters", "soft", "mola_layerwise", "instance")
    flags = ("--dtype", "float32", "--num-slots", "2", "--no-prefix-cache")
    with running(tmp_path, "--backend", "torch", *flags) as server:
        expected = answers(server)
    with running(tmp_path, "--backend", "triton", *flags, env={"TRITON_INTERPRET": "1"}) as server:
        assert httpx.get(f"{server.url}/version").json()["backend"] == "triton"
        assert answers(server) == expected
        assert len(set(expected)) == len(ASKED), "adapters and options must matter, or this test shows nothing"
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        tokens = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("moa_router_tokens_total{")}
        assert sum(tokens.values()) > 0, "the counters' kernel writes into the totals that are scraped"
        assert any("moa_expert_selected_total{" in line and not line.endswith(" 0.0") for line in lines)
        assert not [line for line in server.log() if line.get("level") in ("error", "critical")]
