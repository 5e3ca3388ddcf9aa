"""The comparison of two settings: by its formula on made-up distributions, and on a tiny base against itself and in another dtype."""

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import TINY, write_base, write_family, write_tokenizer
from torch import Tensor
from typer.testing import CliRunner

from moa_serve.__main__ import app
from moa_serve.adapter.adapter import AdapterSource
from moa_serve.bench.quality import Agreement, Report, Setting, measure
from moa_serve.bench.texts import PROMPTS
from moa_serve.errors import InvalidRequest, MoaError
from moa_serve.shell.bench_quality import show

WITH_TEXT: dict[str, Any] = TINY | {"vocab_size": 259, "eos_token_id": 2}
TEXTS = ("One plus one is", "A cat sat on the mat, and the rain fell.")
FLOAT32, BFLOAT16 = Setting("torch", "float32"), Setting("torch", "bfloat16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, which has a tokenizer of bytes, and an adapter `soft` for it."""
    root = tmp_path_factory.mktemp("quality")
    write_base(root / "base", WITH_TEXT)
    write_tokenizer(root / "base")
    write_family(root / "soft", "soft", config=WITH_TEXT)
    return root


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing may be left in the folder for temporary files: log-probabilities of a large base are gigabytes."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def log(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows).log()


def test_the_numbers_are_the_formula() -> None:
    """KL(p || q) = sum of p log(p / q), by position; the margin is the reference's, where the best tokens differ."""
    reference, other = log([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]]), log([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1]])
    found = Agreement.of("a", [(reference, other), (reference[:1], reference[:1])])
    divergence = 0.5 * math.log(0.5 / 0.4) + 0.4 * math.log(0.4 / 0.5)
    assert (found.adapter, found.num_positions) == ("a", 3)
    assert found.top1 == pytest.approx(2 / 3)
    assert found.mean_kl == pytest.approx(divergence / 3, abs=1e-6)
    assert found.max_kl == pytest.approx(divergence, abs=1e-6)
    assert found.margin == pytest.approx(math.log(0.5 / 0.4), abs=1e-6)


def test_it_is_the_divergence_from_the_reference() -> None:
    """Not the other way round: what the reference finds likely weighs most."""
    reference, other = log([[0.9, 0.1]]), log([[0.6, 0.4]])
    assert Agreement.of(None, [(reference, other)]).mean_kl == pytest.approx(0.9 * math.log(1.5) + 0.1 * math.log(0.25), abs=1e-6)


def test_a_perturbed_distribution_differs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 40, generator=generator)
    noise = torch.randn(50, 40, generator=generator)
    reference = logits.log_softmax(-1)
    found = [Agreement.of(None, [(reference, (logits + scale * noise).log_softmax(-1))]) for scale in (0.0, 0.1, 1.0)]
    assert (found[0].top1, found[0].mean_kl, found[0].max_kl, found[0].margin) == (1.0, 0.0, 0.0, None)
    assert 0 < found[1].mean_kl < found[1].max_kl < found[2].max_kl
    assert found[1].mean_kl < found[2].mean_kl
    assert 1 >= found[1].top1 > found[2].top1
    assert found[2].margin is not None
    assert found[2].margin > 0


def test_a_setting_agrees_with_itself(folder: Path) -> None:
    report = measure(folder / "base", FLOAT32, FLOAT32, adapters={"soft": AdapterSource(folder / "soft")}, prompts=TEXTS, device="cpu")
    assert [agreement.adapter for agreement in report.agreements] == [None, "soft"]
    for agreement in report.agreements:
        assert agreement.num_positions == sum(map(len, TEXTS))
        assert (agreement.top1, agreement.margin) == (1.0, None)
        assert agreement.mean_kl == pytest.approx(0, abs=1e-6)
        assert agreement.max_kl == pytest.approx(0, abs=1e-6)


