"""bench models=: a row for each model, batch and context, and carries that grow as their mixers declare."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from decoding_models import taped, types_that_kernels_are_chosen_for

from subquad.__main__ import main
from subquad.commands.bench import decoding_line
from subquad.compose import load_config
from subquad.errors import ConfigError
from subquad.model.build import build_model
from subquad.model.model_carry import carry_bytes
from subquad.model.narrow import narrow
from subquad.registry import load_registry
from subquad.schema import DecodingBenchConfig
from subquad.training import bench_decoding as module
from subquad.training.bench_decoding import DecodingRow, bench_decoding
from subquad.training.decoding_plot import draw_decoding

CONTEXTS = (64, 128, 256)
TINY = ("model.d_model=64", "model.num_layers=4", "trainer.accelerator=cpu", "compiler=constant")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decoding") / "decoding.json"


@pytest.fixture(scope="module")
def rows(record: Path) -> list[DecodingRow]:
    request = DecodingBenchConfig(
        models=["transformer", "mamba", "scout_mamba", "scout_swa"],
        contexts=list(CONTEXTS),
        batch_sizes=[2],
        tokens=4,
        out=str(record),
    )
    configs = [load_config([f"model={name}", *TINY]) for name in request.models]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PREFILL_TOKENS", 48)
        return list(bench_decoding(configs, request))


def of(rows: list[DecodingRow], model: str) -> list[DecodingRow]:
    return [row for row in rows if row.model == model]


def test_carries_grow_with_context_as_their_mixers_do(rows: list[DecodingRow], record: Path, tmp_path: Path) -> None:
    assert [(row.context, row.model) for row in rows] == [
        (context, model) for context in CONTEXTS for model in ("transformer", "mamba", "scout_mamba", "scout_swa")
    ]
    assert all(row.why_not is None and row.tokens_per_s and row.tokens_per_s > 0 for row in rows)
    transformer, mamba = of(rows, "transformer"), of(rows, "mamba")
    # Keys and values of every token in every layer, of one sequence out of the two.
    assert [row.carry_bytes for row in transformer] == [4 * 2 * 64 * context * 4 for context in CONTEXTS]
    assert len({row.carry_bytes for row in mamba}) == 1
    for hybrid in ("scout_mamba", "scout_swa"):
        for left, right in pairwise(of(rows, hybrid)):
            grown = right.carry["segment_attention"] - left.carry["segment_attention"]
            assert 0 < grown < (right.context - left.context) * 2 * 2 * 64 * 4 / 4
    assert len({row.carry["mamba"] for row in of(rows, "scout_mamba")}) == 1
    written = [(row["model"], row["carry_bytes"]) for row in json.loads(record.read_text())["rows"]]
    assert written == [(row.model, row.carry_bytes) for row in rows]
    draw_decoding(rows, "cpu", tmp_path / "decoding.png")
    assert (tmp_path / "decoding.png").read_bytes().startswith(b"\x89PNG")


def test_a_carry_is_that_of_a_prefill_of_the_whole_context(rows: list[DecodingRow]) -> None:
    for row in (row for row in rows if row.context == CONTEXTS[1]):
        config = load_config([f"model={row.model}", *TINY, "model.vocab_size=256", "model.context_len=256"])
        model = build_model(config.model)
        _, carry = model.prefill(torch.zeros(1, row.context, dtype=torch.int64), model.empty_carry(1))
        assert carry_bytes(model, carry) == row.carry


def test_rows_say_which_blocks_were_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cuda_graphs", lambda device, wanted: taped if wanted else None)
    names, record = ["transformer", "mamba", "scout_mamba", "transformer_cla2"], tmp_path / "decoding.json"
    configs = [load_config([f"model={name}", *TINY]) for name in names]
    request = DecodingBenchConfig(models=names, contexts=[64, 96], tokens=4, out=str(record))
    rows = list(bench_decoding(configs, request))
    assert [(row.graphs, row.graph_layers, row.why_no_graph) for row in rows] == 2 * [
        (1, {"softmax_attention": 4, "channel_mixer": 4}, {}),
        (1, {"mamba": 4}, {}),
        (1, {"mamba": 2, "segment_attention": 2, "channel_mixer": 4}, {}),
        (4, {"channel_mixer": 4}, {"softmax_attention": "what it shares grows"}),
    ]
    assert decoding_line(rows[3]).endswith(", 4 graphs of 4 channel_mixer")
    written = json.loads(record.read_text())
    assert (written["format_version"], written["rows"][1]["graph_layers"]) == (2, {"mamba": 4})
    request = DecodingBenchConfig(models=names, contexts=[64], tokens=4, cuda_graph=False, out=str(record))
    assert [row.graphs for row in bench_decoding(configs, request)] == [0, 0, 0, 0]


def test_weights_in_bfloat16_halve_a_cache_and_leave_what_is_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen_for = types_that_kernels_are_chosen_for(monkeypatch)
    record = tmp_path / "decoding.json"
    request = DecodingBenchConfig(models=["transformer"], contexts=[64], tokens=4, dtype="bfloat16", out=str(record))
    (row,) = bench_decoding([load_config(["model=transformer", *TINY])], request)
    assert row.carry_bytes == 4 * 2 * 64 * 64 * 2
    assert json.loads(record.read_text())["dtype"] == "bfloat16"
    assert chosen_for == ["bfloat16"], "kernels for the type that weights have"
    config = load_config(["model=mamba", *TINY, "model.vocab_size=256", "model.context_len=64"])
    model = narrow(build_model(config.model), torch.bfloat16)
    pinned = {name for name in load_registry().mixer("mamba").float32_parameters if not name.startswith("back.")}
    types = {name.removeprefix("blocks.0.mixer."): value.dtype for name, value in model.named_parameters()}
    assert pinned
    assert pinned == {name for name, dtype in types.items() if dtype == torch.float32 and "blocks" not in name}
    with pytest.raises(ConfigError, match="dtype is float16"):
        next(bench_decoding([config], DecodingBenchConfig(models=["mamba"], dtype="float16")))


def test_what_does_not_fit_is_left_out_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from subquad.model.language_model import LanguageModel

    whole = LanguageModel.prefill

    def prefill(self: LanguageModel, tokens: torch.Tensor, carry: object) -> object:
        if self.blocks[0].mixer_name == "softmax_attention" and tokens.shape[1] > 100:
            raise torch.OutOfMemoryError
        return whole(self, tokens, carry)  # type: ignore[arg-type]

    monkeypatch.setattr(LanguageModel, "prefill", prefill)
    out = tmp_path / "decoding.json"
    names = ["transformer", "mamba"]
    request = DecodingBenchConfig(models=names, contexts=[64, 256, 300], tokens=4, out=str(out))
    found = list(bench_decoding([load_config([f"model={name}", *TINY]) for name in names], request))
    assert [row.why_not for row in of(found, "transformer")] == [
        None, "more memory than there is", "a shorter context took more memory than there is",
    ]  # fmt: skip
    assert [row.why_not for row in of(found, "mamba")] == [None] * 3
    late = DecodingBenchConfig(models=["mamba"], contexts=[64], tokens=4, budget_s=-1.0, out=str(out))
    (row,) = bench_decoding([load_config(["model=mamba", *TINY])], late)
    assert row.why_not == "no time is left"


@pytest.mark.parametrize(
    ("fields", "where"),
    [({"contexts": [40]}, "contexts"), ({"batch_sizes": [0]}, "batch_sizes"), ({"tokens": 3}, "tokens")],
)
def test_sizes_that_cannot_be_are_refused(fields: dict[str, list[int]], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        next(bench_decoding([load_config(["model=mamba", *TINY])], DecodingBenchConfig(models=["mamba"], **fields)))
    assert caught.value.where == f"bench.{where}"


def test_the_command_prints_rows_and_writes_record_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = f"overrides=[{','.join(TINY)}]"
    assert main(["bench", "models=[mamba]", "contexts=[64]", "tokens=4", "plot=true", overrides]) == 0
    printed = capsys.readouterr().out
    assert "mamba              batch 1   context      64" in printed
    assert str(tmp_path / "bench-decoding.json") in printed
    assert (tmp_path / "bench-decoding.png").is_file()
    assert main(["bench", "models=mamba", "contexts=64", "tokens=4", "overrides=trainer.accelerator=cpu"]) == 0
    assert "mamba              batch 1   context      64" in capsys.readouterr().out, "one is a list of one"
    assert main(["bench", "models=[]"]) == 2
    assert "no model is named" in capsys.readouterr().err
