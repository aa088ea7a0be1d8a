"""How fast models decode as their context grows, and what they keep of it: a row for each model, batch and context.

The last tokens of a context are decoded and timed, those before them prefilled in pieces, both as `generate` does; the
next context goes on from there, so that no token is prefilled twice. Weights are as they are drawn: what decoding costs
does not depend on them.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch

from subquad.compiler.pins import check_that_pins_decode
from subquad.compiler.pipeline import decoding_kernels
from subquad.errors import ConfigError
from subquad.model.build import build_model
from subquad.model.cuda_graph import cuda_graphs
from subquad.model.decoder import Decoder, Part
from subquad.model.language_model import LanguageModel, ModelCarry
from subquad.model.model_carry import carry_bytes
from subquad.model.narrow import DTYPES, narrow
from subquad.schema import DecodingBenchConfig, RunConfig
from subquad.training.compilation import compile_for_generation, device_of
from subquad.training.continuation import PREFILL_TOKENS
from subquad.training.run_folder import write_text

FORMAT_VERSION = 2
ROUNDS = 4
"""Of equally many tokens; the rate is that of the median one."""
WARM_UP = 8
"""Tokens that are decoded before the timed ones; in the second of them graphs are taken down."""
BYTES = 256
"""Vocabulary of a recipe that leaves it to the tokenizer."""


@dataclass(frozen=True, kw_only=True)
class DecodingRow:
    """What was measured, or why not.

    `tokens_per_s` counts all sequences; `carry_bytes` is one sequence's after `context` tokens, by mixer in `carry`;
    `peak_bytes` is weights, carries and what a step needs beyond them (CUDA), but for what graphs need inside; `spread`
    half of slowest minus fastest round, over the median. `kernels` computed a decoded token, by operator.
    `graphs` CUDA graphs replayed `graph_layers`, as many as of each mixer and of channel mixers, and `why_no_graph`
    says for other mixers why they did not.
    """

    model: str
    parameters: int
    batch_size: int
    context: int
    tokens_per_s: float | None = None
    spread: float = 0.0
    carry_bytes: int = 0
    carry: dict[str, int] = field(default_factory=dict)
    peak_bytes: int | None = None
    prefill_s: float = 0.0
    kernels: dict[str, str] = field(default_factory=dict)
    graphs: int = 0
    graph_layers: dict[str, int] = field(default_factory=dict)
    why_no_graph: dict[str, str] = field(default_factory=dict)
    why_not: str | None = None


def bench_decoding(configs: Sequence[RunConfig], request: DecodingBenchConfig) -> Iterator[DecodingRow]:
    """Measure every model at every context, shortest first; each row is in the record when it is yielded.

    Raises: ConfigError.
    """
    _check(request)
    started, rows = time.monotonic(), list[DecodingRow]()
    device = device_of(configs[0])
    for batch_size in request.batch_sizes:
        contestants = [_Contestant(config, request, batch_size, device) for config in configs]
        for context in sorted(set(request.contexts)):
            for contestant in contestants:
                late = time.monotonic() - started > request.budget_s
                row = contestant.refused(context, "no time is left") if late else contestant.at(context)
                rows.append(row)
                _write(rows, request, device)
                yield row
        del contestants
        if device.type == "cuda":
            torch.cuda.empty_cache()


class _Contestant:
    """A model with the carry of a batch of equal length, which grows."""

    def __init__(self, config: RunConfig, request: DecodingBenchConfig, batch_size: int, device: torch.device) -> None:
        config.model.vocab_size = config.model.vocab_size or BYTES
        config.model.context_len = max(request.contexts)
        torch.manual_seed(config.seed)
        model = build_model(config.model, device=device).eval()
        self._model: LanguageModel = narrow(model, DTYPES[request.dtype])
        self._parameters = sum(parameter.numel() for parameter in self._model.parameters())
        plan = compile_for_generation(self._model, config, batch_size, request.dtype)
        check_that_pins_decode(plan.choices, config.kernel)
        self._name, self._vocab_size = config.model.name, config.model.vocab_size
        self._batch_size, self._tokens, self._device = batch_size, request.tokens, device
        self._capture = cuda_graphs(device, request.cuda_graph)
        self._carry: ModelCarry | None = self._model.empty_carry(batch_size)
        self._read = 0

    def refused(self, context: int, why_not: str) -> DecodingRow:
        """A row without figures."""
        return DecodingRow(
            model=self._name,
            parameters=self._parameters,
            batch_size=self._batch_size,
            context=context,
            why_not=why_not,
        )

    @torch.inference_mode()
    def at(self, context: int) -> DecodingRow:
        """Prefill up to the last tokens of the context, and decode those."""
        if self._carry is None:
            return self.refused(context, "a shorter context took more memory than there is")
        try:
            return self._measured(context)
        except torch.OutOfMemoryError:
            self._carry = None
            return self.refused(context, "more memory than there is")

    def _measured(self, context: int) -> DecodingRow:
        carry = self._carry
        assert carry is not None, "at() has looked"
        timed = self._tokens // ROUNDS
        prefill_s = time.monotonic()
        for piece in self._drawn(context - WARM_UP - ROUNDS * timed - self._read).split(PREFILL_TOKENS, dim=1):
            _, carry = self._model.prefill(piece, carry)
        token = self._drawn(1)[:, 0]
        decoder = Decoder(self._model, carry, capture=self._capture)
        del carry
        self._carry = None  # held by the decoder alone, as `generate` holds it
        for _ in range(WARM_UP):
            decoder.step(token)
        held = self._memory()
        prefill_s = time.monotonic() - prefill_s
        seconds = []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            for _ in range(timed):
                decoder.step(token)
            self._wait()
            seconds.append((time.perf_counter() - begun) / timed)
        self._carry, self._read = decoder.carry, context
        sizes = {name: size // self._batch_size for name, size in carry_bytes(self._model, self._carry).items()}
        return DecodingRow(
            model=self._name,
            parameters=self._parameters,
            batch_size=self._batch_size,
            context=context,
            tokens_per_s=self._batch_size / median(seconds),
            spread=(max(seconds) - min(seconds)) / 2 / median(seconds),
            carry_bytes=sum(sizes.values()),
            carry=sizes,
            peak_bytes=self._peak(held, sum(sizes.values()) * self._batch_size),
            prefill_s=prefill_s,
            kernels=decoding_kernels(self._model, self._batch_size, in_place=bool(decoder.graphs)),
            graphs=len(decoder.graphs),
            graph_layers=dict(Counter(self._name_of(part) for parts in decoder.graphs for part in parts)),
            why_no_graph={self._name_of(Part(layer, True)): reason for layer, reason in decoder.why_not.items()},
        )

    def _name_of(self, part: Part) -> str:
        return str(self._model.blocks[part.layer].mixer_name) if part.mixes_tokens else "channel_mixer"

    def _drawn(self, tokens: int) -> torch.Tensor:
        return torch.randint(self._vocab_size, (self._batch_size, tokens), device=self._device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _memory(self) -> int:
        """What is allocated now; the peak is counted from here."""
        if self._device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _peak(self, held: int, carries: int) -> int | None:
        """Other models are in memory too: what steps added to that is added to what this one holds."""
        if self._device.type != "cuda":
            return None
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self._model.parameters())
        return weights + carries + torch.cuda.max_memory_allocated() - held


def _check(request: DecodingBenchConfig) -> None:
    least = WARM_UP + request.tokens + 1
    for name, values, minimum in (
        ("contexts", request.contexts, least),
        ("batch_sizes", request.batch_sizes, 1),
        ("tokens", [request.tokens], ROUNDS),
    ):
        if not values or min(values) < minimum:
            raise ConfigError(
                what=f"{name} is {values if name != 'tokens' else request.tokens}",
                where=f"bench.{name}",
                mend=f"use {minimum} or more",
            )
    if request.dtype not in DTYPES:
        raise ConfigError(what=f"dtype is {request.dtype}", where="bench.dtype", mend=f"use {' or '.join(DTYPES)}")


def _write(rows: Sequence[DecodingRow], request: DecodingBenchConfig, device: torch.device) -> None:
    record = {
        "format_version": FORMAT_VERSION,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "dtype": request.dtype,
        "request": asdict(request),
        "rows": [asdict(row) for row in rows],
    }
    write_text(Path(request.out).absolute(), json.dumps(record, indent=1) + "\n")
