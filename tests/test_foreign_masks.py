"""An attention mask is read for what it is, and one wrong entry makes it something else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subquad.compiler.foreign.masks import MaskKind, kind_of_mask, mask_kind
from subquad_kernels.softmax_attention.definition import visible

CPU = torch.device("cpu")


def added(seen: Tensor, lowest: float) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, lowest)


@given(t=st.integers(2, 12), earlier=st.integers(0, 5), window=st.integers(0, 6), causal=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_mask_of_the_operators_own_is_recognised(t: int, earlier: int, window: int, causal: bool) -> None:
    s = t + earlier
    window = window if causal and window < s else 0
    seen = visible(t, s, None, causal, window, CPU)
    for mask in (seen, added(seen, float("-inf")), added(seen, torch.finfo(torch.float32).min), seen[None, None]):
        assert mask_kind(mask, t, s) == MaskKind(causal=causal, window=window)


@given(t=st.integers(3, 9), window=st.sampled_from([0, 2, 3]), causal=st.booleans(), place=st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_one_wrong_entry_makes_a_mask_other(t: int, window: int, causal: bool, place: int) -> None:
    seen = visible(t, t, None, causal, window if causal and window < t else 0, CPU).clone()
    # Not the last row's last entry: nobody but the last query sees the last causal key; hidden from it, it is padding.
    row, column = divmod(place % (t * t - 1), t)
    seen[row, column] = ~seen[row, column]
    wrong = seen.expand(2, 1, t, t).clone()
    wrong[0] = visible(t, t, None, causal, window if causal and window < t else 0, CPU)
    kind = mask_kind(wrong, t, t)
    assert kind.other, f"flipping ({row}, {column}) was not noticed: {kind}"
    assert not kind.exact


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_named_and_is_not_exact(causal: bool, side: str) -> None:
    real = torch.ones(3, 8, dtype=torch.bool)
    real[1, :3], real[2, :1] = False, False
    if side == "right":
        real = real.flip(1)
    kind = mask_kind(visible(8, 8, None, causal, 0, CPU) & real[:, None, None, :], 8, 8)
    assert kind == MaskKind(causal=causal, padding=True)
    assert not kind.exact
    assert str(kind) == f"{'causal' if causal else 'full'}, padding"


def test_a_window_with_padding_is_never_taken_for_a_window() -> None:
    real = torch.ones(1, 9, dtype=torch.bool)
    real[0, :2] = False
    assert not mask_kind(visible(9, 9, None, True, 3, CPU) & real[:, None, None, :], 9, 9).exact


@pytest.mark.parametrize(
    ("mask", "word"),
    [
        (torch.randn(5, 5), "bias"),
        (torch.zeros(5, 5).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(-1e4)), "bias"),
        (torch.zeros(5, 5, requires_grad=True), "learned"),
        (torch.stack([torch.ones(5, 5), torch.ones(5, 5).tril()]).bool()[None], "heads"),
        (torch.ones(5, 5).triu().bool(), "pairs"),
        (torch.zeros(5, 5, dtype=torch.long), "bias"),
    ],
)
def test_what_is_not_understood_is_named(mask: Tensor, word: str) -> None:
    assert word in mask_kind(mask, 5, 5).other


def test_a_mask_is_read_again_after_it_changed() -> None:
    mask = torch.ones(6, 6).tril().bool()
    assert kind_of_mask(mask, 6, 6) == MaskKind(causal=True)
    mask[2, 5] = True
    assert kind_of_mask(mask, 6, 6).other
    mask.fill_(True)
    assert kind_of_mask(mask, 6, 6) == MaskKind()


def test_a_mask_that_died_leaves_nothing_to_another_at_its_place() -> None:
    for _ in range(50):
        assert kind_of_mask(torch.ones(4, 4).tril().bool(), 4, 4) == MaskKind(causal=True)
        assert kind_of_mask(torch.ones(4, 4).bool(), 4, 4) == MaskKind()
