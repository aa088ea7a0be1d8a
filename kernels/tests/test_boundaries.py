"""What is made of boundaries is made once for those who share them, and anew when they change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from subquad_kernels import boundaries
from subquad_kernels.boundaries import bounds_of, fixed_boundaries, layout_of
from subquad_kernels.documents import document_groups


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kept on the CPU, too, for as long as a test takes."""
    monkeypatch.setattr(boundaries, "_WAITED_FOR", {"cpu", "cuda"})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    boundaries._known.clear()
    yield
    boundaries._known.clear()


def seqlens(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def test_layers_that_share_boundaries_share_what_is_made_of_them() -> None:
    shared = seqlens(0, 3, 3, 10)
    assert document_groups(shared) is document_groups(shared.view(-1))
    assert document_groups(shared)[0].runs(2) is document_groups(shared)[0].runs(2)


def test_each_question_has_its_own_answer() -> None:
    def make(bounds: tuple[int, ...], device: torch.device, times: int) -> list[int]:
        return [times * bound for bound in bounds]

    shared = seqlens(0, 2)
    assert (layout_of(make, shared, 2), layout_of(make, shared, 3)) == ([0, 4], [0, 6])


def test_boundaries_that_changed_are_asked_again() -> None:
    changed = seqlens(0, 3, 10)
    assert bounds_of(changed) == (0, 3, 10)
    changed[1] = 7
    assert bounds_of(changed) == (0, 7, 10)
    assert [group.lengths for group in document_groups(changed)] == [(3,), (7,)]


def test_another_tensor_with_the_memory_of_one_that_is_gone_is_not_taken_for_it() -> None:
    for stop in range(1, 40):
        assert bounds_of(seqlens(0, stop)) == (0, stop)
    gone = seqlens(0, 50)
    place = gone.data_ptr()
    bounds_of(gone)
    del gone
    assert boundaries._known[-1].boundaries.data_ptr() == place, "it is held"


def test_parts_of_one_tensor_are_told_apart() -> None:
    whole = seqlens(0, 3, 10, 12)
    assert bounds_of(whole[:2]) == (0, 3)
    assert bounds_of(whole[::2]) == (0, 10)
    assert bounds_of(whole[:3]) == (0, 3, 10)


def test_a_few_boundaries_are_remembered() -> None:
    held = [seqlens(0, stop) for stop in range(1, 10)]
    made = [document_groups(one) for one in held]
    assert len(boundaries._known) == 4
    assert document_groups(held[-1]) is made[-1]
    assert document_groups(held[0]) is not made[0]


def test_what_is_made_in_inference_serves_gradients_later() -> None:
    shared, x = seqlens(0, 3, 10), torch.ones(1, 10, 2, requires_grad=True)
    with torch.inference_mode():
        groups = document_groups(shared)
        groups[0].runs(2)
    assert document_groups(shared) is groups
    padded = torch.zeros(1, 10, 2)
    for group in groups:
        group.write(padded, 2 * group.pad(x))
    padded.sum().backward()
    assert x.grad is not None and bool((x.grad == 2).all())
    slots, places = groups[0].runs(2)[0]
    assert not slots.is_inference() and not places.is_inference()


def test_boundaries_of_inference_say_nothing_of_changes_and_are_always_asked() -> None:
    with torch.inference_mode():
        shared = seqlens(0, 3, 10)
        assert bounds_of(shared) == (0, 3, 10)
        shared[1] = 7
        assert bounds_of(shared) == (0, 7, 10)
    assert not boundaries._known


def test_a_graph_would_repeat_them_for_others_and_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = seqlens(0, 3, 10)
    bounds_of(known)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"CUDA graph .* packed documents"):
        document_groups(known)
    with fixed_boundaries():
        assert len(document_groups(known)) == 2
    with pytest.raises(RuntimeError, match="CUDA graph"):
        bounds_of(known)


def test_runs_are_the_real_rows_of_their_columns() -> None:
    (group,) = document_groups(seqlens(0, 5, 13, 20))
    padded = group.pad(torch.arange(20.0)[None, :, None])
    for number, (slots, places) in enumerate(group.runs(3)):
        columns = padded[:, 3 * number : 3 * number + 3]
        assert columns.flatten(0, 1)[slots][:, 0].tolist() == places.tolist()
    assert sorted(torch.cat([places for _, places in group.runs(3)]).tolist()) == list(range(20))


def test_on_a_cpu_nobody_waits_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundaries, "_WAITED_FOR", {"cuda"})
    shared = seqlens(0, 3, 10)
    assert document_groups(shared) is not document_groups(shared)
    assert not boundaries._known
