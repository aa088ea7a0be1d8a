"""A batch that is decoded token by token; what the device does alike in every step is taken down once, and replayed.

A step of a model launches hundreds of small kernels, each from Python, and waits for the host. Blocks whose carry is of
constant size ask for the same work every time: consecutive ones become a `Capture` (a CUDA graph) that reads and writes
fixed memory, with the embedding before the first block and the head behind the last. Blocks with a cache that grows, or
with a position, run as they are between them. Which those are, a step shows: it is the carry that tells, not a name.

The first step runs as it is and is watched. In the second, work is taken down, on other values than the step's, and
replayed on the step's beside the step itself: what does not agree is not used, and said so. From the third on, replays.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from subquad.contracts import Carry
from subquad.model.block import Block
from subquad.model.language_model import LanguageModel, ModelCarry

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes down what work does to memory, and returns what does it again. The work itself may run any number of times."""


class Decoder:
    """Decodes a batch from a carry on, which stays as it is: the decoder's own lies where each step overwrites it.

    A batch that shrinks goes on in another decoder, `Decoder(model, selected(decoder.carry, sequences))`.

    `capture` None (as `cuda_graphs` gives where there is no CUDA device) runs every step as it is. `graphs` says what
    is replayed, `why_not` why other blocks are not, by layer.  Raises: ValueError, for another batch or under autocast.
    """

    def __init__(self, model: LanguageModel, carry: ModelCarry, *, capture: Capture | None = None) -> None:
        self._model, self._capture = model, capture
        self._carry = list(carry)
        self._stages: list[_Stage | _Replayed] | None = None
        self._taken_down = False
        self.why_not: dict[int, str] = {}

    @property
    def carry(self) -> ModelCarry:
        """The carry after the last step, until the next one: copy what is to stay (`selected` does)."""
        return tuple(self._carry)

    @property
    def graphs(self) -> tuple[range, ...]:
        """The layers of each run of blocks that is replayed."""
        return tuple(stage.layers for stage in self._stages or () if isinstance(stage, _Replayed))

    @torch.inference_mode()
    def step(self, token: Tensor) -> Tensor:
        """Logits after the next token of each sequence.  Shapes:  token: b  ->  b vocab"""
        if self._capture is None:
            logits, carry = self._model.decode(token, tuple(self._carry))
            self._carry = list(carry)
            return logits
        if torch.is_autocast_enabled(token.device.type):
            raise ValueError("under autocast every step casts the weights: leave capture out, or narrow the weights")
        if self._stages is None:
            return self._watched(token)
        if not self._taken_down:
            return self._compared(token, self._capture)
        x, published = token, dict[str, Tensor]()
        for stage in self._stages:
            x = stage.run(x, self._carry, published)
        # The next step overwrites what a replay returns.
        return x.clone() if isinstance(self._stages[-1], _Replayed) else x

    def _watched(self, token: Tensor) -> Tensor:
        """The step block by block, and which of them have a carry that stays alike."""
        blocks: Sequence[Block] = self._model.blocks  # type: ignore[assignment]
        x, published = token, dict[str, Tensor]()
        for layer, block in enumerate(blocks):
            before = self._carry[layer]
            x = _Stage(self._model, range(layer, layer + 1)).run(x, self._carry, published)
            if (difference := _difference(block, before, self._carry[layer])) is not None:
                self.why_not[layer] = difference
        self._stages = list(_runs(self._model, self.why_not))
        return x

    def _compared(self, token: Tensor, capture: Capture) -> Tensor:
        """The step as it is, with a replay of each run of constant blocks beside it."""
        assert self._stages is not None, "a step was watched before"
        stages, x, published = list[_Stage | _Replayed](), token, dict[str, Tensor]()
        for stage in self._stages:
            assert isinstance(stage, _Stage), "nothing was taken down yet"
            entered, before, known = x, list(self._carry), dict(published)
            x = stage.run(x, self._carry, published)
            if stage.layers[0] in self.why_not:
                stages.append(stage)
                continue
            after = _Result(x, [self._carry[layer] for layer in stage.layers], published)
            try:
                replayed = _Replayed(stage, entered, before, known, after, capture)
                off = replayed.disagreement(entered, before, known, after)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a stranger's mixer, or the driver, may refuse in any way
                off, replayed = f"{type(error).__name__}: {error}".splitlines()[0], None
            if replayed is None or off is not None:
                self.why_not |= dict.fromkeys(stage.layers, str(off))
                names = ", ".join(sorted({str(self._model.blocks[layer].mixer_name) for layer in stage.layers}))
                warnings.warn(
                    f"layers {stage.layers[0]} to {stage.layers[-1]} ({names}) are decoded without a graph: {off}",
                    stacklevel=3,
                )
                stages.append(stage)
            else:
                for layer, own in zip(stage.layers, replayed.carries):
                    self._carry[layer] = own
                stages.append(replayed)
        self._stages, self._taken_down = stages, True
        return x


@dataclass(frozen=True)
class _Stage:
    """Consecutive blocks, run as they are; the embedding goes with the first layer, the head with the last."""

    model: LanguageModel
    layers: range

    def run(self, x: Tensor, carry: list[Carry], published: dict[str, Tensor]) -> Tensor:
        """What leaves the blocks; their entries of `carry`, and what they publish, are exchanged."""
        if self.layers.start == 0:
            x = self.model.embedding(x)
        for layer in self.layers:
            x, carry[layer] = self.model.decode_block(layer, x, carry[layer], published)
        return self.model.logits(x) if self.layers.stop == len(self.model.blocks) else x


@dataclass
class _Result:
    """What a run of blocks leaves: its output, its carries, and everything that is published behind it."""

    x: Tensor
    carries: list[Carry]
    published: Mapping[str, Tensor]


