"""What the tables of quality are made of: models, tasks, learning rates and seeds, as arguments of `subquad train`.

A cell is one run of training. In a study every model trains on the same tokens, as many parameters (the width of the
channel mixers is chosen for that), and the same learning rates. Cells come breadth first: each prefix is a table.

Study `mixers`: each installed mixer in every layer.
    text   four blocks of a mixer and a channel mixer, 128 wide; the source text of the Python standard library
    mqar   two layers of a token shift (`rwkv_channel_mix`: two tokens, the short convolution that Zoology puts in
           front of every mixer) and a mixer, 64 wide; 4, 16 and 64 pairs in one training set, judged apart
Study `scout`: five models of the SCOUT paper's comparison, four blocks each with a channel mixer, as in conf/model.
    text   192 wide, rows of 1,024 tokens, judged by context as well
    mqar   as above, 64 wide, with no token shift: what is local is the models' own
    speed  nothing is learnt: tokens/s of training and decoding, and what a carry holds, alone on the device
Study `scout_30m`: the same five at thirty million parameters, and SCOUT with other segment lengths beside its ten.
    text   eight blocks, 512 wide, rows of 16,384 tokens, judged by context from 1,024 on; windows of 512 tokens
    mqar   four blocks, 128 wide; 4,000 steps: without a token shift to begin with, a thousand taught no model to recall
    speed  as above
Study `scout_30m_long`: the five again, trained for longer; each first at the rate that served it better in `scout_30m`.
    text   as in `scout_30m`, four times as many tokens; each at a third rate too, beyond its better one
    mqar   as in `scout_30m`, four times as many rows a step: with 32 a step hardly any model learned to recall
Study `scout_recall`: what the models of `scout_30m` remember where nobody need learn to look a token back.
    mqar   six blocks, 64 wide: before every two of the model's own a token shift, as in study `mixers`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any
from zlib import crc32

RATES = (3e-3, 1e-3, 1e-2)
"""Around the default of AdamW here; the order in which they are tried."""
LARGE_RATES = (3e-3, 1e-3)
SEEDS = (0, 1)
SIZES = (4, 16, 64)
"""Key-value pairs of multi-query associative recall."""
SERIAL = (
    "slstm", "ttt_mlp_mamba", "ttt_mlp", "ttt_linear_mamba", "ttt_linear", "log_linear_gated_delta_net",
    "log_linear_mamba2", "log_linear",
)  # fmt: skip
"""Mixers of torch kernels with many launches, the slowest first: they start before the others."""
QUICK = ("rwkv_channel_mix", "transformer")
"""Models that compile next to nothing."""
SCHEDULES = {
    "scout_mamba": ("mamba", "segment_attention"),
    "scout_swa": ("window", "segment_attention"),
    "mamba": ("mamba",),
    "transformer": ("softmax_attention",),
    "transformer_window": ("window",),
}
HEAD_DIM = 32
SEGMENTS = (4, 32, 128)
"""Lengths that study `scout_30m` tries beside the paper's ten: the model of each is `scout_mamba_segment4`, ..."""
SEGMENT_LEN = 10
SWEEP = {f"scout_mamba_segment{length}": length for length in SEGMENTS}
LONG_RATES = {name: 3e-3 if "mamba" in schedule else 1e-3 for name, schedule in SCHEDULES.items()}
"""The better one of `LARGE_RATES` on text, after 200 steps, for each model of study `scout_30m`."""
OUTER_RATES = {min(LARGE_RATES): 3e-4, max(LARGE_RATES): 1e-2}
"""In the long study, a third rate: the one beyond the better of two, so that the best is not at an end."""
WIDE = {"window": 512}
"""What study `scout_30m` sets in place of a mixer's default, by field."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A task as a study asks for it: width, tokens, steps, and the parameters that every model gets."""

    d_model: int
    seq_len: int
    batch_size: int
    steps: int
    parameters: int
    data: tuple[str, ...]


