"""Token sequences continued together: prefill by length, then decode in batches that shrink as sequences end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from subquad.model.decoder import Capture, Decoder
from subquad.model.language_model import LanguageModel, ModelCarry
from subquad.model.model_carry import carry_bytes, joinable, joined, selected
from subquad.schema import GenerateConfig
from subquad.training.sampling import Sampler, Sampling
from subquad.training.text_stream import StopText, TextStream
from subquad.training.tokenizer import Tokenizer

PREFILL_TOKENS = 2048
"""Tokens of a prompt that are taken at once, so that memory does not grow with it, but for caches. The result is the
same up to rounding (contract of `prefill`); logits of a vocabulary of 50,000 are 0.4 GB for so many."""

WORTH_A_GRAPH = 32
"""More tokens than these must be left to draw: to take a step down costs as much as six or seven steps."""

Ending = Literal["length", "stop", "stop_id"]
"""Why a text ended: `max_tokens` were drawn, a stop string came, a token of `stop_ids` came."""


class Continuation:
    """One sequence: its prompt, its random state, and the text that has come."""

    def __init__(self, index: int, prompt: Sequence[int], tokenizer: Tokenizer, config: GenerateConfig) -> None:
        self.index, self.prompt = index, list(prompt)
        self.text, self.num_tokens = "", 0
        self.ending: Ending | None = None
        self.carry_bytes: Mapping[str, int] = {}
        self._max_tokens, self._stop_ids = config.max_tokens, frozenset(config.stop_ids)
        self._sampler = Sampler(Sampling.of(config), config.seed + index, prompt)
        self._stream, self._stop = TextStream(tokenizer), StopText(config.stop)

    @property
    def num_read(self) -> int:
        """Tokens that the carry stands for: the last one drawn is not read, for nobody asks what comes after it."""
        return len(self.prompt) + max(0, self.num_tokens - 1)

    @property
    def num_left(self) -> int:
        """Tokens that may still be drawn."""
        return self._max_tokens - self.num_tokens

    def draw(self, logits: Tensor) -> tuple[int, str]:
        """Draw the next token and say what text has become certain; sets `ending` with the last.  Shapes:  logits: v"""
        token = self._sampler(logits)
        self.num_tokens += 1
        piece = ""
        if token in self._stop_ids:
            self.ending = "stop_id"
        else:
            piece = self._stop.add(self._stream.add(token))
            if not self._stop.reached and self.num_tokens >= self._max_tokens:
                self.ending = "length"
        if self.ending is not None:
            piece += self._stop.add(self._stream.rest()) + self._stop.rest()
        if self._stop.reached:
            self.ending = "stop"
        self.text += piece
        return token, piece


@dataclass
class _Batch:
    """Sequences that are decoded together: the logits of their next tokens, and their carry.  Shapes:  logits: n v"""

    sequences: list[Continuation]
    logits: Tensor
    carry: ModelCarry


@torch.inference_mode()
def continued(
    model: LanguageModel,
    sequences: Sequence[Continuation],
    device: torch.device,
    *,
    capture: Capture | None = None,
) -> Iterator[tuple[Continuation, str]]:
    """Continue all sequences to their ends; yields each piece of text as it becomes certain.

    Prompts of one length are prefilled together, and no prompt is padded: `prefill` has no mask, and a recurrent
    state would remember padding. Then all sequences whose carries are alike (`joinable`) are decoded together: for
    mixers with a state of constant size all of them, for those with caches or positions the ones of equal length.
    What a sequence becomes depends on the others by the rounding of batched matrix products alone. `capture` is the
    decoder's (`cuda_graphs(device)`); a batch that shrinks is taken down anew, if enough tokens are left.
    """
    for batch in _joined([_prefilled(model, group, device) for group in _by_length(sequences)]):
        yield from _decoded(model, batch, device, capture)


def _by_length(sequences: Sequence[Continuation]) -> list[list[Continuation]]:
    groups: dict[int, list[Continuation]] = {}
    for sequence in sequences:
        groups.setdefault(len(sequence.prompt), []).append(sequence)
    return list(groups.values())


def _prefilled(model: LanguageModel, group: list[Continuation], device: torch.device) -> _Batch:
    tokens = torch.tensor([sequence.prompt for sequence in group], device=device)
    carry = model.empty_carry(len(group))
    for piece in tokens.split(PREFILL_TOKENS, dim=1):
        logits, carry = model.prefill(piece, carry)
    return _Batch(group, logits[:, -1].clone(), carry)  # a copy: the logits of a whole piece are not kept


def _joined(batches: Sequence[_Batch]) -> list[_Batch]:
    kinds: list[list[_Batch]] = []
    for batch in batches:
        kind = next((kind for kind in kinds if joinable(kind[0].carry, batch.carry)), None)
        if kind is None:
            kinds.append([batch])
        else:
            kind.append(batch)
    return [
        kind[0]
        if len(kind) == 1
        else _Batch(
            [sequence for batch in kind for sequence in batch.sequences],
            torch.cat([batch.logits for batch in kind]),
            joined([batch.carry for batch in kind]),
        )
        for kind in kinds
    ]


def _decoded(
    model: LanguageModel, batch: _Batch, device: torch.device, capture: Capture | None
) -> Iterator[tuple[Continuation, str]]:
    def decoder_of(carry: ModelCarry) -> Decoder:
        worth = max(sequence.num_left for sequence in sequences) > WORTH_A_GRAPH
        return Decoder(model, carry, capture=capture if worth else None)

    sequences, logits = batch.sequences, batch.logits
    decoder = decoder_of(batch.carry)
    while True:
        tokens = []
        logits = logits.float().cpu()
        for sequence, row in zip(sequences, logits, strict=True):
            token, piece = sequence.draw(row)
            tokens.append(token)
            yield sequence, piece
        going = [place for place, sequence in enumerate(sequences) if sequence.ending is None]
        if len(going) < len(sequences):
            carry = decoder.carry
            share = {name: size // len(sequences) for name, size in carry_bytes(model, carry).items()}
            for sequence in sequences:
                if sequence.ending is not None:
                    sequence.carry_bytes = share
            if not going:
                return
            sequences, tokens = [sequences[place] for place in going], [tokens[place] for place in going]
            decoder = decoder_of(selected(carry, torch.tensor(going, device=device)))
        logits = decoder.step(torch.tensor(tokens, device=device))
