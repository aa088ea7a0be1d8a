"""Two runs compared: weights to the last bit, every consumed sample, every figure that is not a clock's."""

from __future__ import annotations

from pathlib import Path

import torch

from subquad.training.checkpoint import newest_checkpoint
from subquad.training.metrics import read_metrics
from subquad.training.run_folder import RunFolder


def weights(run_dir: str | Path | None) -> dict[str, torch.Tensor]:
    found = newest_checkpoint(Path(str(run_dir)) / "checkpoints")
    assert found is not None
    return found.weights()


def assert_same_run(left: Path, right: Path) -> None:
    """Weights to the last bit, every consumed sample, and every recorded figure that is not a clock's."""
    for name, tensor in weights(left).items():
        assert torch.equal(tensor, weights(right)[name]), name
    assert RunFolder(left).samples(0).read_text() == RunFolder(right).samples(0).read_text()
    exact = ("step", "train/loss", "val/loss", "val/bits_per_byte", "learning_rate", "gradient_norm")
    figures = [
        [{key: row[key] for key in exact if key in row} for row in read_metrics(RunFolder(run).metrics)]
        for run in (left, right)
    ]
    assert figures[0] == figures[1]
