"""A tiny base, and its pages under each backend, for the tests of what measures steps."""

from pathlib import Path

import pytest
from training import tiny_base

from moa_serve.bench.synthetic import SPARE_TOKENS
from moa_serve.bench.workload import Pages
from moa_serve.model.backend import Backend
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import Base
from moa_serve.native.library import NativeUnavailable, instruction_sets
from moa_serve.native.model import NativeModel


def open_model(backend: str, folder: Path) -> Backend:
    """Skips the test where there is no such backend."""
    base = tiny_base(folder)
    if backend == "torch":
        return Transformer(base.config, base.weights)
    try:
        instruction_sets()
    except NativeUnavailable as error:
        pytest.skip(f"no native backend here: {error}")
    return NativeModel(base.config, base.weights, threads=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def torch_pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    return Pages(open_model("torch", tmp_path_factory.mktemp("torch")), [20] * 8, spare=SPARE_TOKENS)


@pytest.fixture(scope="module")
def native_pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    return Pages(open_model("native", tmp_path_factory.mktemp("native")), [20] * 8, spare=SPARE_TOKENS)


@pytest.fixture(params=["torch", "native"])
def pages(request: pytest.FixtureRequest) -> Pages:
    found: Pages = request.getfixturevalue(f"{request.param}_pages")
    return found


@pytest.fixture(params=["torch", "native"])
def fresh_model(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """Without a cache; its base is in `tmp_path`."""
    return open_model(request.param, tmp_path)
