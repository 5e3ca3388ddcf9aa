"""An adapter's `profile` for tests: what its routers do with some prompts, as training writes it into the manifest."""

import json
from collections.abc import Sequence
from pathlib import Path

from moa_serve import LLM
from moa_serve.engine.activity import Activity


def write_profile(folder: Path, base: Path, prompts: Sequence[str]) -> None:
    """Into the manifest of the adapter in `folder`, from prompts for the base in `base`."""
    activity = Activity()
    with LLM(str(base), adapters={"one": str(folder)}, backend="torch", device="cpu", dtype="float32", kv_cache_bytes=2**22) as llm:
        assert llm.tokenizer is not None
        for prompt in prompts:
            ids = llm.tokenizer.encode(prompt, parse_special=False)
            activity.add(llm.route(ids, adapter="one"), len(ids))
    file, found = folder / "adapter.json", activity.to_json()
    profile = {name: found[name] for name in ("num_tokens", "layers")}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"profile": profile}))
