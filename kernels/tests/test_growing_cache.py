"""Caches that grow in place are values: whatever else went on from one, it holds what it held."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from subquad_kernels.growing_cache import LEAST_ROOM, appended, latest


def tokens(t: int, start: int = 0) -> Tensor:
    """Numbered tokens of two sequences.  Shape: 2 t 3 2"""
    return torch.arange(start, start + t, dtype=torch.float64)[None, :, None, None].expand(2, t, 3, 2).clone()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_all_copies_together_are_at_most_five_times_what_is_held_in_the_end(mode: Any) -> None:
    with mode():
        cache, copied, steps = tokens(0), 0, 5000
        for step in range(steps):
            before = cache
            cache = appended(cache, tokens(1, step))
            copied += before.shape[1] * (cache.data_ptr() != before.data_ptr())
        assert torch.equal(cache, tokens(steps))
    assert copied < 5 * steps


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_caches_continued_in_any_order_hold_what_torch_cat_gives(mode: Any) -> None:
    draw = random.Random(0)
    with mode():
        caches = [(tokens(3), tokens(3))]
        for step in range(400):
            found, expected = draw.choice(caches[-6:])
            new = tokens(draw.choice((0, 1, 1, 1, 7)), 100 * step)
            found, expected = appended(found, new), torch.cat([expected, new], dim=1)
            if draw.random() < 0.2:
                count = draw.choice((1, 5, 40))
                found, expected = latest(found, count), expected[:, -count:]
            caches.append((found, expected))
            new.fill_(float("nan"))  # the caller's own memory
        for found, expected in caches:
            assert torch.equal(found, expected)


def test_the_second_continuation_of_a_cache_gets_memory_of_its_own() -> None:
    with torch.no_grad():
        cache = appended(tokens(4), tokens(1, 4))
        first, second = appended(cache, tokens(1, 50)), appended(cache, tokens(1, 60))
        third = appended(first, tokens(1, 51))
        assert first.data_ptr() == cache.data_ptr() == third.data_ptr() != second.data_ptr()
        assert torch.equal(third, torch.cat([tokens(5), tokens(2, 50)], dim=1))
        assert torch.equal(second, torch.cat([tokens(5), tokens(1, 60)], dim=1))


def test_a_copy_of_a_cache_does_not_write_behind_the_original() -> None:
    with torch.no_grad():
        cache = appended(tokens(4), tokens(1, 4))
        for twin in (copy.deepcopy(cache), cache[:, :], cache.clone(), cache.index_select(0, torch.tensor([1, 0]))):
            grown = appended(twin, tokens(1, 70))
            assert torch.equal(grown, torch.cat([tokens(5), tokens(1, 70)], dim=1))
        assert torch.equal(appended(cache, tokens(1, 5)), tokens(6))


def test_memory_of_inference_mode_is_left_alone_outside_of_it() -> None:
    with torch.inference_mode():
        cache = appended(tokens(4), tokens(1, 4))
    with torch.no_grad():
        outside = appended(cache, tokens(1, 5))
        assert outside.data_ptr() != cache.data_ptr()
        again = appended(outside, tokens(1, 6))
    assert again.data_ptr() == outside.data_ptr()
    with torch.inference_mode():
        assert torch.equal(appended(again, tokens(1, 7)), tokens(8))


def test_gradients_reach_both_parts_and_nothing_is_written_in_place() -> None:
    with torch.no_grad():
        cache = appended(tokens(4), tokens(1, 4))
    new = tokens(1, 5).requires_grad_()
    first, second = appended(cache, new), appended(cache, 2 * new)
    assert first.data_ptr() != cache.data_ptr()
    pull = torch.randn_like(first)
    (gradient,) = torch.autograd.grad((first * pull + second * pull).sum(), new)
    torch.testing.assert_close(gradient, 3 * pull[:, -1:])


def test_a_window_keeps_the_last_tokens_and_little_memory() -> None:
    with torch.no_grad():
        cache, copied = latest(appended(tokens(0), tokens(4000)), 100), 0
        assert torch.equal(cache, tokens(4000)[:, -100:])
        assert cache.untyped_storage().nbytes() <= (100 + LEAST_ROOM) * 2 * 3 * 2 * 8
        for step in range(4000, 5000):
            before = cache
            cache = latest(appended(cache, tokens(1, step)), 100)
            copied += 100 * (cache.untyped_storage().data_ptr() != before.untyped_storage().data_ptr())
        assert torch.equal(cache, tokens(5000)[:, -100:])
        assert cache.untyped_storage().nbytes() <= 2 * (100 + LEAST_ROOM) * 2 * 3 * 2 * 8
    assert copied < 5 * 1000


@pytest.mark.parametrize("wrong", [(1, 1, 3, 2), (2, 1, 1, 2), (2, 1, 3, 4)])
def test_what_does_not_fit_is_refused_as_torch_cat_does(wrong: tuple[int, ...]) -> None:
    with torch.no_grad():
        cache = appended(tokens(4), tokens(1))
        with pytest.raises(RuntimeError):
            appended(cache, torch.zeros(wrong, dtype=torch.float64))
        assert appended(cache, tokens(1).float()).dtype == torch.float64


def test_each_is_one_node_of_a_graph_which_goes_on_in_place() -> None:
    class Appends(torch.nn.Module):
        def forward(self, cache: Tensor, new: Tensor) -> Tensor:
            return latest(appended(cache, new), 3)

    graph = fx.symbolic_trace(Appends())
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [appended, latest]
    with torch.no_grad():
        cache = graph(tokens(4), tokens(1, 4))
        after = graph(cache, tokens(1, 5))
    assert torch.equal(after, tokens(3, 3))
    assert after.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()


def test_shapes_alone_are_enough_on_the_meta_device() -> None:
    with torch.no_grad():
        cache = appended(tokens(4).to("meta"), tokens(2).to("meta"))
        assert (cache.shape, latest(cache, 3).shape) == ((2, 6, 3, 2), (2, 3, 3, 2))
