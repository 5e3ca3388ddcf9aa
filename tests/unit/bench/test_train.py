"""The yardstick computes the same numbers; else the ratio would say nothing."""

import json
from pathlib import Path

import pytest
import torch
from training import manifest_for, tiny_base
from typer.testing import CliRunner

from moa_serve.__main__ import app
from moa_serve.bench.gathered import gathered
from moa_serve.bench.train import RECIPES, examples, measure
from moa_serve.model.moa import MoaWeights
from moa_serve.model.transformer import Transformer
from moa_serve.train.batches import TokenBatch
from moa_serve.train.objective import Objective, trainable
from moa_serve.train.recipe import fresh_tensors


class Gathered(Objective):
    def adapter(self) -> MoaWeights:
        return gathered(super().adapter())


@pytest.mark.parametrize("name", RECIPES)
def test_gather_and_scatter_gives_the_same_loss_and_gradient(name: str, tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    manifest = manifest_for(base, RECIPES[name])
    generator = torch.Generator().manual_seed(0)
    start = {key: t + 0.1 * torch.randn(t.shape, generator=generator) for key, t in fresh_tensors(manifest, 0).items()}
    model, batch = Transformer(base.config, base.weights), TokenBatch.of(examples(4, 12, 3, 260), torch.device("cpu"))
    grads, losses = [], []
    for kind in (Objective, Gathered):
        tensors = trainable(start)
        loss = kind(model, manifest, tensors, straight_through=None).loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        grads.append({key: tensor.grad for key, tensor in tensors.items() if ".router" not in key})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for key, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][key], rtol=1e-3, atol=1e-4)


def test_examples_spread_their_lengths() -> None:
    made = examples(5, 100, 10, 260)
    assert [len(one.token_ids) - 1 for one in made] == [80, 90, 100, 110, 120]
    assert all(one.num_targets == 10 for one in made)


def test_a_measurement_has_sensible_numbers(tmp_path: Path) -> None:
    timing = measure(tiny_base(tmp_path), "soft_moa", pairs=1, batch_size=4)
    assert timing.tokens_per_second > 0
    assert timing.against > 0
    assert timing.peak_memory_bytes > 2**20


def test_the_command_prints_one_json_document(tmp_path: Path) -> None:
    tiny_base(tmp_path)
    done = CliRunner().invoke(app, ["bench", "train", "--model", str(tmp_path), "--family", "lora", "--pairs", "1", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["families"][0]["name"] == "lora"
    done = CliRunner().invoke(app, ["bench", "train", "--model", str(tmp_path), "--family", "vera"])
    assert done.exit_code == 2
    assert "must be one of" in done.output
