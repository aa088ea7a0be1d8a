"""A decoder gives what decode gives, whatever is replayed; what cannot be replayed runs as it is, and is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoding_models import model_of, taped
from torch import Tensor
from torch.utils._pytree import tree_leaves

from subquad.contracts import Growth
from subquad.model.cuda_graph import cuda_graphs
from subquad.model.decoder import Capture, Decoder
from subquad.model.language_model import LanguageModel, ModelCarry
from subquad.model.model_carry import carry_bytes, joinable, joined, selected
from subquad.registry import load_registry

ALL = sorted(name for name, spec in load_registry().mixers.items() if spec.causal)
IN_PLACE = ("softmax_attention", "window", "segment_attention")
"""Mixers whose carry grows or counts, and which decode in place."""
ROUNDING = {"cpu": 1e-12, "cuda": 1e-4}
"""Of logits of a few units, where other kernels add up: in float64 on a CPU, in float32 on a GPU."""
CAPTURES: list[Any] = [
    pytest.param((taped, "cpu", torch.float64), id="cpu"),
    pytest.param((None, "cuda", torch.float32), id="cuda", marks=pytest.mark.gpu),
]
"""What takes work down, where, and in which type; None: CUDA graphs."""


def prefilled(model: LanguageModel, batch: int = 3, tokens: int = 5) -> tuple[Tensor, ModelCarry]:
    """Tokens to decode behind a prompt, and the prompt's carry.  Shape: steps batch"""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(16, (tokens + 20, batch), generator=generator).to(model.embedding.weight.device)
    with torch.inference_mode():
        return drawn[tokens:], model.prefill(drawn[:tokens].T, model.empty_carry(batch))[1]


def setting(found: tuple[Capture | None, str, torch.dtype]) -> tuple[Capture, str, torch.dtype]:
    capture, device, dtype = found
    if capture is None:
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        capture = cuda_graphs(torch.device(device))
        assert capture is not None
    return capture, device, dtype


def not_in_place(model: LanguageModel) -> LanguageModel:
    """The model of mixers that do not offer to decode in place, as a stranger's may not."""
    for block in model.blocks:
        mixer: Any = block.mixer
        mixer.__class__ = type("NotInPlace", (type(mixer),), {"decode_in_place": None})
    return model


def replayed(decoder: Decoder) -> str:
    """Its graphs, the layers of each in order; channel mixers have a c behind."""
    return " | ".join(
        " ".join(f"{part.layer}{'' if part.mixes_tokens else 'c'}" for part in run) for run in decoder.graphs
    )


def assert_decodes_alike(model: LanguageModel, capture: Capture, *, atol: float = 0.0) -> Decoder:
    """Twenty steps, between which a sequence of the batch ends."""
    tokens, carry = prefilled(model)
    given = [leaf.clone() for leaf in tree_leaves(carry) if isinstance(leaf, Tensor)]
    decoder, expected_carry = Decoder(model, carry, capture=capture), carry
    first = decoder
    for step, token in enumerate(tokens):
        if step == 10:
            going = torch.tensor([0, 2], device=token.device)
            decoder = Decoder(model, selected(decoder.carry, going), capture=capture)
            expected_carry = selected(expected_carry, going)
        if step >= 10:
            token = token[[0, 2]]
        logits = decoder.step(token)
        with torch.inference_mode():
            expected, expected_carry = model.decode(token, expected_carry)
        torch.testing.assert_close(logits, expected, rtol=0, atol=atol)
        assert carry_bytes(model, decoder.carry) == carry_bytes(model, expected_carry)
        for found, wanted in zip(tree_leaves(decoder.carry), tree_leaves(expected_carry), strict=True):
            if isinstance(found, Tensor):
                torch.testing.assert_close(found, wanted, rtol=0, atol=atol)
            else:
                assert found == wanted
    for leaf, before in zip((x for x in tree_leaves(carry) if isinstance(x, Tensor)), given, strict=True):
        assert torch.equal(leaf, before), "the carry that the decoder was given was written to"
    assert first.graphs == decoder.graphs
    return decoder


@pytest.mark.parametrize("where", CAPTURES)
@pytest.mark.parametrize("name", ALL)
def test_every_mixer_decodes_as_without_replays(name: str, where: tuple[Capture | None, str, torch.dtype]) -> None:
    capture, device, dtype = setting(where)
    model = model_of(name, name, dtype=dtype, device=device)
    decoder = assert_decodes_alike(model, capture, atol=ROUNDING[device])
    _, carry = prefilled(model)
    constant = load_registry().mixer(name).carry_growth == Growth.CONSTANT
    counts = any(not isinstance(leaf, Tensor) for leaf in tree_leaves(carry))
    alike = (constant and not counts) or name in IN_PLACE
    assert replayed(decoder) == ("0 0c 1 1c" if alike else "0c | 1c"), decoder.why_not
    assert list(decoder.why_not) == ([] if alike else [0, 1])