def test_another_dtype_differs_a_little(folder: Path) -> None:
    report = measure(folder / "base", FLOAT32, BFLOAT16, adapters={"soft": AdapterSource(folder / "soft")}, prompts=TEXTS, device="cpu")
    for agreement in report.agreements:
        assert 0 < agreement.mean_kl < 0.5
        assert agreement.mean_kl < agreement.max_kl
        assert agreement.top1 > 0.5
    assert report.agreements[0].mean_kl != report.agreements[1].mean_kl


def test_a_setting_is_backend_and_dtype() -> None:
    assert Setting.parse("native:bfloat16", "other") == Setting("native", "bfloat16")
    assert str(FLOAT32) == "torch:float32"
    for text in ("torch", "torch:", ":float32", ""):
        with pytest.raises(InvalidRequest, match=r"--other '.*' must be BACKEND:DTYPE") as caught:
            Setting.parse(text, "other")
        assert caught.value.param == "other"


@pytest.mark.parametrize("other", [Setting("torch", "int4"), Setting("jax", "float32")])
def test_a_setting_that_cannot_be_had_is_refused_before_anything_runs(other: Setting) -> None:
    """The reference takes the longest, and would have run for nothing."""
    with pytest.raises(InvalidRequest, match=f"{other.dtype if other.backend == 'torch' else other.backend}.*is unknown"):
        measure("nowhere", FLOAT32, other, device="cpu")


def test_a_base_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="has no tokenizer"):
        measure(write_base(tmp_path), FLOAT32, BFLOAT16, prompts=TEXTS, device="cpu")


def test_a_full_disk_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("1000 requested and 10 written")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(MoaError, match=r"cannot be kept \(1000 requested.*TMPDIR"):
        measure(folder / "base", FLOAT32, BFLOAT16, prompts=TEXTS, device="cpu")


def test_the_fixed_prompts_are_many_and_short() -> None:
    assert len(set(PROMPTS)) == 24
    assert all(text.isascii() and text == text.strip() and 150 < len(text) < 300 for text in PROMPTS)
    assert not any("----" in text for text in PROMPTS)


# -- the command


def test_the_command_prints_one_json_document(folder: Path) -> None:
    arguments = ["--model", str(folder / "base"), "--device", "cpu", "--other", "torch:bfloat16", "--prompts", "2"]
    done = CliRunner().invoke(app, ["bench", "quality", *arguments, "--adapter", f"mine={folder / 'soft'}", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["base"], found["reference"], found["other"], found["prompts"]) == ("base", "torch:float32", "torch:bfloat16", 2)
    assert [agreement["adapter"] for agreement in found["agreements"]] == [None, "mine"]
    assert found["agreements"][0]["num_positions"] == len(PROMPTS[0]) + len(PROMPTS[1])
    assert found["agreements"][0]["mean_kl"] > 0


def test_the_table_marks_what_misses_its_goal(capsys: pytest.CaptureFixture[str]) -> None:
    agreements = [Agreement(None, 1500, 0.98, 0.01, 0.25, 0.0625), Agreement("soft", 1500, 0.9799, 0.0101, 0.5, None)]
    show(Report("tiny", FLOAT32, BFLOAT16, 24, agreements))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "tiny: torch:bfloat16 against torch:float32, 24 prompts"
    base, soft = (line for line in lines if "1,500" in line)
    assert base.split() == ["base", "alone", "1,500", "98.00", "%", "0.01000", "0.25000", "0.0625"]
    assert soft.split() == ["soft", "1,500", "97.99", "%", "!", "0.01010", "!", "0.50000"]
    assert "98 %" in lines[-1]
    assert "0.01 nats" in lines[-1]


def test_wrong_usage_is_exit_2(folder: Path) -> None:
    for arguments in (["--reference", "torch"], ["--other", "torch:int4"], ["--model", "nowhere", "--other", "torch:bfloat16"]):
        done = CliRunner().invoke(app, ["bench", "quality", "--device", "cpu", "--model", str(folder / "base"), *arguments])
        assert done.exit_code == 2, done.output
        assert done.stdout == ""
