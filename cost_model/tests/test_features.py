"""What a model sees: numbers in a stated order, the same for the same row, without the device's name."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import planted
import pytest

from subquad_cost_model import features, lower_bound_s
from subquad_cost_model.features import NAMES, Vocabulary, feature_matrix, schema_hash, words

DEVICE = planted.DEVICES[1]


def line(row: planted.CostRow, device: planted.Device = DEVICE) -> dict[str, float]:
    matrix = feature_matrix([row], [device], Vocabulary.of([row]))
    assert matrix.shape == (1, len(NAMES))
    return dict(zip(NAMES, matrix[0].tolist(), strict=True))


def test_figures_can_be_told_by_hand() -> None:
    row = planted.row("wide", 2, 1024, 8)
    found = line(row)
    assert found["log2 matmul_flops"] == pytest.approx(math.log2(row.matmul_flops + 1))
    assert found["log2 matmul_s"] == pytest.approx(math.log2(row.matmul_flops / 1e15))
    assert found["log2 bound_s"] == pytest.approx(math.log2(lower_bound_s(row, DEVICE)))
    assert (found["log2 b"], found["log2 t"], found["log2 h"], found["log2 k"]) == (1, 10, 3, 6)
    sms = 4e12 * 2e-9 / 64
    assert found["log2 sms"] == pytest.approx(math.log2(sms))
    waves = 2 * 8 * 1024 / 64 / sms
    assert found["log2 waves"] == pytest.approx(math.log2(waves))
    assert found["wave efficiency"] == pytest.approx(waves / math.ceil(waves))
    assert (found["padding of t"], found["padding of width"]) == (1, 1)
    assert line(planted.row("wide", 2, 33, 8, k=96))["padding of t"] == pytest.approx(64 / 33)
    assert line(planted.row("wide", 2, 33, 8, k=96))["padding of width"] == pytest.approx(128 / 96)
    assert (found["has fp8"], found["has tma"], found["has tensor memory"], found["probed"]) == (1, 1, 0, 0)


def test_what_an_operator_lacks_is_missing_and_not_zero() -> None:
    found = line(planted.row("wide", 2, 64, 8))
    assert all(math.isnan(found[f"log2 {axis}"]) for axis in ("s", "n", "c", "documents", "window"))


def test_shipped_devices_have_the_processors_that_they_have() -> None:
    from subquad_cost_model import load_device

    row = planted.row("wide", 1, 64, 1)
    sms = {name: 2 ** line(row, load_device(name))["log2 sms"] for name in ("a100", "h100", "h200", "l40s")}
    assert sms == pytest.approx({"a100": 108, "h100": 132, "h200": 132, "l40s": 142}, rel=5e-3)


def test_the_name_of_a_device_is_not_seen() -> None:
    row = planted.row("wide", 2, 100, 4)
    vocabulary = Vocabulary.of([row])
    renamed = replace(DEVICE, name="another", notes="other notes", memory_bytes=1)
    assert np.array_equal(
        feature_matrix([row], [DEVICE], vocabulary), feature_matrix([row], [renamed], vocabulary), equal_nan=True
    )


def test_unknown_words_are_missing_and_known_ones_keep_their_code() -> None:
    rows = [planted.row(kernel, 1, 64, 1) for kernel in planted.KERNELS]
    vocabulary = Vocabulary.of(rows)
    codes = vocabulary.codes([*rows, planted.row("new", 1, 64, 1)])
    assert codes[:, 1].tolist()[:2] == [1.0, 0.0]  # sorted: narrow, wide
    assert math.isnan(codes[2, 1])
    assert codes[2, 0] == codes[0, 0]
    assert words(rows[0]) == ("mix", "mix/wide", "bfloat16", '{"causal": true}')


def test_lengths_are_numbers_and_other_options_are_words() -> None:
    row = replace(planted.row("wide", 1, 64, 1), options={"causal": True, "decay": "head", "window": 16, "scale": 0.5})
    assert words(row)[3] == '{"causal": true, "decay": "head"}'
    found = line(row)
    assert (found["log2 window"], found["log2 t / window"]) == (4, 2)
    assert math.isnan(line(replace(row, options={"window": 0}))["log2 window"])


def test_the_hash_follows_the_order_of_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    before = schema_hash()
    monkeypatch.setattr(features, "NAMES", (NAMES[1], NAMES[0], *NAMES[2:]))
    assert schema_hash() != before
    monkeypatch.setattr(features, "NAMES", NAMES)
    assert schema_hash() == before