class _Replayed:
    """A run of blocks on memory of its own, taken down."""

    def __init__(
        self, stage: _Stage, x: Tensor, carry: list[Carry], published: Mapping[str, Tensor], after: _Result,
        capture: Capture,
    ) -> None:  # fmt: skip
        blocks: list[Block] = [stage.model.blocks[layer] for layer in stage.layers]  # type: ignore[misc]
        self.layers = stage.layers
        self.carries: list[Carry] = [_copied(carry[layer]) for layer in stage.layers]
        self._read = {
            name: published[name].clone() for block in blocks for name in block.sharing.reads if name in published
        }
        names = [name for block in blocks for name in block.sharing.publishes]
        self._published = {name: torch.empty_like(after.published[name]) for name in names}
        # Other values than those that it will be compared on: what the host reads off a tensor shows then.
        self._x, self._y = torch.zeros_like(x), torch.empty_like(after.x)
        self._fixed = [leaf for leaf in tree_leaves(self.carries) if isinstance(leaf, Tensor)]
        addresses = {leaf.untyped_storage().data_ptr() for leaf in [self._x, *self._fixed, *self._read.values()]}

        def work() -> None:
            inside: list[Carry] = [()] * len(stage.model.blocks)
            inside[stage.layers.start : stage.layers.stop] = self.carries
            shared = dict(self._read)
            y = stage.run(self._x, inside, shared)
            new = [leaf for leaf in tree_leaves(inside) if isinstance(leaf, Tensor)]
            # A mixer may hand on a part of what it was handed: it is read before anything is overwritten.
            new = [leaf.clone() if leaf.untyped_storage().data_ptr() in addresses else leaf for leaf in new]
            self._y.copy_(y)
            for name, fixed in self._published.items():
                fixed.copy_(shared[name])
            for dtype in {leaf.dtype for leaf in new}:
                places = [place for place, leaf in enumerate(new) if leaf.dtype == dtype]
                # One launch for many.
                torch._foreach_copy_([self._fixed[place] for place in places], [new[place] for place in places])

        self._replay = capture(work)

    def run(self, x: Tensor, carry: list[Carry], published: dict[str, Tensor]) -> Tensor:
        """The output, in memory that the next call overwrites; carries are exchanged where they lie."""
        if x.shape != self._x.shape:
            raise ValueError(f"{tuple(x.shape)} tokens for a decoder of {tuple(self._x.shape)}")
        self._x.copy_(x)
        for name, fixed in self._read.items():
            fixed.copy_(published[name])
        self._replay()
        published.update(self._published)
        return self._y

    def disagreement(
        self, x: Tensor, carry: list[Carry], published: Mapping[str, Tensor], expected: _Result
    ) -> str | None:
        """Replay from these values on, and say what is not as expected."""
        for fixed, value in zip(self._fixed, _tensors([carry[layer] for layer in self.layers]), strict=True):
            fixed.copy_(value)
        found = self.run(x, carry, dict(published))
        pairs = [(found, expected.x), *zip(self._fixed, _tensors(expected.carries), strict=True)]
        pairs += [(fixed, expected.published[name]) for name, fixed in self._published.items()]
        off = max(_relative_error(*pair) / _tolerance(pair[1]) for pair in pairs)
        return None if off <= 1 else f"a replay differs from the step by {off:.3g} times what rounding explains"


def _runs(model: LanguageModel, growing: Mapping[int, str]) -> Iterable[_Stage]:
    """All layers in order: constant ones together, as many as stand in a row, and every other alone."""
    start = 0
    for layer in range(len(model.blocks) + 1):
        if layer == len(model.blocks) or layer in growing:
            if start < layer:
                yield _Stage(model, range(start, layer))
            if layer in growing:
                yield _Stage(model, range(layer, layer + 1))
            start = layer + 1


def _difference(block: Block, before: Carry, after: Carry) -> str | None:
    """What of a block's carry, or of what it shares, is not alike before and after a step; None if all is."""
    if any(tensor.history for tensor in (*block.sharing.reads.values(), *block.sharing.publishes.values())):
        return "what it shares grows"
    (leaves, structure), (others, other_structure) = tree_flatten(before), tree_flatten(after)
    if structure != other_structure:
        return "its carry changes in structure"
    for one, other in zip(leaves, others):
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
                return "its carry grows" if one.dtype == other.dtype else "its carry changes in type"
        elif isinstance(one, Tensor) or isinstance(other, Tensor) or one != other:
            return "its carry counts tokens"
    return None


def _tensors(carries: Sequence[Carry]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(list(carries)) if isinstance(leaf, Tensor)]


def _copied(carry: Carry) -> Carry:
    copied: Carry = tree_map(
        lambda leaf: leaf.clone(memory_format=torch.contiguous_format) if isinstance(leaf, Tensor) else leaf, carry
    )
    return copied


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value; of what is not finite, whether it is the same."""
    if torch.equal(found, expected):
        return 0.0
    if not expected.is_floating_point():
        return float("inf")
    off = torch.where(found == expected, 0.0, found.double() - expected.double()).abs().nan_to_num(nan=float("inf"))
    off = off.masked_fill(found.isnan() & expected.isnan(), 0.0)
    scale = expected.double().where(expected.isfinite(), 0.0).abs().max()
    return float(off.max() / scale.clamp_min(torch.finfo(torch.float32).tiny))


def _tolerance(tensor: Tensor) -> float:
    """The square root of the type's spacing, half its digits: kernels may add up in another order, over many layers."""
    return float(torch.finfo(tensor.dtype).eps) ** 0.5 if tensor.is_floating_point() else 1.0
