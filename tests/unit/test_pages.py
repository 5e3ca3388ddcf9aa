"""Pages that are made from the code are as the code is, and the operator's page knows every error that a client can meet."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from pages import DOCS, pages

from moa_serve import errors as tree
from moa_serve.api import errors, guard, protocol
from moa_serve.api.app import new_app
from moa_serve.api.document import describe

OPERATIONS = (DOCS / "operations.md").read_text()


@pytest.mark.parametrize("path", [DOCS / "api.md", DOCS / "metrics.md", DOCS / "operations.md"], ids=lambda path: path.name)
def test_no_page_is_stale(path: Path) -> None:
    """A reference that lags behind is worse than none."""
    assert path.read_text() == pages()[path], "run `python -m tests.pages`"


def sent() -> set[tuple[int, str]]:
    """Every pair of status and code that an answer can have, but those of an adapter's files, which are told elsewhere."""
    known = [
        kind for module in (tree, errors) for _, kind in inspect.getmembers(module, inspect.isclass) if issubclass(kind, tree.MoaError)
    ]
    # What ends the start, or a command, is sent to nobody.
    own = [
        kind
        for kind in known
        if not issubclass(kind, tree.ModelError | tree.DataInvalid) and kind not in (tree.MoaError, tree.AdapterError)
    ]
    found = {(errors.status_of(kind("x")), kind.code) for kind in own}
    for module in (guard, protocol):
        found |= {(int(status), code) for status, code in re.findall(r'(\d{3}),\s*"([a-z_]+)"', inspect.getsource(module))}
        found |= {(int(status), code) for status, code in re.findall(r'(\d{3}): "([a-z_]+)"', inspect.getsource(module))}
    return found | {(404, "not_found"), (405, "method_not_allowed"), (429, "rate_limit_exceeded")}


def test_every_error_is_in_the_operators_table() -> None:
    """Whoever is called at night looks for the code."""
    rows = {(int(status), code) for status, code in re.findall(r"^\| (\d{3}) \| `([a-z_]+)` \|", OPERATIONS, re.MULTILINE)}
    elsewhere = {
        code for _, code in sent() if code.startswith("adapter_") and f"`{code}`" in OPERATIONS.partition("What is wrong with the files")[2]
    }
    missing = {(status, code) for status, code in sent() if (status, code) not in rows and code not in elsewhere}
    assert missing == set()


def test_every_route_is_in_the_document() -> None:
    """What is not in it is not fuzzed."""
    app = new_app("1")
    routers: list[Any] = [route.original_router for route in app.routes if hasattr(route, "original_router")]
    routes = {
        (route.path.replace(":path}", "}"), method.lower()) for router in routers for route in router.routes for method in route.methods
    }
    told = {(path, method) for path, methods in describe(app)["paths"].items() for method in methods}
    assert routes == told
    assert len(routes) >= 15