TEXT = ("data=python_source",)
EIGHT = (
    "model.num_layers=8",
    "trainer.validation_batches=8",  # rows are sixteen times as long as elsewhere
    "trainer.learning_rate_warmup_steps=20",
    "compiler.estimator=learned",  # at this size kernels decide what is affordable; elsewhere defaults run
)
MQAR = (
    "data=synthetic", "data.task=mqar", f"data.sizes=[{','.join(map(str, SIZES))}]", "data.vocab_size=256",
    "trainer.precision=float32",  # what is told apart is memory, not rounding
)  # fmt: skip
SETTINGS: Mapping[tuple[str, str], Setting] = {
    ("mixers", "text"): Setting(
        d_model=128, seq_len=256, batch_size=32, steps=500, parameters=1_250_000, data=TEXT
    ),
    ("mixers", "mqar"): Setting(
        d_model=64, seq_len=256, batch_size=32, steps=1000, parameters=200_000, data=MQAR
    ),
    ("scout", "text"): Setting(
        d_model=192, seq_len=1024, batch_size=8, steps=600, parameters=1_750_000, data=TEXT
    ),
    ("scout", "mqar"): Setting(
        d_model=64, seq_len=256, batch_size=32, steps=1000, parameters=200_000, data=MQAR
    ),
    ("scout", "speed"): Setting(
        d_model=192, seq_len=1024, batch_size=8, steps=0, parameters=1_750_000, data=TEXT
    ),
    ("scout_30m", "text"): Setting(
        d_model=512, seq_len=16384, batch_size=4, steps=200, parameters=30_000_000, data=(*TEXT, *EIGHT)
    ),
    ("scout_30m", "mqar"): Setting(
        d_model=128, seq_len=256, batch_size=32, steps=4000, parameters=1_000_000, data=MQAR
    ),
    ("scout_30m", "speed"): Setting(
        d_model=512, seq_len=16384, batch_size=1, steps=0, parameters=30_000_000, data=(*TEXT, *EIGHT)
    ),
    ("scout_30m_long", "text"): Setting(
        d_model=512, seq_len=16384, batch_size=4, steps=800, parameters=30_000_000, data=(*TEXT, *EIGHT)
    ),
    ("scout_30m_long", "mqar"): Setting(
        d_model=128, seq_len=256, batch_size=128, steps=4000, parameters=1_000_000, data=MQAR
    ),
    ("scout_recall", "mqar"): Setting(
        d_model=64, seq_len=256, batch_size=32, steps=1000, parameters=300_000, data=(*MQAR, "model.num_layers=6")
    ),
}  # fmt: skip
STUDIES = ("mixers", "scout", "scout_30m", "scout_30m_long", "scout_recall")
LARGE = ("scout_30m", "scout_30m_long")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: which model learns what, how fast, and from which seed."""

    study: str
    task: str
    model: str
    learning_rate: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        """What the record calls it; with another number of steps or another setting it is another cell."""
        rate, setting = f"{self.learning_rate:g}", crc32(repr(self.setting).encode())
        parts = (self.study, self.task, self.model, rate, f"seed{self.seed}", f"{self.steps}steps", f"{setting:08x}")
        return "/".join(parts)

    @property
    def setting(self) -> Setting:
        return SETTINGS[self.study, self.task]


def cells(study: str, models: tuple[str, ...], steps: int | None = None) -> list[Cell]:
    """All runs of a study in the order in which they are made; `steps` replaces the settings' own."""
    order = [*(name for name in SERIAL if name in models), *(name for name in models if name not in SERIAL)]
    made = []
    for task, rate, seed, is_wanted in _passes(study):
        wanted = SETTINGS[study, task].steps
        wanted = wanted if steps is None or not wanted else steps
        made += [
            Cell(study=study, task=task, model=name, learning_rate=rate, seed=seed, steps=wanted)
            for name in order
            if is_wanted(name)
        ]
    return made


def models_of(study: str) -> tuple[str, ...] | None:
    """The models of a study; None: every installed mixer."""
    if study == "mixers":
        return None
    return (*SCHEDULES, *SWEEP) if study in ("scout_30m", "scout_recall") else tuple(SCHEDULES)


