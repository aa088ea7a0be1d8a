"""A language model: embedding, backbone of blocks, final norm, lm_head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from subquad.contracts import Carry
from subquad.model.block import Block
from subquad.model.chunked_cross_entropy import chunked_cross_entropy, chunked_nats
from subquad.model.recompute import checkpointed
from subquad.parallel.part import SequencePart

ModelCarry = tuple[Carry, ...]
"""One carry per block."""


class LanguageModel(nn.Module):
    """logits = W_head RMSNorm( block_n( ... block_1( Embed(tokens) ) ) ).  Shapes:  tokens: b t (int64)  ->  b t vocab

    With a `logit_cap` c > 0 logits become c tanh(logits / c) (Gemma Team 2024, section 2; xLSTM 7B).
    `no_decay` maps a mixer's registry name to the parameters that weight decay leaves alone. With
    `activation_checkpointing` a block's activations, or the cheap ones among them, are computed again in the backward
    instead of kept (`recompute.py`). `part` is that of every sequence which `forward` was compiled to compute on; None:
    whole sequences.
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        *,
        vocab_size: int,
        d_model: int,
        norm_eps: float,
        tie_embeddings: bool,
        no_decay: Mapping[str, tuple[str, ...]],
        logit_cap: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        # Tied: the embedding's weight is read a second time, and is one entry of the state dict.
        self.lm_head = None if tie_embeddings else nn.Linear(d_model, vocab_size, bias=False)
        self.logit_cap = logit_cap
        self.activation_checkpointing = False
        self.recompute = "all"
        self.part: SequencePart | None = None
        self._no_decay = dict(no_decay)

    def init_parameters(self, std: float) -> None:
        """Embedding, head and channel mixers normal(0, std), norms 1, and each mixer as its paper says."""
        nn.init.normal_(self.embedding.weight, std=std)
        if self.lm_head is not None:
            nn.init.normal_(self.lm_head.weight, std=std)
        for block in self._blocks():
            if block.channel_mixer is not None:
                block.channel_mixer.init_parameters(std)
            block.mixer.init_parameters(std)

    def forward(
        self, tokens: Tensor, cu_seqlens: Tensor | None = None, targets: Tensor | None = None, *, each: bool = False
    ) -> Tensor:
        """Logits of whole sequences; given targets, the sum of their cross entropy instead, computed in chunks.

        With `each`, the cross entropy of every target (0 where there is none) instead of the sum, without a gradient.
        Shapes:  tokens: b t    cu_seqlens: documents + 1    targets: b t (-100: none)  ->  b t vocab; a scalar; b t
        `cu_seqlens` bounds the documents of the flattened b t tokens, row ends included.
        """
        x = self.embedding(tokens)
        if cu_seqlens is not None:
            x = x.reshape(1, -1, x.shape[-1])
        published: dict[str, Tensor] = {}
        for block in self._blocks():
            run: Callable[..., Any] = block
            if self.activation_checkpointing and torch.is_grad_enabled():
                run = partial(checkpointed, block, self.recompute)
            if block.sharing:
                x, new = run(x, cu_seqlens, _read(block, published))
                published.update(new)
            else:
                x = run(x, cu_seqlens)
        x = x.view(*tokens.shape, -1)
        if targets is None:
            return self.logits(x)
        head, hidden = self._head(), self.norm(x)
        loss = chunked_nats if each else chunked_cross_entropy
        return loss(hidden, head, targets, logit_cap=self.logit_cap)  # type: ignore[no-any-return]

    def empty_carry(self, batch_size: int) -> ModelCarry:
        """The carry before the first token."""
        return tuple(block.mixer.empty_carry(batch_size) for block in self._blocks())

    def prefill(self, tokens: Tensor, carry: ModelCarry) -> tuple[Tensor, ModelCarry]:
        """Logits of the next t tokens of each sequence.  Shapes:  tokens: b t  ->  b t vocab"""
        return self._advance(self.embedding(tokens), carry, lambda block: block.prefill)

    def decode(self, token: Tensor, carry: ModelCarry) -> tuple[Tensor, ModelCarry]:
        """Logits after the next token of each sequence.  Shapes:  token: b  ->  b vocab"""
        return self._advance(self.embedding(token), carry, lambda block: block.decode)

    def decode_mixer(self, layer: int, x_t: Tensor, carry: Carry, published: dict[str, Tensor]) -> tuple[Tensor, Carry]:
        """One mixer's part of `decode`; what it publishes to later ones goes into `published`.  Shapes:  b d -> b d"""
        block: Block = self.blocks[layer]  # type: ignore[assignment]
        return _advanced(block.decode_mixer, block, x_t, carry, published)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Two groups for an optimizer: what decays; vectors, norms, biases and what mixers declare, which do not."""
        spared = {
            id(parameter)
            for block in self._blocks()
            for name, parameter in block.mixer.named_parameters()
            if name in self._no_decay.get(block.mixer_name, ())
        }
        decayed: list[Tensor] = []
        left_alone: list[Tensor] = []
        for parameter in self.parameters():
            (left_alone if parameter.dim() < 2 or id(parameter) in spared else decayed).append(parameter)
        return [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": left_alone, "weight_decay": 0.0},
        ]

    def _advance(
        self, x: Tensor, carry: ModelCarry, method: Callable[[Block], Callable[..., tuple[Any, ...]]]
    ) -> tuple[Tensor, ModelCarry]:
        carries = []
        published: dict[str, Tensor] = {}
        for block, before in zip(self._blocks(), carry):
            x, after = _advanced(method(block), block, x, before, published)
            carries.append(after)
        return self.logits(x), tuple(carries)

    def logits(self, x: Tensor) -> Tensor:
        """What the last block's output predicts.  Shapes:  x: ... d  ->  ... vocab"""
        logits = linear(self.norm(x), self._head())
        return self.logit_cap * torch.tanh(logits / self.logit_cap) if self.logit_cap else logits

    def _head(self) -> Tensor:
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    def _blocks(self) -> Iterable[Block]:
        return self.blocks  # type: ignore[return-value]


def _advanced(
    method: Callable[..., tuple[Any, ...]], block: Block, x: Tensor, carry: Carry, published: dict[str, Tensor]
) -> tuple[Tensor, Carry]:
    """`prefill` or `decode` of a block, with what it reads of those before it and publishes to those behind it."""
    if not block.sharing:
        x, after = method(x, carry)
        return x, after
    x, after, new = method(x, carry, _read(block, published))
    published.update(new)
    return x, after


def _read(block: Block, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a block reads of the layers before it in this call."""
    return {name: published[name] for name in block.sharing.reads}
