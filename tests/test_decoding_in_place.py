"""Mixers whose caches grow decode in memory with room, as they do without it, also when the room is used up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from decoding_models import model_of, taped
from torch import Tensor
from torch.utils._pytree import tree_leaves

from subquad import load_config
from subquad.model import decoder as module
from subquad.model.cuda_graph import cuda_graphs
from subquad.model.decoder import Capture, Decoder
from subquad.model.language_model import LanguageModel, ModelCarry
from subquad.model.narrow import narrow
from subquad.training.compilation import compile_for_generation

MODELS = {
    "transformer": ("softmax_attention", "softmax_attention"),
    "scout_swa": ("window", "segment_attention"),
    "scout_mamba": ("mamba", "segment_attention"),
    "all": ("mamba", "softmax_attention", "window", "segment_attention", "gated_delta_net"),
}
ATOL = {torch.float64: 1e-11, torch.float32: 1e-4}
"""Of logits up to 7: sums in another order, and what some ten random maps make of them."""


def eagerly(work: Callable[[], None]) -> Callable[[], None]:
    """Nothing is taken down: the work is done every time."""
    return work


@pytest.fixture(autouse=True)
def little_room_of_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Room for four tokens at first, and fresh memory, which it is made of, is NaN."""
    monkeypatch.setattr(module, "ROOM", 4)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def drawn(batch: int, tokens: int, device: str = "cpu") -> Tensor:
    return torch.randint(16, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(device)


def decoded(
    model: LanguageModel, tokens: Tensor, begun: int, capture: Capture | None = eagerly
) -> tuple[Tensor, Decoder]:
    """Logits of the tokens from `begun` on, each decoded.  Shapes:  tokens: b t  ->  b (t - begun) vocab"""
    carry: ModelCarry = model.empty_carry(tokens.shape[0])
    with torch.inference_mode():
        if begun:
            carry = model.prefill(tokens[:, :begun], carry)[1]
        decoder = Decoder(model, carry, capture=capture)
        return torch.stack([decoder.step(token) for token in tokens[:, begun:].T], dim=1), decoder


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "begun"), [(1, 1), (1, 6), (3, 2), (3, 7)])
@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_decode_equal_the_forward_past_the_room(
    name: str, batch: int, begun: int, dtype: torch.dtype
) -> None:
    """Room for 4, 8 and 16 tokens is used up on the way; windows of four turn over."""
    model = narrow(model_of(*MODELS[name], dtype=torch.float32), dtype)
    tokens = drawn(batch, begun + 33)
    logits, decoder = decoded(model, tokens, begun)
    with torch.inference_mode():
        expected = model(tokens)[:, begun:]
    assert (len(decoder.graphs), decoder.why_not) == (1, {})
    torch.testing.assert_close(logits, expected, rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize(("batch", "begun"), [(1, 0), (3, 7)])
@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16_it_is_as_near_to_float32_as_ordinary_steps(name: str, batch: int, begun: int) -> None:
    exact, tokens = model_of(*MODELS[name], dtype=torch.float32), drawn(batch, begun + 33)
    model = narrow(model_of(*MODELS[name], dtype=torch.float32), torch.bfloat16)
    with torch.inference_mode():
        expected = exact(tokens)[:, begun:]
    (found, decoder), (ordinary, _) = (decoded(model, tokens, begun, capture) for capture in (eagerly, None))
    assert (len(decoder.graphs), decoder.why_not) == (1, {})
    distance, usual = (float((logits - expected).abs().mean()) for logits in (found, ordinary))
    assert distance < 1.2 * usual < 0.1


@pytest.mark.parametrize("capture", [eagerly, taped])
@pytest.mark.parametrize("name", MODELS)
def test_carries_are_those_of_ordinary_steps_and_go_on_anywhere(name: str, capture: Capture) -> None:
    model, tokens = model_of(*MODELS[name]), drawn(3, 40)
    for steps in (2, 5, 6, 7, 20):  # taken down; full; laid out anew, and the step before and after; later
        _, decoder = decoded(model, tokens[:, : 5 + steps], 5, capture)
        _, ordinary = decoded(model, tokens[:, : 5 + steps], 5, None)
        found, expected = tree_leaves(decoder.carry), tree_leaves(ordinary.carry)
        for one, other in zip(found, expected, strict=True):
            if isinstance(one, Tensor):
                torch.testing.assert_close(one, other, rtol=0, atol=ATOL[torch.float64])
            else:
                assert one == other
        with torch.inference_mode():
            given = decoder.carry
            rest, _ = model.prefill(tokens[:, 5 + steps :], given)
            expected_logits = model(tokens)
            torch.testing.assert_close(rest, expected_logits[:, 5 + steps :], rtol=0, atol=ATOL[torch.float64])
            # What went on from the carry has written nothing that the decoder reads.
            logits = decoder.step(tokens[:, 5 + steps])
            torch.testing.assert_close(logits, expected_logits[:, 5 + steps], rtol=0, atol=ATOL[torch.float64])


def test_what_is_taken_down_anew_is_in_proportion_to_what_is_decoded() -> None:
    captures = list[int]()

    def counted(work: Callable[[], None]) -> Callable[[], None]:
        captures.append(1)
        return work

    decoded(model_of("softmax_attention"), drawn(1, 2 + 4 * (2**6 - 1)), 1, counted)
    assert len(captures) == 6  # one token is watched, then there is room for 4, 8, ... 128


class Faulty:
    """`decode_in_place` of a mixer, changed."""

    def __init__(self, mixer: Any, change: Callable[..., Any]) -> None:
        self._decode, self._change = mixer.decode_in_place, change

    def __call__(self, x_t: Tensor, carry: Any) -> Any:
        y_t, after = self._decode(x_t, carry)
        return self._change(x_t, y_t, after)


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "values": (lambda x_t, y_t, after: (1.001 * y_t, after), "a replay differs from the step by"),
    "position": (lambda x_t, y_t, after: (y_t, after._replace(position=after.position + 1)), "another carry"),
    "host": (lambda x_t, y_t, after: (y_t * float(x_t[0, 0]), after), "waits for the device"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mixer_at_fault_grows_as_ever_and_is_named_and_the_others_are_replayed(fault: str) -> None:
    change, said = FAULTS[fault]
    model, tokens = model_of("mamba", "softmax_attention", "segment_attention", "mamba"), drawn(2, 30)
    mixer: Any = model.blocks[1].mixer
    mixer.__dict__["decode_in_place"] = Faulty(mixer, change)
    with pytest.warns(UserWarning, match=rf"layers 1 to 1 \(softmax_attention\) are decoded without a graph: .*{said}"):
        logits, decoder = decoded(model, tokens, 3, taped)
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(tokens)[:, 3:], rtol=0, atol=ATOL[torch.float64])
    assert list(decoder.why_not) == [1]
    assert [[part.layer for part in parts if part.mixes_tokens] for parts in decoder.graphs] == [[0], [], [2], [3]]


@pytest.mark.parametrize("most", [4, 8, 1000])
def test_without_memory_for_a_copy_caches_grow_as_ever(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At first, or later, when all is to be laid out with more room."""
    model, tokens = model_of("mamba", "softmax_attention"), drawn(2, 40)
    mixer: Any = model.blocks[1].mixer
    given = mixer.with_room

    def with_room(carry: Any, room: int) -> Any:
        if room >= most:
            raise torch.OutOfMemoryError("no")
        return given(carry, room)

    mixer.__dict__["with_room"] = with_room
    if most == 4:
        with pytest.warns(UserWarning, match="there is no memory for another copy of its cache"):
            logits, decoder = decoded(model, tokens, 3)
    else:
        logits, decoder = decoded(model, tokens, 3)
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(tokens)[:, 3:], rtol=0, atol=ATOL[torch.float64])
    assert list(decoder.why_not) == ([] if most == 1000 else [1])
    assert len(decoder.graphs) == (1 if most == 1000 else 2)


@pytest.mark.parametrize("name", MODELS)
def test_by_graphs_and_chosen_kernels_it_is_the_same(name: str) -> None:
    run = ("model=transformer", "model.context_len=32", "trainer.accelerator=cpu", "compiler=constant")
    plain, model = model_of(*MODELS[name]), model_of(*MODELS[name])
    compile_for_generation(model, load_config([*run]), batch_size=3)
    tokens = drawn(3, 40)
    logits, decoder = decoded(model, tokens, 7, taped)
    assert (len(decoder.graphs), decoder.why_not) == (1, {})
    with torch.inference_mode():
        torch.testing.assert_close(logits, plain(tokens)[:, 7:], rtol=0, atol=ATOL[torch.float64])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "begun"), [(1, 0), (3, 7)])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_on_a_gpu_decode_as_the_forward_past_the_room(
    name: str, batch: int, begun: int, dtype: torch.dtype
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    exact = model_of(*MODELS[name], dtype=torch.float32, device="cuda")
    model = narrow(model_of(*MODELS[name], dtype=torch.float32, device="cuda"), dtype)
    tokens = drawn(batch, begun + 100, "cuda")
    logits, decoder = decoded(model, tokens, begun, cuda_graphs(torch.device("cuda")))
    with torch.inference_mode():
        expected = exact(tokens)[:, begun:]
    assert (len(decoder.graphs), decoder.why_not) == (1, {})
    usual, ordinary = decoded(model, tokens, begun, None)
    if dtype == torch.float32:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
    else:  # as near to float32 as ordinary steps
        assert (logits - expected).abs().float().mean() < 1.5 * (usual - expected).abs().float().mean() + 0.01
    for one, other in zip(tree_leaves(decoder.carry), tree_leaves(ordinary.carry), strict=True):
        assert not isinstance(one, Tensor) or one.shape == other.shape
