"""A batch that is decoded token by token; what the device does alike in every step is taken down once, and replayed.

A step of a model launches hundreds of small kernels, each from Python, and waits for the host. Channel mixers, and
mixers whose carry is of constant size, ask for the same work every time: as many as stand in a row are taken down by a
`Capture` (a CUDA graph) that reads and writes fixed memory, with the embedding before the first and the head behind the
last. Mixers with a cache that grows, or with a position, run as they are between them. A step shows which those are: it
is the carry that tells, not a name.

The first step runs as it is and is watched. In the second, work is taken down, on other values than the step's, and
replayed on the step's beside the step itself: what does not agree is not used, and said so. From the third on, replays.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from subquad.contracts import Carry
from subquad.model.block import Block
from subquad.model.language_model import LanguageModel, ModelCarry

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes down what work does to memory, and returns what does it again. The work itself may run any number of times."""


class Part(NamedTuple):
    """Half of a block: its mixer (`mixes_tokens`) or its channel mixer, each with norm and residual."""

    layer: int
    mixes_tokens: bool


class Decoder:
    """Decodes a batch from a carry on, which stays as it is: the decoder's own lies where each step overwrites it.

    A batch that shrinks goes on in another decoder, `Decoder(model, selected(decoder.carry, sequences))`.

    `capture` None (as `cuda_graphs` gives where there is no CUDA device) runs every step as it is. `graphs` says what
    is replayed, `why_not` why other mixers are not, by layer.  Raises: ValueError, for another batch or under autocast.
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
    def graphs(self) -> tuple[tuple[Part, ...], ...]:
        """The parts of the model in each run that is replayed."""
        return tuple(stage.parts for stage in self._stages or () if isinstance(stage, _Replayed))

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
        """The step part by part, and which of them have a carry that stays alike."""
        before, published = list(self._carry), dict[str, Tensor]()
        x = _Stage(self._model, tuple(_parts(self._model))).run(token, self._carry, published)
        for layer, block in enumerate(_blocks(self._model)):
            if (difference := _difference(block, before[layer], self._carry[layer])) is not None:
                self.why_not[layer] = difference
        runs = list(_runs(_parts(self._model), self.why_not))
        self._stages = [_Stage(self._model, run, run is runs[0], run is runs[-1]) for run in runs]
        return x

    def _compared(self, token: Tensor, capture: Capture) -> Tensor:
        """The step as it is, with a replay of each run of constant parts beside it."""
        assert self._stages is not None, "a step was watched before"
        stages, x, published = list[_Stage | _Replayed](), token, dict[str, Tensor]()
        for stage in self._stages:
            assert isinstance(stage, _Stage), "nothing was taken down yet"
            entered, before, known = x, list(self._carry), dict(published)
            x = stage.run(x, self._carry, published)
            if stage.parts[0].mixes_tokens and stage.parts[0].layer in self.why_not:
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
                    f"layers {stage.parts[0].layer} to {stage.parts[-1].layer} ({names or 'channel mixers'})"
                    f" are decoded without a graph: {off}",
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
    """Consecutive parts, run as they are; the embedding goes with the first of the model, the head with the last."""

    model: LanguageModel
    parts: tuple[Part, ...]
    embeds: bool = True
    predicts: bool = True

    @property
    def layers(self) -> list[int]:
        """Those whose mixers, and carries, are among the parts."""
        return [part.layer for part in self.parts if part.mixes_tokens]

    def run(self, x: Tensor, carry: list[Carry], published: dict[str, Tensor]) -> Tensor:
        """What leaves the parts; their entries of `carry`, and what they publish, are exchanged."""
        blocks = _blocks(self.model)
        if self.embeds:
            x = self.model.embedding(x)
        for layer, mixes_tokens in self.parts:
            if mixes_tokens:
                x, carry[layer] = self.model.decode_mixer(layer, x, carry[layer], published)
            else:
                x = blocks[layer].mix_channels(x)
        return self.model.logits(x) if self.predicts else x


@dataclass
class _Result:
    """What a run of parts leaves: its output, its carries, and everything that is published behind it."""

    x: Tensor
    carries: list[Carry]
    published: Mapping[str, Tensor]


class _Replayed:
    """A run of parts on memory of its own, taken down."""

    def __init__(
        self, stage: _Stage, x: Tensor, carry: list[Carry], published: Mapping[str, Tensor], after: _Result,
        capture: Capture,
    ) -> None:  # fmt: skip
        layers, blocks = stage.layers, [_blocks(stage.model)[layer] for layer in stage.layers]
        self.parts, self.layers = stage.parts, layers
        self.carries: list[Carry] = [_copied(carry[layer]) for layer in layers]
        self._read = {
            name: published[name].clone() for block in blocks for name in block.sharing.reads if name in published
        }
        names = [name for block in blocks for name in block.sharing.publishes]
        self._published = {name: torch.empty_like(after.published[name]) for name in names}
        # Other values than those that it will be compared on: what the host reads off a tensor shows then.
        self._x, self._y = torch.zeros_like(x), torch.empty_like(after.x)
        self._fixed = _tensors(self.carries)
        addresses = {leaf.untyped_storage().data_ptr() for leaf in [self._x, *self._fixed, *self._read.values()]}

        def work() -> None:
            inside: list[Carry] = [()] * len(stage.model.blocks)
            for layer, fixed in zip(layers, self.carries):
                inside[layer] = fixed
            shared = dict(self._read)
            y = stage.run(self._x, inside, shared)
            new = _tensors([inside[layer] for layer in layers])
            # A mixer may hand on a part of what it was handed: it is read before anything is overwritten.
            new = [leaf.clone() if leaf.untyped_storage().data_ptr() in addresses else leaf for leaf in new]
            self._y.copy_(y)
            for name, memory in self._published.items():
                memory.copy_(shared[name])
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


def _blocks(model: LanguageModel) -> Sequence[Block]:
    return model.blocks  # type: ignore[return-value]


def _parts(model: LanguageModel) -> list[Part]:
    """All of a model, in order."""
    parts = []
    for layer, block in enumerate(_blocks(model)):
        parts.append(Part(layer, True))
        if block.channel_mixer is not None:
            parts.append(Part(layer, False))
    return parts


def _runs(parts: Sequence[Part], growing: Mapping[int, str]) -> Iterator[tuple[Part, ...]]:
    """All parts in order: constant ones together, as many as stand in a row, and every other alone."""
    run: list[Part] = []
    for part in parts:
        if part.mixes_tokens and part.layer in growing:
            if run:
                yield tuple(run)
            yield (part,)
            run = []
        else:
            run.append(part)
    if run:
        yield tuple(run)


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
