"""What plugins declare and what mixers promise: Protocols and data, no torch at run time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from subquad.schema import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.fx import GraphModule

CONTRACT_VERSION = "1.8"
"""Grows by minor numbers when something is added, by major ones when something a plugin relies on is removed.

A plugin says its major version by the entry-point group that it stands in: `subquad` for 1, `subquad.N` for N.
"""

Carry: TypeAlias = "tuple[Tensor | int, ...]"
"""What a mixer hands from one call to the next: a NamedTuple of tensors and integers (a pytree).

The first axis of every tensor is the batch, so that sequences can join and leave one; integers hold for all of them.
"""


class Growth(Enum):
    """How work or carry grows with the number of tokens t; values order them: the exponent of t, a bit more with a log.

    LOGARITHMIC is log t, LOG_LINEAR t log t.
    """

    CONSTANT = 0.0
    LOGARITHMIC = 0.01
    SQRT = 0.5
    LINEAR = 1.0
    LOG_LINEAR = 1.01
    POWER_1_5 = 1.5
    QUADRATIC = 2.0

    def exponent(self, t: int, longer: int) -> float:
        """The power of t that it is between two lengths: 1 + log_2(12 / 11) for t log t from 2048 to 4096."""
        power = round(self.value, 1)
        if power == self.value:
            return power
        return power + math.log(math.log(longer) / math.log(t)) / math.log(longer / t)


@dataclass(frozen=True, kw_only=True)
class SharedTensor:
    """A tensor that a layer publishes to later ones.  Shape:  b t *shape, of the t tokens of the call (1 in a decode)

    With `history` it is of all tokens so far instead, like a cache, or of as many of the last ones as a reader may see:
    prefill and decode publish it with those of earlier calls in front, with `every` n the last of each n of them alone.
    `options` is what readers must agree on besides.
    """

    shape: tuple[int, ...]
    history: bool = False
    options: Mapping[str, object] = field(default_factory=dict)
    every: int = 1

    def length(self, t: int, before: int) -> int:
        """Of how many tokens it is in a call of t, after so many."""
        return t + before // self.every if self.history else t


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What a mixer shares where it stands, by name: what it publishes to later layers, what it reads of earlier ones.

    Of two layers that publish one name, readers get the later one's. A sharing that is empty is false.
    """

    publishes: Mapping[str, SharedTensor] = field(default_factory=dict)
    reads: Mapping[str, SharedTensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.publishes or self.reads)


NOTHING_SHARED = Sharing()
"""Of a mixer that knows its own layer alone."""


@dataclass(frozen=True, kw_only=True)
class MixerContext:
    """Where a mixer stands: residual width, layer, depth, and the longest sequence it is built for (tokens).

    `published` is what earlier layers publish, by name.
    """

    d_model: int
    layer_index: int
    num_layers: int
    context_len: int
    published: Mapping[str, SharedTensor] = field(default_factory=dict)


class Mixer(Protocol):
    """A sequence mixer: a torch.nn.Module that maps `b t d -> b t d`.

    It calls operators, never kernels, in its own methods; its submodules are leaves of the captured graph.

    Where a mixer shares something (`MixerSpec.shares`), `forward`, `prefill` and `decode` take one more argument, the
    tensors that it reads, by name: `shared: Mapping[str, Tensor] | None = None`. Given one, they return one thing more,
    last: what they publish, by name. Given none, a mixer that reads nothing does as any other.
    """

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix a whole sequence.

        Shapes:  x: b t d   ->  b t d
        With `cu_seqlens` (int32, [documents + 1], starts with 0, ends with t, never decreasing) the batch is 1 and the
        sequence is packed: no token sees another document, and positions restart at each one.
        """

    def empty_carry(self, batch_size: int) -> Carry:
        """The carry before the first token."""

    def prefill(self, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """Mix the next t tokens of each sequence, after those the carry stands for.  Shapes:  x: b t d  ->  b t d"""

    def decode(self, x_t: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """Mix the next token of each sequence.  Shapes:  x_t: b d  ->  b d"""

    # A mixer whose heads are independent between its projections may say so, for `trainer.tensor_parallel`:
    # def tensor_parallel_plan(self) -> ProjectionSplit

    # A mixer whose carry grows, or counts tokens, may also decode in memory of one size: `DecodesInPlace`.

    def init_parameters(self, std: float) -> None:
        """Draw the parameters as the paper does; `std` is the model's standard deviation for linear maps."""


MIXER_METHODS = ("forward", "empty_carry", "prefill", "decode", "init_parameters")


