"""A batch that is decoded token by token; what the device does alike in every step is taken down once, and replayed.

A step of a model launches hundreds of small kernels, each from Python, and waits for the host. Channel mixers, and
mixers whose carry is of constant size, ask for the same work every time: as many as stand in a row are taken down by a
`Capture` (a CUDA graph) that reads and writes fixed memory, with the embedding before the first and the head behind the
last. A step shows whose carry grows, or counts tokens: it is the carry that tells, not a name. Of these, mixers that
decode in place (`DecodesInPlace`) are given memory with room and are taken down with the others; when the room is used
up, all is laid out with more and taken down anew. The rest run as they are, between what is replayed.

The first step runs as it is and is watched. In the second, work is taken down, on other values than the step's, and
replayed on the step's beside the step itself: what does not agree is not used, and said so. From the third on, replays.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from subquad.contracts import Carry, DecodesInPlace
from subquad.model.block import Block
from subquad.model.language_model import LanguageModel, ModelCarry

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes down what work does to memory, and returns what does it again. The work itself may run any number of times."""

ROOM = 256
"""Tokens that caches get room for at first, and as many again as there was room for whenever they are full: what is
copied and taken down anew in all stays in proportion to what is decoded."""
_NO_MEMORY = "there is no memory for another copy of its cache"


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
        self._in_place = set[int]()  # layers whose mixers are decoded in memory with room, once taken down
        self._room, self._left = ROOM, 0
        self.why_not: dict[int, str] = {}

    @property
    def carry(self) -> ModelCarry:
        """The carry after the last step, until the next one: copy what is to stay (`selected` does)."""
        carry = list(self._carry)
        for stage in self._stages or ():
            if isinstance(stage, _Replayed):
                for layer, ordinary in stage.ordinary():
                    carry[layer] = ordinary
        return tuple(carry)

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
        if self._taken_down and not self._left:
            self._grow()
        if not self._taken_down:
            return self._compared(token, self._capture)
        self._left -= 1
        x, published = token, dict[str, Tensor]()
        for stage in self._stages:
            x = stage.run(x, self._carry, published)
        # The next step overwrites what a replay returns.
        return x.clone() if isinstance(self._stages[-1], _Replayed) else x

    def _grow(self) -> None:
        """Room for twice as many tokens more as there was room for; without memory for it, caches grow as ever."""
        room = 2 * self._room
        try:
            for stage in self._stages or ():
                if isinstance(stage, _Replayed):
                    stage.grow(room)
        except torch.OutOfMemoryError:
            self._carry = list(self.carry)
            self.why_not |= dict.fromkeys(sorted(self._in_place), _NO_MEMORY)
            self._in_place.clear()
            self._stages, self._taken_down = self._planned(), False
        else:
            self._room = self._left = room

    def _watched(self, token: Tensor) -> Tensor:
        """The step part by part, and which of them have a carry that stays alike."""
        before, published = list(self._carry), dict[str, Tensor]()
        x = _Stage(self._model, tuple(_parts(self._model))).run(token, self._carry, published)
        for layer, block in enumerate(_blocks(self._model)):
            if (difference := _difference(block, before[layer], self._carry[layer])) is None:
                continue
            if not isinstance(block.mixer, DecodesInPlace) or block.sharing:
                self.why_not[layer] = difference
            elif block.not_in_place is not None:
                self.why_not[layer] = f"{difference}, and it does not decode in place: {block.not_in_place}"
            else:
                self._in_place.add(layer)
        self._stages = self._planned()
        return x

    def _planned(self, apart: Collection[int] = ()) -> list[_Stage | _Replayed]:
        """All parts in runs, none of them taken down yet; the mixers of some layers by themselves."""
        runs = list(_runs(_parts(self._model), {*self.why_not, *apart}))
        return [_Stage(self._model, run, run is runs[0], run is runs[-1]) for run in runs]

    def _compared(self, token: Tensor, capture: Capture) -> Tensor:
        """The step as it is, with a replay of each run beside it. If one with mixers in place fails, they go apart."""
        assert self._stages is not None, "a step was watched before"
        stages, x, published, again = list[_Stage | _Replayed](), token, dict[str, Tensor](), False
        self._left = self._room - 1
        for stage in self._stages:
            assert isinstance(stage, _Stage), "nothing was taken down yet"
            entered, before, known = x, list(self._carry), dict(published)
            x = stage.run(x, self._carry, published)
            if again or (stage.parts[0].mixes_tokens and stage.parts[0].layer in self.why_not):
                stages.append(stage)
                continue
            after = _Result(x, [self._carry[layer] for layer in stage.layers], published)
            in_place = self._in_place.intersection(stage.layers)
            try:
                replayed = _Replayed(stage, in_place, self._room, entered, before, known, after, capture)
                off = replayed.disagreement(entered, before, known, after)
            except torch.OutOfMemoryError:
                if not in_place:
                    raise
                off, replayed = _NO_MEMORY, None
            except Exception as error:  # a stranger's mixer, or the driver, may refuse in any way
                off, replayed = f"{type(error).__name__}: {error}".splitlines()[0], None
            if replayed is not None and off is None:
                for layer in stage.layers:
                    self._carry[layer] = ()  # where it lies now, the replay knows
                stages.append(replayed)
                continue
            again = bool(in_place) and len(stage.parts) > 1
            if not again:
                self.why_not |= dict.fromkeys(stage.layers, str(off))
                names = ", ".join(sorted({str(self._model.blocks[layer].mixer_name) for layer in stage.layers}))
                warnings.warn(
                    f"layers {stage.parts[0].layer} to {stage.parts[-1].layer} ({names or 'channel mixers'})"
                    f" are decoded without a graph: {off}",
                    stacklevel=3,
                )
            stages.append(stage)
        self._stages, self._taken_down = stages, not again
        if again:  # by itself, each shows whether it is to blame
            self._carry = list(self.carry)
            self._stages = self._planned(apart=self._in_place)
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

    def run(
        self, x: Tensor, carry: list[Carry], published: dict[str, Tensor], in_place: Collection[int] = ()
    ) -> Tensor:
        """What leaves the parts; their entries of `carry`, and what they publish, are exchanged.

        Carries of the layers `in_place` have room.
        """
        blocks = _blocks(self.model)
        if self.embeds:
            x = self.model.embedding(x)
        for layer, mixes_tokens in self.parts:
            if mixes_tokens and layer in in_place:
                x, carry[layer] = blocks[layer].decode_mixer_in_place(x, carry[layer])
            elif mixes_tokens:
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
    """A run of parts on memory of its own, taken down; mixers of the layers `in_place` have room for their caches."""

    def __init__(
        self, stage: _Stage, in_place: Collection[int], room: int, x: Tensor, carry: Sequence[Carry],
        published: Mapping[str, Tensor], after: _Result, capture: Capture,
    ) -> None:  # fmt: skip
        blocks = _blocks(stage.model)
        self.parts, self.layers, self._stage, self._capture = stage.parts, stage.layers, stage, capture
        self._in_place: dict[int, DecodesInPlace] = {layer: blocks[layer].mixer for layer in in_place}
        self._read = {
            name: published[name].clone()
            for layer in self.layers
            for name in blocks[layer].sharing.reads
            if name in published
        }
        names = [name for layer in self.layers for name in blocks[layer].sharing.publishes]
        self._published = {name: torch.empty_like(after.published[name]) for name in names}
        # Other values than those that it will be compared on: what the host reads off a tensor shows then.
        self._x, self._y = torch.zeros_like(x), torch.empty_like(after.x)
        self._take_down([carry[layer] for layer in self.layers], room)

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

    def ordinary(self) -> Iterator[tuple[int, Carry]]:
        """The layers and their carries, as `decode` would have left them."""
        for layer, fixed in zip(self.layers, self.carries):
            mixer = self._in_place.get(layer)
            yield layer, fixed if mixer is None else mixer.without_room(fixed)

    def grow(self, room: int) -> None:
        """Go on from the same carries in memory with more room; where there is none for it, all is as it was."""
        if self._in_place:
            before = [carry for _, carry in self.ordinary()]
            self._take_down(before, room)
            self._lay_out(before, room)

    def disagreement(
        self, x: Tensor, carry: Sequence[Carry], published: Mapping[str, Tensor], expected: _Result
    ) -> str | None:
        """Replay from these values on, and say what is not as expected."""
        self._lay_out([carry[layer] for layer in self.layers], self._room)
        found = self.run(x, [], dict(published))
        pairs = [(found, expected.x)]
        for (_, one), other in zip(self.ordinary(), expected.carries, strict=True):
            if _outline(one) != _outline(other):
                return "a replay leaves another carry than the step"
            pairs += zip(_tensors([one]), _tensors([other]), strict=True)
        pairs += [(fixed, expected.published[name]) for name, fixed in self._published.items()]
        # A mixer in place may run other kernels than the step: what rounds as they do goes into every state behind it.
        least = _tolerance(expected.x) if self._in_place else 0.0
        off = max(_relative_error(*pair) / max(_tolerance(pair[1]), least) for pair in pairs)
        return None if off <= 1 else f"a replay differs from the step by {off:.3g} times what rounding explains"

    def _take_down(self, before: Sequence[Carry], room: int) -> None:
        """Memory of its own for these carries, and the work on it; taking it down leaves any values there."""
        carries = [self._fixed(layer, carry, room) for layer, carry in zip(self.layers, before, strict=True)]
        fixed = _tensors(carries)
        addresses = {leaf.untyped_storage().data_ptr() for leaf in [self._x, *fixed, *self._read.values()]}

        def work() -> None:
            inside: list[Carry] = [()] * len(self._stage.model.blocks)
            for layer, carry in zip(self.layers, carries):
                inside[layer] = carry
            shared = dict(self._read)
            y = self._stage.run(self._x, inside, shared, self._in_place)
            pairs = [
                (place, leaf)
                for place, leaf in zip(fixed, _tensors([inside[layer] for layer in self.layers]), strict=True)
                if not _is_same(place, leaf)
            ]
            # A mixer may hand on a part of what it was handed: it is read before anything is overwritten.
            pairs = [
                (place, leaf.clone() if leaf.untyped_storage().data_ptr() in addresses else leaf)
                for place, leaf in pairs
            ]
            self._y.copy_(y)
            for name, memory in self._published.items():
                memory.copy_(shared[name])
            for dtype in {leaf.dtype for _, leaf in pairs}:
                of_type = [pair for pair in pairs if pair[1].dtype == dtype]
                # One launch for many.
                torch._foreach_copy_([place for place, _ in of_type], [leaf for _, leaf in of_type])

        self._replay = self._capture(work)
        self.carries, self._room = carries, room

    def _lay_out(self, before: Sequence[Carry], room: int) -> None:
        """Write these carries to where the work finds them."""
        for layer, fixed, carry in zip(self.layers, self.carries, before, strict=True):
            value = self._fixed(layer, carry, room) if layer in self._in_place else carry
            for place, leaf in zip(_tensors([fixed]), _tensors([value]), strict=True):
                place.copy_(leaf)

    def _fixed(self, layer: int, carry: Carry, room: int) -> Carry:
        """A copy of a layer's carry that keeps its shapes while it is decoded."""
        mixer = self._in_place.get(layer)
        return _copied(carry) if mixer is None else mixer.with_room(carry, room)


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


