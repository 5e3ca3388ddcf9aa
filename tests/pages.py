"""The pages that are made from the code: docs/api.md, docs/metrics.md, and the table of settings in docs/operations.md.

    python -m tests.pages          write them
    python -m tests.pages --check  say what is stale, exit code 1

A test holds that they are as this makes them.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moa_serve.api import dashboard
from moa_serve.api.app import new_app
from moa_serve.api.guard import ADMIN, PUBLIC
from moa_serve.metrics import Metrics
from moa_serve.metrics.family import Family
from moa_serve.metrics.routing import FAMILIES as ROUTING
from moa_serve.metrics.state import STATE
from moa_serve.metrics.vllm import lengths
from moa_serve.settings import ENV_PREFIX, WITHOUT_FLAG, ServerSettings

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it, so that modules here have one name

from metric_readers import readers_of

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- settings: made by `python -m tests.pages` -->", "<!-- end of settings -->"
METHODS = ("get", "post", "put", "patch", "delete")

API_HEAD = """\
# HTTP API

Made from the schemas of the code by `python -m tests.pages`; do not edit. The same as OpenAPI 3.1: `GET /openapi.json`. How to run the
server, and what to do about each error code: [operations.md](operations.md). What is promised of bad input:
[reliability.md](reliability.md).

**Models.** `model` is the base's name, or an adapter's: each request chooses one, and all are mixed in one batch.

**Keys.** `Authorization: Bearer KEY`. Where the server has API keys, every route needs one but health and the page `/dashboard`
([dashboard.md](dashboard.md)); routes that change adapters need the admin key. A server without keys takes any.

**Bodies** are JSON objects in UTF-8 with `Content-Type: application/json`. A null is an absent field. Nothing is accepted and ignored
but what changes no answer (`user`, `store`, `metadata`, `service_tier`, `safety_identifier`, `prompt_cache_key`): unknown names are 400
`unknown_parameter`, names of OpenAI's or vLLM's API that are not served here 400 `unsupported_parameter`.

**Errors** are `{"error": {"message", "type", "param", "code"}}`, whatever went wrong; `code` is a string that does not change, `param`
the field at fault as `messages[0].content`. 429 and 503 carry `Retry-After` in seconds. In a stream, what fails after the first byte is
one `data: {"error": ...}` event, and no `[DONE]` comes.

