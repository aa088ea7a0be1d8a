"""Validation in mid-training tells the loss by position, as `evaluate` does afterwards; ranks that share add up."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from subquad.model import chunked_cross_entropy
from subquad.model.chunked_cross_entropy import chunked_nats
from subquad.schema import EvaluateConfig, RunConfig
from subquad.training.evaluation.evaluate import evaluate
from subquad.training.evaluation.text import contexts
from subquad.training.fit import train
from subquad.training.metrics import read_metrics
from subquad.training.positions import POSITION_PREFIX, by_bucket, mean_by_bucket, position_columns, tokens_seen

TinyRun = Callable[..., RunConfig]
BOUNDS = ([0, 3, 8, 13, 16], [0, 8, 8, 16], [0, 1, 2, 8, 16])
"""Of two rows of eight tokens, their ends included; one holds an empty document."""


@pytest.mark.parametrize("bounds", [None, *BOUNDS])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_tokens_seen_are_those_that_evaluate_counts(bounds: list[int] | None, parts: int) -> None:
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    length = 8 // parts
    seen = [tokens_seen(2, length, cu_seqlens, index=index, count=parts) for index in range(parts)]
    assert torch.cat(seen, dim=1).tolist() == contexts((2, 8), cu_seqlens).tolist()


def test_buckets_double_and_end_with_the_row() -> None:
    assert [column.removeprefix(POSITION_PREFIX) for column in position_columns(10)] == ["1", "2-3", "4-7", "8-10"]
    assert [column.removeprefix(POSITION_PREFIX) for column in position_columns(8)] == ["1", "2-3", "4-7", "8"]


def test_a_mean_is_over_the_targets_of_a_bucket_and_an_empty_one_is_left_out() -> None:
    nats = torch.tensor([[1.0, 2.0, 4.0, math.nan], [3.0, 6.0, 8.0, 16.0]])
    targets = torch.tensor([[5, 5, 5, -100], [5, 5, -100, -100]])
    sums = by_bucket(nats, targets, tokens_seen(2, 4, None), 3)
    assert sums.tolist() == [[4.0, 12.0, 0.0], [2.0, 3.0, 0.0]]
    assert mean_by_bucket(sums, 4) == {f"{POSITION_PREFIX}1": 2.0, f"{POSITION_PREFIX}2-3": 4.0}


@pytest.mark.parametrize("loss", ["whole", "chunked"])
def test_the_last_validation_is_what_evaluate_finds(tiny_run: TinyRun, loss: str) -> None:
    run = train(tiny_run(f"run_{loss}", max_steps=6, loss=loss)).run_dir
    last = read_metrics(run / "metrics.csv")[-1]
    found = evaluate(EvaluateConfig(run=str(run)))[2]["by_position"]
    assert isinstance(found, list)
    assert [row["first"] for row in found] == [1, 2, 4, 8, 16, 32]
    for column, row in zip(position_columns(32), found, strict=True):
        assert last[column] == pytest.approx(row["nats_per_token"], rel=1e-5), column


@pytest.mark.parametrize("logit_cap", [0.0, 3.0])
def test_chunked_nats_are_those_of_whole_logits(logit_cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_cross_entropy, "CHUNK_LOGITS", 33)  # three tokens at a time
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    targets = torch.randint(11, (2, 5))
    targets[0, 2] = -100
    logits = hidden @ head.T
    if logit_cap:
        logits = logit_cap * torch.tanh(logits / logit_cap)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)
    found = chunked_nats(hidden.requires_grad_(), head, targets, logit_cap=logit_cap)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert not found.requires_grad


def test_under_autocast_chunked_nats_are_those_of_products_in_bfloat16() -> None:
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(1, 5, 4), torch.randn(11, 4), torch.randint(11, (1, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, summed = (
            chunked_nats(hidden, head, targets),
            chunked_cross_entropy.chunked_cross_entropy(hidden, head, targets),
        )
    torch.testing.assert_close(found.sum(), summed, rtol=1e-6, atol=0)
    assert not torch.allclose(found, chunked_nats(hidden, head, targets), rtol=1e-5)
