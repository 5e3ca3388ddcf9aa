"""Damaged adapters by the thousand: every one is refused in words, or is a whole adapter that runs. Never a crash, never code of the file.

    python -m tests.fuzz_adapters --examples 10000

Good folders of every format are damaged by bytes, by fields of their configs, by entries and values of their tensors, by what a pickle
says, and read as the server reads them. What is taken is judged again by code that shares nothing with the reader, and run on the
engine. A few are tried in every test run (tests/unit/adapter/test_fuzz_adapters.py). Exit code 1 where anything was wrong; the last line
is a JSON object.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it, so that modules here have one name

from bad_adapters import Code, has_run, params, params_tensors, saved
from families import TINY, write_base, write_family
from goldens import DATA, Golden

from moa_serve import LLM, AdapterSource
from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.store import AdapterStore
from moa_serve.errors import AdapterError, AdapterIneffective, AdapterNotFinite

Files = dict[str, bytes]
FAMILIES = ("soft", "sparse_fn", "instance", "nested_hydra", "mola_layerwise", "lora")
GOLDENS = ("adamole", "mola_topk", "soft_moa_nested_hydra", "sparse_moa_const_prompt", "unipeft", "hf_qwen3_sparsemoa")
GIB = 2**30
P99_SECONDS = 1.0

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 63, 64, 65, 512, 513, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.0, 0.5, 1e-300, 1e300,
    "", "0", "Q", "a" * 300, "\u202e", "\x00", "0-2000000000", "../..", "/etc/passwd", "nan", "Infinity", "None",
    [], [[]], {}, {"a": []}, [0] * 200, [-1], [0, 1, 2, 3],
]  # fmt: skip
WIDTHS = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


# -- good adapters


@dataclass(frozen=True)
class Subject:
    """A good folder, and the base that it is for."""

    name: str
    base: str
    variant: str | None
    files: Files = field(repr=False)

    @property
    def config_file(self) -> str:
        return next(name for name in self.files if name.endswith(".json"))

    @property
    def weights_file(self) -> str:
        return next(name for name in self.files if not name.endswith(".json"))


def _files(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _peft() -> Files:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    shapes = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (48, 32)}
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(3):
        for module, (inner, out) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{module}.lora_{{}}.weight"
            tensors |= {key.format("A"): torch.randn(4, inner), key.format("B"): torch.randn(out, 4)}
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": safetensors.torch.save(tensors)}


def subjects(folder: Path) -> list[Subject]:
    found = [Subject(family, "tiny", None, _files(write_family(folder / family, family))) for family in FAMILIES]
    meta = json.dumps(params(3)).encode()
    tensors = {name: tensor.clone() for name, tensor in params_tensors(3, 32).items()}
    found.append(Subject("meta lora", "tiny", None, {"adapter_params.json": meta, "adapter.pth": saved(tensors)}))
    plain = {"adapter_params.json": meta, "adapter.safetensors": safetensors.torch.save(tensors)}
    found += [Subject("meta safetensors", "tiny", None, plain), Subject("peft", "tiny", None, _peft())]
    for name in GOLDENS:
        golden = Golden(DATA / name)
        found.append(Subject(name, golden.family, golden.source.variant, _files(Path(golden.source.path))))
    return found


# -- damages: each takes files and draws what it does to them

Draw = Callable[[st.SearchStrategy[Any]], Any]


def _bytes(draw: Draw, data: bytes) -> bytes:
    """One edit anywhere, more often in the first kilobyte, where headers are."""
    end = draw(st.sampled_from([len(data), min(len(data), 1024), min(len(data), 16)]))
    start = draw(st.integers(0, max(0, end - 1)))
    length = draw(st.sampled_from([0, 1, 2, 8, 100, len(data)]))
    new = draw(st.one_of(st.binary(max_size=16), st.sampled_from([b"", b"\xff" * 8, b"\x00" * 8, b'"', b"{", b"}", b"9", data[:64]])))
    return data[:start] + bytes(new) + data[start + length :]


def damage_bytes(draw: Draw, subject: Subject, files: Files) -> None:
    name = draw(st.sampled_from(sorted(files)))
    for _ in range(draw(st.integers(1, 3))):
        files[name] = _bytes(draw, files[name])


def cut(draw: Draw, subject: Subject, files: Files) -> None:
    name = draw(st.sampled_from(sorted(files)))
    files[name] = files[name][: draw(st.integers(0, max(0, len(files[name]) - 1)))]


def _places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from _places(part, (*here, key))


def _change(draw: Draw, root: Any, odd: list[Any]) -> Any:
    """`root` with something replaced, taken away, doubled or added."""
    place = draw(st.sampled_from(list(_places(root))))
    new = copy.deepcopy(draw(st.sampled_from(odd)))
    if not place:
        return new
    parent = root
    for key in place[:-1]:
        parent = parent[key]
    what = draw(st.sampled_from(["replace", "replace", "remove", "double", "add"]))
    if what == "replace":
        parent[place[-1]] = new
    elif what == "remove":
        del parent[place[-1]]
    elif isinstance(parent, list):
        parent.append(parent[place[-1]] if what == "double" else new)
    else:
        parent[f"{place[-1]}x" if what == "double" else draw(st.sampled_from(["auto_map", "name", "layers", "r", ""]))] = new
    return root


def damage_config(draw: Draw, subject: Subject, files: Files) -> None:
    config = json.loads(files[subject.config_file])
    for _ in range(draw(st.integers(1, 3))):
        config = _change(draw, config, ODD)
    files[subject.config_file] = json.dumps(config).encode()


def _split(data: bytes) -> tuple[Any, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def damage_header(draw: Draw, subject: Subject, files: Files) -> None:
    """What a safetensors file says of itself, around data that stays."""
    if not subject.weights_file.endswith(".safetensors"):
        return damage_table(draw, subject, files)
    header, body = _split(files[subject.weights_file])
    odd = [*ODD, "F64", "I32", "BOOL", "BF16", [2**62, 8], [-1], [0, len(body)], [len(body), 0], [[0], [1]]]
    for _ in range(draw(st.integers(1, 2))):
        header = _change(draw, header, odd)
    files[subject.weights_file] = _join(header, body)
    return None


def _load(data: bytes, name: str) -> dict[str, torch.Tensor]:
    if name.endswith(".safetensors"):
        return safetensors.torch.load(data)
    table: dict[str, torch.Tensor] = torch.load(io.BytesIO(data), weights_only=True)
    return table


def damage_table(draw: Draw, subject: Subject, files: Files) -> None:
    """Tensors of a well-formed file: one is missing, strange, of another shape, or not finite."""
    name = subject.weights_file
    table = {key: tensor.clone() for key, tensor in _load(files[name], name).items()}
    key = draw(st.sampled_from(sorted(table)))
    tensor = table[key]
    what = draw(
        st.sampled_from(["remove", "rename", "transpose", "grow", "nan", "inf", "dtype", "empty", "huge", "zero", "scalar", "nudge"])
    )
    if what in ("remove", "rename"):
        table.pop(key)
    if what == "rename":
        table[draw(st.sampled_from([key + "x", key.upper(), "model.norm.weight", "", "a" * 3000, "\u202e"]))] = tensor
    elif what == "transpose":
        table[key] = tensor.T.contiguous() if tensor.ndim == 2 else tensor[None]
    elif what == "grow":
        table[key] = torch.cat([tensor, tensor]) if tensor.ndim else tensor[None]
    elif what in ("nan", "inf"):
        flat = tensor.view(-1)
        flat[draw(st.integers(0, len(flat) - 1))] = float(what)
    elif what == "dtype":
        kind = draw(st.sampled_from([torch.float64, torch.int8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.complex64]))
        table[key] = tensor.to(kind if not (kind.is_complex and name.endswith(".safetensors")) else torch.float64)
    elif what in ("empty", "scalar"):
        table[key] = tensor[:0].contiguous() if what == "empty" else torch.tensor(1.0)
    elif what in ("huge", "zero"):
        tensor.fill_(3e38 if what == "huge" else 0)
    elif what == "nudge":
        tensor += 0.01
    files[name] = safetensors.torch.save(table) if name.endswith(".safetensors") else saved(table)


def damage_pickle(draw: Draw, subject: Subject, files: Files) -> None:
    """Members of the archive that torch writes; a pickle with code in it."""
    name = next((name for name in files if name.endswith((".pth", ".bin"))), None)
    if name is None:
        name = draw(st.sampled_from([subject.weights_file, "adapter.pth"]))
        files[name] = CODE
        return
    if draw(st.booleans()):
        files[name] = CODE
        return
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(files[name])) as archive, zipfile.ZipFile(out, "w") as written:
        chosen = draw(st.sampled_from(archive.namelist()))
        for member in archive.namelist():
            data = archive.read(member)
            written.writestr(member, _bytes(draw, data) if member == chosen else data)
    files[name] = out.getvalue()


CODE = b"code"  # replaced when it is written, for the code must know its folder


def swap(draw: Draw, subject: Subject, files: Files) -> None:
    """A file of another kind under a good name, or one that is not there."""
    name = draw(st.sampled_from(sorted(files)))
    other = draw(st.sampled_from([*sorted(files), None]))
    if other is None:
        files.pop(name)
    else:
        files[name] = files[other]


DAMAGES = [damage_bytes, cut, damage_config, damage_config, damage_header, damage_table, damage_pickle, swap]


# -- the judge, which shares nothing with the reader


def judge(subject: Subject, files: Files, adapter: Adapter) -> list[str]:
    """What speaks against an adapter that was taken."""
    found = []
    try:
        config = json.loads(files[subject.config_file], object_pairs_hook=_no_twins, parse_constant=_no_nan)
        found += [] if isinstance(config, dict) else ["the config is no object"]
    except (KeyError, ValueError, RecursionError) as error:
        found.append(f"the config cannot be read: {error!r}")
    weights = files.get(subject.weights_file, b"")
    if subject.weights_file.endswith(".safetensors"):
        found += _judge_file(weights)
    for name, tensor in adapter.tensors.items():
        if not np.isfinite(tensor.float().numpy()).all():
            found.append(f"{name} is not finite")
    layers = adapter.manifest.base.num_layers
    for expert in adapter.manifest.experts:
        if not all(0 <= layer < layers for layer in expert.layers) or sorted(set(expert.layers)) != list(expert.layers):
            found.append(f"{expert.name} has layers {expert.layers}")
        if expert.rank is not None and not 1 <= expert.rank <= 512:
            found.append(f"{expert.name} has rank {expert.rank}")
        if expert.alpha is not None and not (math.isfinite(expert.alpha) and abs(expert.alpha) < 1e4):
            found.append(f"{expert.name} has alpha {expert.alpha}")
    return found


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def _no_nan(word: str) -> None:
    raise ValueError(word)


def _judge_file(data: bytes) -> list[str]:
    """The layout of a safetensors file, entry by entry, as its specification has it."""
    try:
        header, body = _split(data)
        header.pop("__metadata__", None)
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            size = {"BF16": 2}.get(entry["dtype"]) or np.dtype(WIDTHS[entry["dtype"]]).itemsize
            if start != end or stop - start != math.prod(entry["shape"]) * size:
                return [f"{name} does not lie where it says"]
            end = stop
        return [] if end == len(body) else ["the file does not end with its tensors"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"the weights cannot be read: {error!r}"]


# -- trying


@dataclass
class Score:
    """G3 of docs/reliability.md."""

    files: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    ran: int = 0
    seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        at = [round(float(np.percentile(self.seconds, share)), 4) for share in (50, 99, 100)] if self.seconds else [0.0] * 3
        return {
            "adapters": self.files, "refused": sum(self.refused.values()), "accepted_whole": self.accepted, "of_them_run": self.ran,
            "p50_seconds": at[0], "p99_seconds": at[1], "max_seconds": at[2], "codes": dict(sorted(self.refused.items())),
        }  # fmt: skip


class Fuzzer:
    """Bases to read and run adapters on, and good folders to damage."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.score = folder, Score()
        bases = {"tiny": write_base(folder / "tiny", TINY), **{name: DATA / "bases" / name for name in ("llama", "qwen3")}}
        self.llms = {name: LLM(str(base), device="cpu", kv_cache_bytes=2**22) for name, base in bases.items()}
        self.subjects = subjects(folder / "good")
        self.revisions: dict[str, str] = {}
        self.root = folder / "adapters"
        (self.root / "bad").mkdir(parents=True)
        self.stores = {
            name: AdapterStore(llm._store.config, base_name="base", base_digest=None, adapters_dir=self.root, max_file_bytes=GIB)
            for name, llm in self.llms.items()
        }
        for subject in self.subjects:
            self.write(subject.files)
            self.revisions[subject.name] = self.stores[subject.base].read("bad", AdapterSource("bad", subject.variant)).revision

    def write(self, files: Files) -> None:
        place = self.root / "bad"
        shutil.rmtree(place)
        place.mkdir()
        for name, data in files.items():
            (place / name).write_bytes(saved({"a": Code(place)}) if data is CODE else data)

    def try_one(self, draw: Draw) -> None:
        """Raises AssertionError."""
        subject = draw(st.sampled_from(self.subjects))
        files = dict(subject.files)
        draw(st.sampled_from(DAMAGES))(draw, subject, files)
        self.write(files)
        store, source = self.stores[subject.base], AdapterSource("bad", subject.variant)
        header_error: AdapterError | None = None
        try:
            store.check_header("bad", source)
        except AdapterError as error:
            header_error = error
        started = time.perf_counter()
        try:
            adapter = store.read("bad", source)
        except AdapterError as error:
            self.refuse(error)
            return
        finally:
            self.score.files += 1
            self.score.seconds.append(time.perf_counter() - started)
            assert not has_run(self.root / "bad"), "code of the file ran"
        assert header_error is None, f"its header was refused ({header_error}), the whole was taken"
        found = judge(subject, files, adapter)
        assert not found, found
        self.score.accepted += 1
        if adapter.revision != self.revisions[subject.name]:
            self.run(subject)

    def refuse(self, error: AdapterError) -> None:
        self.score.refused[error.code] += 1
        message = str(error)
        assert message
        message.encode()  # as it is sent and logged: a lone surrogate would not go through
        for secret in ("Traceback", "object at 0x", str(self.folder)):
            assert secret not in message

    def run(self, subject: Subject) -> None:
        """Prompt and steps on the engine, as the self-test of every load has them."""
        llm = self.llms[subject.base]
        try:
            llm.load_adapter("bad", AdapterSource(self.root / "bad", subject.variant))
        except (AdapterIneffective, AdapterNotFinite) as error:
            self.refuse(error)
            self.score.accepted -= 1
            return
        self.score.ran += 1
        llm.unload_adapter("bad")

    def close(self) -> None:
        for llm in self.llms.values():
            llm.close()


