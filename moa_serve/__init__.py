"""Serve one frozen LLaMA base with many Mixture-of-Adapters sets, one chosen per request.

The names below are the public Python surface; they are imported when first used, so that `moa-serve --help` need not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moa_serve.adapter.adapter import AdapterSource
    from moa_serve.engine.guide import Guide
    from moa_serve.engine.request import SamplingParams
    from moa_serve.engine.routing import Routing
    from moa_serve.errors import MoaError
    from moa_serve.llm import LLM, ChoiceScore, Completion

__all__ = ["LLM", "AdapterSource", "ChoiceScore", "Completion", "Guide", "MoaError", "Routing", "SamplingParams"]

_HOMES = {
    "LLM": "moa_serve.llm",
    "AdapterSource": "moa_serve.adapter.adapter",
    "ChoiceScore": "moa_serve.llm",
    "Completion": "moa_serve.llm",
    "Guide": "moa_serve.engine.guide",
    "MoaError": "moa_serve.errors",
    "Routing": "moa_serve.engine.routing",
    "SamplingParams": "moa_serve.engine.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