**Headers.** `X-Request-Id` comes back as it was sent, if it is 1 to 128 of `A-Z a-z 0-9 . _ -`, else as one of the server's. Where a
key has limits, `x-ratelimit-limit-requests`, `-remaining-requests`, `-reset-requests`, and the same with `-tokens`.
Where the server has raised the adapter's thresholds, `X-MoA-Threshold-Scale` says by which factor
([routing.md](routing.md#sparsity-under-pressure)).
"""


def api_page() -> str:
    """docs/api.md."""
    document = new_app("0").openapi()
    operations = [
        (method, path, item) for path, methods in document["paths"].items() for method, item in methods.items() if method in METHODS
    ]
    seen: list[str] = []
    parts = [API_HEAD, "## Routes\n", _table(("route", "key", "what it does", "answer"), list(_routes(operations, seen)))]
    for method, path, operation in operations:
        body = operation.get("requestBody")
        if body is not None:
            reference = body["content"]["application/json"]["schema"]["$ref"]
            name = _name(reference)
            parts += [f"## {method.upper()} {path}\n", _about(operation), _fields(document["components"]["schemas"][name], seen)]
            if (answer := _answer(operation)) is not None:
                parts.append(f"It answers with {_kind(answer, seen)}.\n")
    parts.append("## Objects\n")
    done: set[str] = set()
    while todo := [name for name in seen if name not in done]:
        for name in todo:
            done.add(name)
            schema = document["components"]["schemas"][name]
            parts += [f"### {name}\n", _about(schema), _fields(schema, seen)]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _routes(operations: list[tuple[str, str, Any]], seen: list[str]) -> Iterator[tuple[str, ...]]:
    for method, path, operation in operations:
        key = (
            "none"
            if path in PUBLIC or path.startswith(dashboard.ROOT)
            else "admin"
            if method != "get" and path.startswith(ADMIN)
            else "API"
        )
        title = f"`{method.upper()} {path}`"
        route = f"[{title}](#{_anchor(f'{method} {path}')})" if "requestBody" in operation else title
        answer = _answer(operation)
        yield route, key, _about(operation).strip() or operation["summary"], _kind(answer, seen) if answer else ""


def _answer(operation: dict[str, Any]) -> dict[str, Any] | None:
    """A reference to the shape of a 200, where there is one."""
    schema = operation["responses"]["200"]["content"].get("application/json", {}).get("schema", {})
    return schema if "$ref" in schema else None


def _anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return "".join(char for char in title.lower().replace(" ", "-") if char.isalnum() or char in "-_")


def _about(item: dict[str, Any]) -> str:
    """Its first paragraph; what follows is for readers of the code."""
    text: str = item.get("description", "").split("\n\n")[0]
    return " ".join(text.split()) + "\n" if text else ""


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]


def _fields(schema: dict[str, Any], seen: list[str]) -> str:
    """A row for each field. What is answered has no defaults, and says where it can be null."""
    required = set(schema.get("required", ()))
    is_answer = required == set(schema.get("properties", {})) and bool(required) and "additionalProperties" not in schema
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else _default(field)
        kind, about = _kind(field, seen), field.get("description", "")
        is_nullable = any(option.get("type") == "null" for option in field.get("anyOf", ()))
        rows.append((f"`{name}`", f"{kind} or null" if is_nullable else kind, about) if is_answer else (f"`{name}`", kind, default, about))
    return _table(("field", "type", "") if is_answer else ("field", "type", "default", ""), rows)


def _default(field: dict[str, Any]) -> str:
    default = field.get("default")
    return "" if default in (None, [], {}) or isinstance(default, dict) else f"`{json.dumps(default)}`"


def _kind(field: dict[str, Any], seen: list[str]) -> str:
    """A type in words, with its bounds."""
    if "$ref" in field:
        name = _name(field["$ref"])
        if name not in seen:
            seen.append(name)
        return f"[{name}](#{_anchor(name)})"
    if "anyOf" in field or "oneOf" in field:
        options = field.get("anyOf") or field.get("oneOf") or []
        kinds = [_kind(option, seen) for option in options if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in field or "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field.get("enum", [field.get("const")]))
    kind = str(field.get("type", "any"))
    if kind == "array":
        kind = f"list of {_kind(field.get('items', {}), seen)}"
    elif kind == "object" and isinstance(field.get("additionalProperties"), dict):
        kind = f"object of {_kind(field['additionalProperties'], seen)}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {field[word]}" for word, sign in bounds.items() if word in field]
    sizes = {"minLength": "≥ {} characters", "maxLength": "≤ {} characters", "minItems": "≥ {} items", "maxItems": "≤ {} items"}
    found += [text.format(field[word]) for word, text in sizes.items() if word in field]
    if "pattern" in field:
        found.append(f"`{field['pattern']}`")
    return f"{kind}, {', '.join(found)}" if found else kind


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


METRICS_HEAD = """\
# Metrics

Made from the code by `python -m tests.pages`; do not edit. `GET /metrics` is text format 0.0.4; `GET /metrics?name[]=moa_queue_seconds`
(once or more often) gives those families only, and costs as much less. Dashboards and alarms: [observability.md](observability.md).

**Labels.** `adapter` and `model_name` are the base, one of the first `--named-adapters` that were loaded, or `other`; in the families of
routers, one of the `--grid-adapters` busiest, or `other`. No client can make a series: what is unknown is `other`, a path without a
route `none`. An unloaded adapter's series go with it.

**Counters** end in `_total`, histograms are `NAME_bucket`, `NAME_sum` and `NAME_count`, summaries `NAME_sum` and `NAME_count`.

**Left out** of vLLM's names, for they would say nothing here: `mm_cache_*` (no images), `external_prefix_cache_*` (no cache outside the
process), `estimated_*` (of a GPU's roofline) and `num_requests_waiting_by_reason`. `--no-vllm-metrics` leaves out all of `vllm:*`.
"""


def metrics_page() -> str:
    """docs/metrics.md."""
    families = Metrics("base").families
    state = {shown.family.name for shown in STATE}
    routing = {shown.family.name for shown in ROUTING}
    shadow = {family.name for family in families if family.name.startswith("moa_shadow_")}
    sections = {
        "Requests": [family for family in families if family.name.startswith("moa_") and family.name not in state | routing | shadow],
        "Engine and adapters": [family for family in families if family.name in state],
        "Routers and experts": [family for family in families if family.name in routing],
        "The shadow check": [family for family in families if family.name in shadow],
        "vLLM's names": [family for family in families if family.name.startswith("vllm:")],
        "HTTP routes": [family for family in families if family.name.startswith("http_")],
        "Process": [family for family in families if family.name.startswith("process_")],
    }
    assert sum(map(len, sections.values())) == len(families), "every family has its section"
    parts = [METRICS_HEAD]
    for title, found in sections.items():
        is_read = title == "vLLM's names"
        head = ("name", "type", "labels", "unit", "", *(("read by",) if is_read else ()))
        parts += [f"## {title}\n", _table(head, [_metric(family, is_read=is_read) for family in found])]
    return "\n".join(parts)


def _metric(family: Family, *, is_read: bool) -> tuple[str, ...]:
    labels = ", ".join(f"`{label}`" for label in family.labels)
    text = family.text
    if family.buckets:
        bounds = ", ".join(f"{bound:g}" for bound in family.buckets)
        text += f" Buckets: {'1, 2, 5, 10 ... to the served context' if family.buckets == tuple(lengths(8192)) else bounds}."
    row = (f"`{family.name}`", family.kind, labels, _unit(family.name), text)
    return (*row, ", ".join(readers_of(family.name))) if is_read else row


def _unit(name: str) -> str:
    word = name.removesuffix("_total").rpartition("_")[2]
    is_tokens = "tokens" in name or "prefix_cache" in name
    return {"seconds": "s", "bytes": "bytes", "ratio": "0 to 1", "perc": "0 to 1", "gap": "nats", "kl": "nats"}.get(
        word, "tokens" if is_tokens else ""
    )


def settings_table() -> str:
    """What stands between the marks of docs/operations.md."""
    rows = []
    for name, field in ServerSettings.model_fields.items():
        default = field.get_default(call_default_factory=False) if field.default_factory is None else None
        is_empty = default is None or default == ()
        shown = "" if is_empty else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        flag = f"`{ENV_PREFIX}{name.upper()}`" if name in WITHOUT_FLAG else f"`--{name.replace('_', '-')}`"
        rows.append((flag, shown, field.description or ""))
    return _table(("setting", "default", ""), rows)


def operations_page(page: str) -> str:
    """`page` with the table as it is now."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{settings_table()}{END}{rest.split(END)[1]}"


def pages() -> dict[Path, str]:
    """The whole text of each."""
    operations = DOCS / "operations.md"
    return {DOCS / "api.md": api_page(), DOCS / "metrics.md": metrics_page(), operations: operations_page(operations.read_text())}


def main() -> int:
    stale = {path: text for path, text in pages().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        if "--check" not in sys.argv:
            path.write_text(text)
        sys.stdout.write(f"{path.name} {'is stale' if '--check' in sys.argv else 'written'}\n")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