@pytest.mark.parametrize("where", CAPTURES)
@pytest.mark.parametrize(
    ("mixers", "graphs"),
    [
        (("mamba", "mamba", "softmax_attention", "mamba"), "0 0c 1 1c | 2c 3 3c"),
        (("window", "mamba", "segment_attention"), "0c 1 1c | 2c"),
        (("softmax_attention", "mamba", "gated_delta_net", "mamba2"), "0c 1 1c 2 2c 3 3c"),
        (("softmax_attention", "softmax_attention"), "0c | 1c"),
    ],
    ids=str,
)
def test_runs_of_constant_parts_are_replayed_around_the_others(
    mixers: tuple[str, ...], graphs: str, where: tuple[Capture | None, str, torch.dtype]
) -> None:
    capture, device, dtype = setting(where)
    model = not_in_place(model_of(*mixers, dtype=dtype, device=device))
    decoder = assert_decodes_alike(model, capture, atol=0.0 if device == "cpu" else 1e-4)
    assert replayed(decoder) == graphs
    assert list(decoder.why_not) == [layer for layer, mixer in enumerate(mixers) if mixer in IN_PLACE]


@torch.inference_mode()
def test_without_channel_mixers_nothing_but_mixers_is_replayed() -> None:
    model = model_of("softmax_attention", "mamba", "mamba", "softmax_attention", channel_mixers=False)
    assert replayed(assert_decodes_alike(not_in_place(model), taped)) == "1 2"


@pytest.mark.parametrize("where", CAPTURES)
@pytest.mark.parametrize(
    ("shared", "schedule", "graphs"),
    [
        ("value residual", ("rwkv7",) * 3, "0 0c 1 1c 2 2c"),
        ("shared keys", ("publisher", "mamba", "reader", "mamba"), "0c 1 1c | 2c 3 3c"),
    ],
    ids=["value residual", "shared keys"],
)
def test_what_layers_share_goes_in_and_out_of_replays(
    shared: str, schedule: tuple[str, ...], graphs: str,
    where: tuple[Capture | None, str, torch.dtype],
) -> None:  # fmt: skip
    capture, device, dtype = setting(where)
    model = model_of(*schedule, shared=shared, dtype=dtype, device=device)
    assert replayed(assert_decodes_alike(model, capture, atol=0.0 if device == "cpu" else 1e-4)) == graphs


def test_a_run_reads_what_an_earlier_run_publishes() -> None:
    """The first value of RWKV-7 goes from one replay to the next, past a layer that is not replayed."""
    model = model_of("rwkv7", "rwkv7", "rwkv7", shared="value residual")
    model.blocks[1].mixer.__dict__["decode"] = counting(model.blocks[1].mixer.decode)  # type: ignore[union-attr]
    tokens, carry = prefilled(model)
    carry = (carry[0], (carry[1], 0), carry[2])  # type: ignore[assignment]
    assert replayed(decoded_exactly(model, tokens, carry)) == "0 0c | 1c 2 2c"


def decoded_exactly(model: LanguageModel, tokens: Tensor, carry: ModelCarry) -> Decoder:
    """Decode on a CPU, bit for bit as the model does."""
    decoder, expected = Decoder(model, carry, capture=taped), carry
    for token in tokens:
        logits = decoder.step(token)
        with torch.inference_mode():
            wanted, expected = model.decode(token, expected)
        assert torch.equal(logits, wanted)
    return decoder


def counting(decode: Callable[..., Any]) -> Callable[..., Any]:
    """A mixer's decode with the number of tokens in its carry."""

    def counted(x_t: Tensor, carry: Any, *shared: Any) -> Any:
        y_t, after, *rest = decode(x_t, carry[0], *shared)
        return y_t, (after, carry[1] + 1), *rest

    return counted


def test_replayed_carries_stay_where_they_are_and_join_and_part() -> None:
    model = model_of("mamba", "gated_delta_net")
    tokens, carry = prefilled(model)
    decoder = Decoder(model, carry, capture=taped)
    for token in tokens[:3]:
        decoder.step(token)
    kept = decoder.carry
    addresses = [leaf.data_ptr() for leaf in tree_leaves(kept)]
    part, copies = selected(kept, torch.tensor([1])), joined([kept, kept])
    assert joinable(kept, carry)
    before = [leaf.clone() for leaf in (*tree_leaves(part), *tree_leaves(copies))]
    logits = decoder.step(tokens[3])
    again = decoder.step(tokens[4])
    assert [leaf.data_ptr() for leaf in tree_leaves(decoder.carry)] == addresses
    assert all(map(torch.equal, (*tree_leaves(part), *tree_leaves(copies)), before))
    assert not torch.equal(logits, again), "logits of one step are those of the next"


