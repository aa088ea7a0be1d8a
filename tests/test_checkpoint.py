"""Checkpoints: whole or not at all, verified before use, no more than were asked for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from subquad.errors import ResumeError
from subquad.training.checkpoint import (
    MANIFEST,
    STATE,
    UNFINISHED,
    WEIGHTS,
    newest_checkpoint,
    remove_unfinished,
    write_checkpoint,
)


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((3, 2), value), "b": torch.arange(4.0)}


def write(folder: Path, step: int, keep: int = 3) -> Path:
    return write_checkpoint(folder, step, weights(float(step)), {"step": step, "rates": [1e-3]}, keep=keep)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.path, found.step) == (path, 7)
    for name, tensor in weights(7.0).items():
        assert torch.equal(found.weights()[name], tensor)
    assert found.trainer_state() == {"step": 7, "rates": [1e-3]}
    assert json.loads((path / MANIFEST).read_text())["format_version"] == 1


def test_a_tied_weight_is_stored_once_and_has_both_names(tmp_path: Path) -> None:
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    path = write_checkpoint(tmp_path, 1, model.state_dict(), {}, keep=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert set(found.weights()) == {"embedding.weight", "head.weight"}
    assert (path / WEIGHTS).stat().st_size < 2 * 4 * 15 + 100
    model.load_state_dict(found.weights())


def test_views_of_one_tensor_are_stored_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(4, 3)
    write_checkpoint(tmp_path, 1, {"upper": whole[:2], "lower": whole[2:], "turned": whole.T}, {}, keep=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert torch.equal(found.weights()["lower"], whole[2:])
    assert torch.equal(found.weights()["turned"], whole.T)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-100"]
    write(tmp_path, 101, keep=0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-101"], "the one just written always stays"


@pytest.mark.parametrize("file", [WEIGHTS, STATE, MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed", "empty"])
def test_a_damaged_checkpoint_is_passed_over_with_one_warning(tmp_path: Path, file: str, damage: str) -> None:
    write(tmp_path, 4)
    path = write(tmp_path, 8) / file
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "removed":
        path.unlink()
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"truncated": content[:middle], "flipped": flipped, "empty": b""}[damage])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 4
    assert len(caught) == 1
    assert "step-8 is damaged" in str(caught[0].message)
    assert "the one before it is used" in str(caught[0].message)


def test_no_whole_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    (write(tmp_path, 3) / WEIGHTS).unlink()
    with pytest.warns(UserWarning, match="damaged"):
        assert newest_checkpoint(tmp_path) is None


def test_a_half_written_folder_is_ignored_and_removed(tmp_path: Path) -> None:
    write(tmp_path, 4)
    unfinished = tmp_path / f"{UNFINISHED}step-8-123"
    unfinished.mkdir()
    (unfinished / WEIGHTS).write_bytes(b"half")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 4
    remove_unfinished(tmp_path)
    assert not unfinished.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]


def test_a_write_that_fails_leaves_the_others_and_no_new_name(tmp_path: Path) -> None:
    write(tmp_path, 4, keep=1)
    with pytest.raises(AttributeError, match="pickle"):
        write_checkpoint(tmp_path, 8, weights(8.0), {"no_plain_value": lambda: 0}, keep=1)
    assert not (tmp_path / "step-8").exists()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 4


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 4) / MANIFEST
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(ResumeError, match="version is 9"):
        newest_checkpoint(tmp_path)


class Stranger:
    """An object that a checkpoint must not bring to life."""


def test_trainer_state_brings_no_code_to_life(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 4, weights(1.0), {"callback": Stranger()}, keep=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    with pytest.raises(ResumeError, match="more than tensors"):
        found.trainer_state()
