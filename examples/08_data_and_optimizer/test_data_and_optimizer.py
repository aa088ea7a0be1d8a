"""The task and the optimizer, each against its definition written another way, and both in a run."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from data_and_optimizer.lion import build as build_lion
from data_and_optimizer.parity import MARK, build
from data_and_optimizer.plugin import LionConfig, ParityConfig

from subquad import ConfigError, load_config, train
from subquad.training.sources.source import IGNORED, DataContext
from subquad.training.tokenizer import SymbolTokenizer

CONTEXT = DataContext(tokenizer=SymbolTokenizer(3), seq_len=50, cache=None)


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_targets_are_the_parity_since_the_last_mark(probability: float) -> None:
    source = build(ParityConfig(mark_probability=probability), CONTEXT)
    for index in range(20):
        sample, parity = source.sample("train", index), 0
        for token, target in zip(sample.tokens, sample.targets, strict=True):
            parity = 0 if token == MARK else parity ^ int(token)
            assert target == (IGNORED if token == MARK else parity)


def test_a_sample_is_a_function_of_its_seed_split_and_number() -> None:
    source, again = build(ParityConfig(), CONTEXT), build(ParityConfig(), CONTEXT)
    first = source.sample("train", 3).tokens
    assert np.array_equal(first, again.sample("train", 3).tokens)
    others = (source.sample("train", 4), source.sample("validation", 3))
    others = (*others, build(ParityConfig(seed=1), CONTEXT).sample("train", 3))
    assert not any(np.array_equal(first, other.tokens) for other in others)


def test_lion_takes_the_steps_of_its_algorithm_number_by_number() -> None:
    weight = torch.nn.Parameter(torch.randn(7).double())
    config = LionConfig(lr=0.1, betas=[0.8, 0.6], weight_decay=0.3)
    optimizer = build_lion(config, [{"params": [weight], "weight_decay": 0.3}])
    expected, momentum = weight.tolist(), [0.0] * 7
    for gradient in torch.randn(5, 7).double():
        weight.grad = gradient
        optimizer.step()
        for i, slope in enumerate(gradient.tolist()):
            direction = np.sign(0.8 * momentum[i] + (1 - 0.8) * slope)
            expected[i] -= 0.1 * (direction + 0.3 * expected[i])
            momentum[i] = 0.6 * momentum[i] + (1 - 0.6) * slope
        assert weight.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_run_with_both_learns(tmp_path: Path) -> None:
    overrides = [
        "model=mamba", "model.d_model=16", "model.num_layers=1", "data=parity", "data.mark_probability=0.5",
        "optimizer=lion", "optimizer.lr=0.003", "trainer.max_steps=40", "trainer.seq_len=16", "trainer.batch_size=16",
        "trainer.accelerator=cpu", "trainer.validate_every_n_steps=40", "trainer.validation_batches=4",
        "trainer.progress_bar=false", "compiler.measure=false", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    train(load_config(overrides))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert losses[-1] < 0.66, "guessing costs log 2 = 0.693 a bit"


@pytest.mark.parametrize("override", ["data.mark_probability=2", "optimizer.betas=[0.9]"])
def test_a_wrong_number_is_refused_with_the_key(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["data=parity", "optimizer=lion", override])
    assert override.partition("=")[0] in caught.value.where