def test_a_carry_whose_parts_move_on_is_read_before_it_is_overwritten() -> None:
    model = model_of("mamba", "mamba")
    for block in model.blocks:
        mixer: Any = block.mixer
        mixer.__dict__["decode"] = delayed(mixer.decode)
    tokens, carry = prefilled(model)
    zero = torch.zeros(3, 32, dtype=torch.float64)
    carry = tuple((one, zero, zero, zero) for one in carry)  # type: ignore[assignment]
    assert replayed(decoded_exactly(model, tokens, carry)) == "0 0c 1 1c"


def delayed(decode: Callable[..., Any]) -> Callable[..., Any]:
    """A mixer's decode, with its input of three steps before added."""

    def later(x_t: Tensor, carry: Any) -> Any:
        own, first, second, third = carry
        y_t, own = decode(x_t, own)
        return y_t + third, (own, x_t, first, second)

    return later


class ReadsTheHost:
    """Work that is not the same in every step, behind the face of a mixer whose carry does not grow."""

    def __init__(self, decode: Callable[..., Any], reads: Callable[[Tensor], float]) -> None:
        self._decode, self._reads = decode, reads

    def __call__(self, x_t: Tensor, carry: Any) -> Any:
        y_t, after = self._decode(x_t, carry)
        return y_t * (1 + self._reads(x_t)), after


def test_a_replay_that_differs_from_the_step_is_not_used_and_said_so() -> None:
    model = model_of("mamba", "softmax_attention", "mamba")
    mixer: Any = model.blocks[2].mixer
    # Past torch, which would notice: nothing in the work tells that it is another one each time.
    mixer.__dict__["decode"] = ReadsTheHost(mixer.decode, lambda x: float(x.numpy()[0, 0]))
    with pytest.warns(UserWarning, match=r"layers 1 to 2 \(mamba\) are decoded without a graph: a replay differs"):
        decoder = assert_decodes_alike(model, taped, atol=ROUNDING["cpu"])
    assert replayed(decoder) == "0 0c | 1"
    assert list(decoder.why_not) == [2]
    assert "differs" in decoder.why_not[2]


def test_what_cannot_be_taken_down_runs_as_it_is_and_says_why() -> None:
    model = model_of("mamba", "gated_delta_net", "softmax_attention", "mamba")
    mixer: Any = model.blocks[0].mixer
    mixer.__dict__["decode"] = ReadsTheHost(mixer.decode, lambda x: float(x[0, 0]))
    said = (
        r"layers 0 to 1 \(gated_delta_net, mamba\) are decoded without a graph: RuntimeError: .* waits for the device"
    )
    with pytest.warns(UserWarning, match=said):
        decoder = assert_decodes_alike(model, taped, atol=ROUNDING["cpu"])
    assert replayed(decoder) == "2 | 2c 3 3c"
    assert list(decoder.why_not) == [0, 1]
    assert decoder.why_not[0] == decoder.why_not[1]


def test_without_a_capture_every_step_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = model_of("mamba"), []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda *arguments: calls.append(1) or decode(*arguments))
    tokens, carry = prefilled(model)
    decoder = Decoder(model, carry, capture=cuda_graphs(torch.device("cpu")))
    for token in tokens[:4]:
        decoder.step(token)
    assert (len(calls), decoder.graphs, decoder.why_not) == (4, (), {})


def test_another_batch_and_autocast_are_refused() -> None:
    model = model_of("mamba", dtype=torch.float32)
    tokens, carry = prefilled(model)
    decoder = Decoder(model, carry, capture=taped)
    for token in tokens[:3]:
        decoder.step(token)
    with pytest.raises(ValueError, match=r"\(1,\) tokens for a decoder of \(3,\)"):
        decoder.step(tokens[3][:1])
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        decoder.step(tokens[3])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_what_waits_for_the_device_runs_as_it_is_and_the_rest_goes_on(dtype: torch.dtype) -> None:
    """A capture that fails leaves the device and the stream usable, and later captures too."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = model_of("mamba", "softmax_attention", "mamba2", dtype=dtype, device="cuda")
    mixer: Any = model.blocks[0].mixer
    mixer.__dict__["decode"] = ReadsTheHost(mixer.decode, lambda x: float(x[0, 0]))
    stream, capture = torch.cuda.current_stream(), cuda_graphs(torch.device("cuda"))
    assert capture is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoder = assert_decodes_alike(model, capture, atol=1e-4 if dtype == torch.float32 else 0.05)
    assert torch.cuda.current_stream() == stream
    assert torch.rand(3, device="cuda").isfinite().all(), "random numbers are refused"
    assert replayed(decoder) == "1 | 1c 2 2c"
    assert "Error" in decoder.why_not[0]