def _runs(parts: Sequence[Part], apart: Collection[int]) -> Iterator[tuple[Part, ...]]:
    """All parts in order: as many together as stand in a row, but the mixers of some layers alone."""
    run: list[Part] = []
    for part in parts:
        if part.mixes_tokens and part.layer in apart:
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


def _outline(carry: Carry) -> list[object]:
    """All of a carry but values: its shapes, its types, and whatever is no tensor."""
    return [(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(carry)]


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, looked at in the same way."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value; of what is not finite, whether it is the same."""
    differs = found != expected
    if not differs.any():
        return 0.0
    if not expected.is_floating_point():
        return float("inf")
    # Of a long cache that is the last token at most: the rest is not copied to a wider type.
    one, other = found[differs].double(), expected[differs].double()
    off = (one - other).abs().nan_to_num(nan=float("inf")).masked_fill(one.isnan() & other.isnan(), 0.0)
    scale = torch.where(expected.isfinite(), expected, 0.0).abs().max().double()
    return float(off.max() / scale.clamp_min(torch.finfo(torch.float32).tiny))


def _tolerance(tensor: Tensor) -> float:
    """The square root of the type's spacing, half its digits: kernels may add up in another order, over many layers."""
    return float(torch.finfo(tensor.dtype).eps) ** 0.5 if tensor.is_floating_point() else 1.0