def _passes(study: str) -> Iterator[tuple[str, float, int, Callable[[str], bool]]]:
    """Task, rate, seed and whose turn it is: what is alone on the device, tasks at each rate, then the next seed.

    Of a study of large models text comes first, and segment lengths after all models.
    """
    if study == "scout_30m":
        yield "speed", 0.0, 0, SCHEDULES.__contains__
        for seed, rate in product(SEEDS, LARGE_RATES):
            for models, task in product((SCHEDULES, SWEEP), ("text", "mqar")):
                yield task, rate, seed, models.__contains__
        return
    if study == "scout_30m_long":
        for seed in SEEDS:
            for better, rate in product((True, False), LARGE_RATES):
                yield "text", rate, seed, lambda name, rate=rate, better=better: (LONG_RATES[name] == rate) == better
            for rate, outer in OUTER_RATES.items():
                yield "text", outer, seed, lambda name, rate=rate: LONG_RATES[name] == rate
            for rate in LARGE_RATES:
                yield "mqar", rate, seed, bool
        return
    if study == "scout_recall":
        for seed, rate in product(SEEDS, RATES):
            yield "mqar", rate, seed, bool
        return
    if study == "scout":
        yield "speed", 0.0, 0, bool
    for seed, rate, task in product(SEEDS, RATES, ("mqar", "text")):
        yield task, rate, seed, bool


def overrides(cell: Cell, width: int) -> list[str]:
    """The arguments of `subquad train` that repeat a cell; `width` is that of its channel mixers or token shifts."""
    setting = cell.setting
    if cell.study == "mixers":
        schedule = ("shift", cell.model) if cell.task == "mqar" else (cell.model,)
    else:
        schedule = SCHEDULES["scout_mamba" if cell.model in SWEEP else cell.model]
        if cell.study == "scout_recall":
            schedule = ("shift", *(schedule * 2)[:2])
    entries = {name: _entry(name, setting.d_model, width) for name in schedule}
    if cell.study in LARGE or cell.model in SWEEP:
        for name in {"window", "segment_attention"} & entries.keys():
            entries[name] |= WIDE if name == "window" else {"segment_len": SWEEP.get(cell.model, SEGMENT_LEN)}
    return [
        "model=transformer",
        f"model.name={cell.model}",
        f"model.d_model={setting.d_model}",
        "model.num_layers=4",
        # The default, 0.02, is for wide models: so narrow a one would begin with queries that match nothing.
        "model.init_std=width",
        f"model.schedule=[{','.join(schedule)}]",
        *(f"++model.mixers.{name}={_flow(entry)}" for name, entry in entries.items()),
        "model.channel_mixer=null" if "shift" in schedule else f"model.channel_mixer.d_hidden={width}",
        f"trainer.seq_len={setting.seq_len}",
        f"trainer.batch_size={setting.batch_size}",
        f"trainer.max_steps={max(1, cell.steps)}",
        "trainer.max_seconds=null",
        "trainer.learning_rate_warmup_steps=100",
        "trainer.validate_every_n_steps=0",
        "trainer.validation_batches=32",
        "trainer.log_every_n_steps=50",
        "trainer.progress_bar=false",
        f"optimizer.lr={cell.learning_rate or RATES[0]:g}",
        f"seed={cell.seed}",
        "checkpoint.every_n_steps=0",
        "checkpoint.keep=1",
        "compiler=constant",
        "deny=[flex_attention]",  # never the default, and its check would have torch.compile run for every cell
        "calibrate=never",
        *setting.data,  # last, so that they win
    ]


def _entry(name: str, d_model: int, width: int) -> dict[str, Any]:
    """A mixer with heads of 32 channels (64 in wide models), and what else its defaults would make too large."""
    if name == "shift":
        return {"mixer": "rwkv_channel_mix", "d_hidden": width}
    if name == "rwkv_channel_mix":
        return {"mixer": name, "d_hidden": 2 * d_model}
    if name in ("mamba", "short_conv"):
        return {"mixer": name}
    if name in ("mamba2", "mamba3", "log_linear_mamba2"):
        return {"mixer": name, "head_dim": HEAD_DIM, "state_dim": 64}
    return {"mixer": name, "num_heads": d_model // (HEAD_DIM if d_model < 512 else 2 * HEAD_DIM)}


def _flow(entry: Mapping[str, Any]) -> str:
    return "{" + ",".join(f"{key}:{value}" for key, value in entry.items()) + "}"
