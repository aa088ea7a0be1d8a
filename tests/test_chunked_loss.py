"""A loss without the logits of all tokens: the whole loss and its gradients, in the memory that is predicted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subquad.compiler.example import Example
from subquad.compiler.loss_memory import loss_bytes
from subquad.model import chunked_cross_entropy as module
from subquad.model.build import build_model
from subquad.model.chunked_cross_entropy import chunked_cross_entropy
from subquad.schema import ModelConfig, RunConfig
from subquad.training.fit import train
from subquad.training.metrics import read_metrics

TinyRun = Callable[..., RunConfig]
IGNORED = -100


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens of a vocabulary of 50."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", 5 * 50)


def drawn(tokens: int, dtype: torch.dtype, vocab: int = 50, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(1, tokens, width, generator=draw, dtype=dtype).requires_grad_()
    head = torch.randn(vocab, width, generator=draw, dtype=dtype).requires_grad_()
    targets = torch.randint(vocab, (1, tokens), generator=draw)
    return hidden, head, targets.masked_fill(torch.rand(1, tokens, generator=draw) < 0.3, IGNORED)


def whole(hidden: Tensor, head: Tensor, targets: Tensor, cap: float = 0.0) -> Tensor:
    """The loss as it is defined, at the precision of its arguments."""
    logits = hidden @ head.T
    logits = cap * torch.tanh(logits / cap) if cap else logits
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("tokens", [1, 4, 5, 13])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_loss_and_gradients_are_those_of_whole_logits(tokens: int, cap: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        hidden, head, targets = drawn(tokens, dtype)
        ours = chunked_cross_entropy(hidden, head, targets, logit_cap=cap)
        theirs = whole(hidden, head, targets, cap)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        scaled = [torch.autograd.grad(loss / 7, (hidden, head)) for loss in (ours, theirs)]
        torch.testing.assert_close(*scaled, rtol=tolerance, atol=tolerance)


def test_the_gradient_is_that_of_differences() -> None:
    hidden, head, targets = drawn(7, torch.float64, vocab=6, width=3)
    assert torch.autograd.gradcheck(lambda x, w: chunked_cross_entropy(x, w, targets, logit_cap=2.0), (hidden, head))


def test_no_target_at_all_is_no_loss_and_no_gradient() -> None:
    hidden, head, targets = drawn(7, torch.float32)
    loss = chunked_cross_entropy(hidden, head, torch.full_like(targets, IGNORED))
    assert loss == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, (hidden, head)))


def test_only_what_needs_a_gradient_has_one_and_a_second_backward_gives_it_again() -> None:
    hidden, head, targets = drawn(9, torch.float64)
    loss = chunked_cross_entropy(hidden.detach(), head, targets)
    once, again = (torch.autograd.grad(loss, head, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    torch.testing.assert_close(once, torch.autograd.grad(whole(hidden, head, targets), head)[0])
    assert not chunked_cross_entropy(hidden.detach(), head.detach(), targets).requires_grad


def test_under_autocast_products_are_bfloat16_and_the_rest_is_float32() -> None:
    """Off the float64 gradient by no more than twice what whole logits under autocast are off."""
    hidden, head, targets = drawn(40, torch.float32)
    exact = torch.autograd.grad(whole(hidden.double(), head.double(), targets), (hidden, head))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = chunked_cross_entropy(hidden, head, targets)
        logits = F.linear(hidden, head)
        theirs = F.cross_entropy(logits[0].float(), targets[0], ignore_index=IGNORED, reduction="sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # of the same rounded logits
    for mine, whole_one, truth in zip(*(torch.autograd.grad(loss, (hidden, head)) for loss in (ours, theirs)), exact):
        assert mine.dtype == torch.float32
        assert (mine - truth).norm() <= 2 * (whole_one - truth).norm()
        assert (mine - truth).norm() < 0.01 * truth.norm()


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch has none of its own")
def test_torch_has_the_same_loss() -> None:
    """`torch.nn.functional.linear_cross_entropy`, from torch 2.13 on, in chunks of its own."""
    hidden, head, targets = drawn(13, torch.float64)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    theirs = F.linear_cross_entropy(hidden[0], head, targets[0], reduction="sum", options=options)
    ours = chunked_cross_entropy(hidden, head, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(loss, (hidden, head)) for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class _Alive(TorchDispatchMode):
    """The most bytes that calls of aten have made and that live at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in before | self._seen:
                    self._seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_what_stands_at_a_time_is_what_is_predicted(cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, width, tokens = 3000, 8, 640
    monkeypatch.setattr(module, "CHUNK_LOGITS", 64 * vocab)
    hidden, head, targets = drawn(tokens, torch.float32, vocab, width)
    example = Example(tokens_shape=(1, tokens), training=True)
    model = ModelConfig(d_model=width, vocab_size=vocab, logit_cap=cap)
    peaks = {}
    for chunked in (True, False):
        with _Alive() as alive:
            loss = chunked_cross_entropy(hidden, head, targets, logit_cap=cap) if chunked else whole(
                hidden, head, targets, cap
            )
            torch.autograd.grad(loss, (hidden, head))
        peaks[chunked] = alive.peak
    predicted = loss_bytes(model, example, chunked=True)
    assert predicted == pytest.approx(peaks[True], rel=0.1)
    assert peaks[False] > 5 * peaks[True]


def test_a_model_given_targets_returns_their_loss_also_compiled() -> None:
    torch.manual_seed(0)
    for tied, compiles in ((True, False), (False, True)):
        config = ModelConfig(
            d_model=16, num_layers=1, vocab_size=50, context_len=8, tie_embeddings=tied, logit_cap=5.0,
            mixers={"softmax_attention": {"mixer": "softmax_attention", "num_heads": 2}},
        )  # fmt: skip
        model = build_model(config).double()
        tokens, targets = torch.randint(50, (2, 8)), drawn(16, torch.float64)[2].reshape(2, 8)
        bounds = torch.tensor([0, 5, 8, 16], dtype=torch.int32)
        runs = [model, torch.compile(model, backend="eager")] if compiles else [model]
        for cu_seqlens in (None, bounds):
            logits = model(tokens, cu_seqlens)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
            expected = torch.autograd.grad(loss, list(model.parameters()))
            for called in runs:
                ours = called(tokens, cu_seqlens, targets)
                torch.testing.assert_close(ours, loss)
                gradients = torch.autograd.grad(ours, list(model.parameters()))
                torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)


def test_a_run_takes_the_same_steps(tiny_run: TinyRun) -> None:
    """Packed text, whose documents' last tokens have no target."""
    runs = {
        loss: train(tiny_run(loss, max_steps=4, log_every_n_steps=1, loss=loss, accumulate=2))
        for loss in ("whole", "chunked")
    }
    left, right = (read_metrics(result.run_dir / "metrics.csv") for result in runs.values())
    for one, other in zip(left, right, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
    assert runs["chunked"].validation_loss == pytest.approx(runs["whole"].validation_loss, rel=1e-5)
    assert runs["chunked"].validation_loss != runs["whole"].validation_loss, "another order of sums"
