"""What a run makes of strings: log-probabilities of continuations and of whole texts, and greedy continuations.

These three are all that lm-eval asks of a model; nothing here knows of it. A string with nothing before it is
predicted from a line's end, as `generate` begins one. Of a context that is too long the last `max_len` tokens count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn import functional as F

from subquad.errors import DataError
from subquad.model.cuda_graph import cuda_graphs
from subquad.model.decoder import Decoder
from subquad.model.language_model import LanguageModel
from subquad.training.continuation import WORTH_A_GRAPH
from subquad.training.evaluation.loaded_run import LoadedRun
from subquad.training.generate import FIRST_BYTE
from subquad.training.tokenizer import Tokenizer


class Window(NamedTuple):
    """Tokens to read, and those to predict after the last ones of them, as many."""

    inputs: list[int]
    targets: list[int]


class Scored(NamedTuple):
    """Nats (below 0) of a string, and whether taking the likeliest token each time would have written it."""

    log_probability: float
    greedy: bool


class Likelihood:
    """Scores strings under a run's model, at most `max_len` tokens at a time."""

    def __init__(self, run: LoadedRun, tokenizer: Tokenizer, max_len: int) -> None:
        self._run, self._tokenizer, self.max_len = run, tokenizer, max_len
        self._prefix = (tokenizer.encode(FIRST_BYTE) or [0])[-1]

    def of_continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """log p(continuation | context) of each pair.  Raises: DataError if a continuation exceeds `max_len`."""
        windows = []
        for context, continuation in pairs:
            before, after = self._tokens(context, continuation)
            if len(after) > self.max_len:
                raise DataError(
                    what=f"a continuation has {len(after)} tokens, more than {self.max_len}",
                    where="evaluate.lengths",
                    mend=f"allow longer rows: lengths=[{len(after)}]",
                )
            windows.append(Window((before + after)[:-1][-self.max_len :], after))
        return self._scored(windows)

    def of_texts(self, texts: Sequence[str]) -> list[float]:
        """log p(text) of each; a long one in windows, each token predicted once, the last window full."""
        windows: list[Window] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            tokens = self._tokenizer.encode(text)
            found = list(windows_of(tokens, self._prefix, self.max_len))
            windows += found
            owners += [number] * len(found)
        sums = [0.0] * len(texts)
        for owner, scored in zip(owners, self._scored(windows), strict=True):
            sums[owner] += scored.log_probability
        return sums

    @torch.inference_mode()
    def continuation(self, context: str, stops: Sequence[str], max_tokens: int) -> str:
        """The likeliest token each time, in float32, up to the first stop, which is left out."""
        model, device = self._writer, self._run.device
        prompt = (self._tokenizer.encode(context) or [self._prefix])[-self.max_len :]
        logits, carry = model.prefill(torch.tensor([prompt], device=device), model.empty_carry(1))
        decoder = Decoder(model, carry, capture=cuda_graphs(device, wanted=max_tokens > WORTH_A_GRAPH))
        last, written, text = logits[:, -1], list[int](), ""
        for _ in range(max_tokens):
            token = last.argmax(-1)
            written.append(int(token))
            text = self._tokenizer.decode(written)
            ends = [text.find(stop) for stop in stops if stop and stop in text]
            if ends:
                return text[: min(ends)]
            last = decoder.step(token)
        return text

    @cached_property
    def _writer(self) -> LanguageModel:
        """The run's model on the same weights, with kernels for decoding: those of rows may compute in bfloat16."""
        return self._run.to_decode()

    def _tokens(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both as tokens. They are cut before the spaces that end the context: tokens often begin with a space."""
        spaces = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
        before = self._tokenizer.encode(context)
        if not before:
            return [self._prefix], self._tokenizer.encode(continuation)
        return before, self._tokenizer.encode(context + continuation)[len(before) :]

    def _scored(self, windows: Sequence[Window]) -> list[Scored]:
        found: dict[int, Scored] = {}
        for group in self._groups(windows):
            length = max(len(windows[number].inputs) for number in group)
            # Filled up at the end: a causal model's logits do not depend on what follows.
            rows = [windows[number].inputs + [0] * (length - len(windows[number].inputs)) for number in group]
            logits = self._run.logits(torch.tensor(rows, dtype=torch.int64))
            for row, number in enumerate(group):
                inputs, targets = windows[number]
                asked = logits[row, len(inputs) - len(targets) : len(inputs)]
                answer = torch.tensor(targets, dtype=torch.int64, device=asked.device)
                nats = F.cross_entropy(asked, answer, reduction="none").double().sum()
                found[number] = Scored(-float(nats), bool((asked.argmax(-1) == answer).all()))
        return [found[number] for number in range(len(windows))]

    def _groups(self, windows: Sequence[Window]) -> Iterator[list[int]]:
        """Windows of about the same length, as many as a training batch has tokens; at least one."""
        trainer = self._run.config.trainer
        room = trainer.batch_size * trainer.seq_len
        group: list[int] = []
        for number in sorted(range(len(windows)), key=lambda number: -len(windows[number].inputs)):
            if group and (len(group) + 1) * len(windows[group[0]].inputs) > room:
                yield group
                group = []
            group.append(number)
        if group:
            yield group


def windows_of(tokens: list[int], prefix: int, max_len: int) -> Iterator[Window]:
    """Windows that predict each token once; every window but the first is full."""
    read = [prefix, *tokens]
    for start in range(0, len(tokens), max_len):
        end = min(start + max_len, len(tokens))
        yield Window(read[max(0, end - max_len) : end], tokens[start:end])