@runtime_checkable
class DecodesInPlace(Protocol):
    """What a mixer whose carry grows, or counts tokens, may offer: a step that does the same work every time.

    Only then can a step be taken down once and replayed (a CUDA graph). Its carry is made of tensors alone that keep
    their shapes and lie where they are: a length or a position is a tensor, which the device reads. It never leaves
    the decoder, and its first axis need not be the batch. A mixer that shares tensors with other layers is not asked.

    As `decode` is, `decode_in_place` is captured as a graph whose operators run chosen kernels; its writes keep their
    order. Where it cannot be, a compiled mixer decodes as ever.
    """

    def with_room(self, carry: Carry, tokens: int) -> Carry:
        """The carry in memory of its own, with room for so many tokens more; made by shapes and integers alone."""

    def decode_in_place(self, x_t: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """`decode`, on a carry with room; what is returned of it may be what was handed in, written over.

        Nothing in it may wait for the device, nor depend on anything but shapes.  Shapes:  x_t: b d  ->  b d
        """

    def without_room(self, carry: Carry) -> Carry:
        """The ordinary carry, as `decode` would have left it; it may show memory of the one with room."""


@dataclass(frozen=True, kw_only=True)
class ProjectionSplit:
    """How ranks may share a module's projections (`trainer.tensor_parallel`); names of its `nn.Linear` submodules.

    Of `columns` each rank computes an equal, contiguous part of the outputs, of `rows` it takes such a part of the
    inputs, and the results are added up. In between the module must take what it is given: as many heads as are there.
    `units` says what is dealt out, by the config's names, and how many of each there are; ranks must divide them.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    units: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class MixerSpec:
    """Declares a mixer: its name, its config dataclass, how to build it, and what it promises.

    `build` names `module:attribute`, called as `build(config, context) -> Mixer`; it is imported when a model is
    built, so that the declaring module needs no torch. `no_decay` names parameters that weight decay must leave alone
    (biases, norms and other vectors are left alone anyway); `float32_parameters` those that keep float32 under bf16.
    `candidate=False` is for what stands in no layer alone: an `auto` layer gets it only where the recipe names it.
    `bidirectional`: its config has a key of that name, false by default; set, every token sees those of both sides, and
    there is no carry (`subquad.Bidirectional` refuses it by name).
    `shares(config, context)` says what it publishes and reads where it stands; it needs no torch. None: nothing.
    """

    name: str
    summary: str
    paper: str
    config: type
    build: str
    work_growth: Growth
    carry_growth: Growth
    causal: bool = True
    packed: bool = True
    no_decay: tuple[str, ...] = ()
    float32_parameters: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    candidate: bool = True
    bidirectional: bool = False
    shares: Callable[[Any, MixerContext], Sharing] | None = None


ComponentKind = Literal["optimizer", "data"]


@dataclass(frozen=True, kw_only=True)
class ComponentSpec:
    """Declares a named component of a run: an optimizer or a data source, with its config dataclass and builder.

    optimizer: `build(config, parameter_groups) -> torch.optim.Optimizer`
    data:      `build(config, context) -> subquad.training.data.Source`
    """

    kind: ComponentKind
    name: str
    summary: str
    config: type
    build: str


@dataclass(frozen=True)
class PassOutcome:
    """What a graph pass returns: a new graph that shares the parameters, and what it did and declined to do."""

    graph: GraphModule
    report: tuple[str, ...]


GraphPass: TypeAlias = "Callable[[GraphModule], PassOutcome]"


@dataclass(frozen=True, kw_only=True)
class PassSpec:
    """Declares a graph pass; `run` names a `module:attribute`, a `GraphPass`. It runs before `select_kernels`."""

    name: str
    summary: str
    run: str


class AttentionFunction(Protocol):
    """Softmax attention by the kernels that were chosen for one module; what an adapter lets that module call."""

    @property
    def written(self) -> Literal["sdpa", "softmax"]:
        """How the module writes its attention: one call of scaled_dot_product_attention, or products and a softmax."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor | None:
        """What scaled_dot_product_attention gives for these arguments, or None: the module must go on as written.

        Shapes:  q: b h t k    k: b h_kv s k    v: b h_kv s v    mask: broadcasts to b h t s  ->  b h t v
        """


class Adapter(Protocol):
    """Lets a foreign module compute attention by kernels; it keeps its class, parameters and state_dict keys."""

    def __call__(self, module: torch.nn.Module, attention: Mapping[str, AttentionFunction]) -> Mapping[str, str]:
        """Let submodules (by path below `module`, "" for itself) call their functions; return why not, by path."""


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """Declares an adapter for a foreign module class and its subclasses, named `package.module:Class`.

    `build` names an `Adapter`. Classes are compared by name: nothing is imported to look.
    `distinct_heads`: it hands over keys and values before the model repeats them for its queries.
    """

    name: str
    module_class: str
    build: str
    distinct_heads: bool = False


@dataclass(frozen=True, kw_only=True)
class Computed:
    """A tensor of ours that is `transform(*tensors)` of those that a checkpoint keeps under `names`."""

    names: tuple[str, ...]
    transform: Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class ImportMap:
    """One of our models, and where each of its tensors stands in a Hugging Face checkpoint: our names <- theirs.

    `outer` has what is outside of blocks (`embedding.weight`, `norm.weight`, `lm_head.weight`). `blocks` has, for each
    key of `model.mixers`, the names below `blocks.N.`; theirs go on from `block_prefix`, in which `{}` is N.
    `copies` names tensors of theirs that repeat another one (a tied head): they may be there, and must be equal.
    `ignored` are regular expressions of tensors that say nothing (constants kept as buffers).
    """

    model: ModelConfig
    outer: Mapping[str, str | Computed]
    block_prefix: str
    blocks: Mapping[str, Mapping[str, str | Computed]]
    copies: Mapping[str, str]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ImportSpec:
    """Declares how checkpoints of one `model_type` of Hugging Face become our models (`model.init_from=hf:...`).

    `build` names a `module:function`, called as `build(config: CheckpointConfig) -> ImportMap`. It refuses, by
    `config.demand` or a ConfigError, whatever our blocks cannot compute.

    `export` names its inverse for models whose every block is `mixer`, called as `export(model: ModelConfig, mixer: its
    config, channel_mixer: ChannelMixerConfig | None)`. It returns the entries of config.json that are not the same for
    all architectures; `build` must read them back as that model, without any `Computed`, or the export is declined.
    """

    model_type: str
    summary: str
    build: str
    mixer: str = ""
    export: str = ""

    @property
    def name(self) -> str:
        """What errors and tables call it."""
        return self.model_type
