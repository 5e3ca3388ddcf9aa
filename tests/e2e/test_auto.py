"""`model: "auto"` of the real process: a file of the command, a server that reads it, the real OpenAI client."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from servers import running, write_adapters, write_talking_base

SUMS = [{"instruction": f"{one} + {two} = ?", "output": str(one + two)} for one in range(2, 9) for two in range(2, 9)]
TALK = [{"instruction": f"where does the {animal} live ?", "output": "far away"} for animal in ("whale", "mouse", "eagle", "horse")]


def fingerprint(folder: Path, name: str, rows: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    data = folder / f"{name}.json"
    data.write_text(json.dumps(rows))
    command = [sys.executable, "-m", "moa_serve", "fingerprint", name, "--data", str(data), "--out", str(folder / "auto.json")]
    return subprocess.run([*command, "--model", str(folder / "base")], capture_output=True, text=True, timeout=60, check=False)


def test_a_prompt_goes_to_the_adapter_that_was_trained_on_its_like(tmp_path: Path) -> None:
    """From training files to answers; each made file is added to, and what is no adapter now is no candidate."""
    write_talking_base(tmp_path / "base")
    write_adapters(tmp_path / "adapters", "soft", "sparse_fn")
    for name, rows in (("soft", SUMS), ("sparse_fn", TALK), ("gone", TALK)):
        done = fingerprint(tmp_path, name, rows)
        assert done.returncode == 0, done.stderr
        assert f"{len(rows)} prompts" in done.stdout
    with running(tmp_path, "--auto", str(tmp_path / "auto.json")) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        assert "auto" in [model.id for model in client.models.list()]
        for text, name in (("3 + 9 = ?", "soft"), ("where does the louse live ?", "sparse_fn")):
            answer = client.completions.create(model="auto", prompt=text, max_tokens=2)
            assert answer.model == name
            assert next(iter(answer.moa["auto"]["scores"])) == name  # type: ignore[attr-defined]
            chat = client.chat.completions.create(model="auto", messages=[{"role": "user", "content": text}], max_tokens=2, stream=True)
            assert {chunk.model for chunk in chat} == {name}
        page = httpx.get(f"{server.url}/metrics").text
        assert 'moa_auto_picks_total{adapter="soft"} 2.0' in page
        assert 'adapter="gone"' not in page


def test_data_without_prompts_is_refused(tmp_path: Path) -> None:
    """A chat has a prompt for each turn, and none of them alone is what requests send."""
    write_talking_base(tmp_path / "base")
    done = fingerprint(tmp_path, "soft", [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}])
    assert (done.returncode, (tmp_path / "auto.json").exists()) == (2, False)
    assert "chat" in done.stderr