@contextlib.contextmanager
def fuzzing() -> Iterator[Fuzzer]:
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        try:
            yield fuzzer
        finally:
            fuzzer.close()


def fuzz(fuzzer: Fuzzer, examples: int, *, is_new: bool) -> None:
    """Try so many; `is_new` ones differ from run to run. Raises AssertionError, or whatever a reader let through."""

    @settings(max_examples=examples, derandomize=not is_new, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def try_each(data: st.DataObject) -> None:
        fuzzer.try_one(data.draw)

    try_each()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000)
    examples = parser.parse_args().examples
    wrong: str | None = None
    with fuzzing() as fuzzer:
        while wrong is None and fuzzer.score.files < examples:
            try:
                fuzz(fuzzer, min(1000, examples - fuzzer.score.files), is_new=True)
            except (AssertionError, HypothesisException, Exception) as error:
                wrong = f"{type(error).__name__}: {error}"
                sys.excepthook(type(error), error, error.__traceback__)
            sys.stderr.write(f"{fuzzer.score.files:,} adapters\n")
        summary = fuzzer.score.summary()
    is_slow = summary["p99_seconds"] > P99_SECONDS
    sys.stdout.write(json.dumps({"ok": wrong is None and not is_slow, "wrong": wrong, **summary}) + os.linesep)
    return 1 if wrong or is_slow else 0


if __name__ == "__main__":
    sys.exit(main())
