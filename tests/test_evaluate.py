"""Evaluation: figures beside plain sums over a model's probabilities, tasks beside chance, the record read back."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from subquad.__main__ import main
from subquad.commands.evaluate import evaluate_config
from subquad.compiler.svg import LogPlot, standalone
from subquad.errors import ConfigError, ResumeError
from subquad.schema import EvaluateConfig, RunConfig, TokenizerConfig
from subquad.training.data import FixedBatches, build_data
from subquad.training.evaluation import synthetic
from subquad.training.evaluation.evaluate import evaluate
from subquad.training.evaluation.loaded_run import LoadedRun, load
from subquad.training.evaluation.text import contexts, cut_rows
from subquad.training.fit import train
from subquad.training.metrics import read_metrics
from subquad.training.tasks.catalogue import TASKS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def text_run(tiny_run: Callable[..., RunConfig], place: Path) -> Path:
    """A run on text, trained once for all tests of this file."""
    folder = place / "text"
    return folder if folder.exists() else train(tiny_run("text", max_steps=12, run={"run_dir": str(folder)})).run_dir


@pytest.fixture
def task_run(tiny_run: Callable[..., RunConfig], place: Path) -> Path:
    """A run that has learnt to copy one of four symbols."""
    folder = place / "copying"
    if folder.exists():
        return folder
    data = {"name": "synthetic", "task": "copying", "sizes": [1, 4], "vocab_size": 8}
    run = {"data": data, "run_dir": str(folder), "optimizer": {"name": "adamw", "lr": 1e-2}}
    return train(tiny_run("copying", max_steps=150, batch_size=32, seq_len=12, every=150,
                          validate_every_n_steps=150, log_every_n_steps=50, run=run)).run_dir  # fmt: skip


def evaluated(run: Path, **request: Any) -> dict[str, Any]:
    return evaluate(EvaluateConfig(run=str(run), **request))[2]


def test_the_whole_split_has_the_bits_per_byte_that_training_found(text_run: Path) -> None:
    last = read_metrics(text_run / "metrics.csv")[-1]
    record = evaluated(text_run)
    assert record["step"] == 12
    assert record["by_length"][-1]["length"] == 32
    assert record["by_length"][-1]["bits_per_byte"] == pytest.approx(last["val/bits_per_byte"], rel=1e-6)
    assert record["by_length"][-1]["perplexity"] == pytest.approx(math.exp(last["val/loss"]), rel=1e-6)


def test_figures_are_sums_over_the_models_probabilities(text_run: Path) -> None:
    """Beside a loop over targets, each predicted from its own document's tokens alone, one call a target."""
    run = load(text_run, "run")
    source = build_data(run.config).source
    batch = FixedBatches(source, batch_size=2, num_batches=2, rank=0, world_size=1)
    bits: dict[tuple[int, int], list[float]] = {}
    for item in (batch[0], batch[1]):
        assert item["cu_seqlens"] is not None
        starts = set(item["cu_seqlens"].tolist())
        tokens, targets = item["tokens"].flatten().tolist(), item["targets"].flatten().tolist()
        for length in (8, 32):
            begin = 0
            for position, target in enumerate(targets):
                if position in starts or position % length == 0:
                    begin = position
                if target == -100:
                    continue
                logits = run.logits(torch.tensor([tokens[begin : position + 1]]))[0, -1].double()
                bits.setdefault((length, position + 1 - begin), []).append(
                    float(-torch.log_softmax(logits, 0)[target]) / math.log(2)
                )
    record = evaluated(text_run, lengths=[8, 32], samples=4)
    for row in record["by_length"]:
        expected = [bit for (length, _), found in bits.items() if length == row["length"] for bit in found]
        assert row["tokens"] == row["bytes"] == len(expected)
        assert row["bits_per_byte"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert [row["first"] for row in record["by_position"]] == [1, 2, 4, 8, 16, 32]
    for row in record["by_position"]:
        expected = [bit for (length, seen), found in bits.items()
                    if length == 32 and row["first"] <= seen <= row["last"] for bit in found]  # fmt: skip
        assert row["tokens"] == len(expected)
        assert row["bits_per_byte"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_every_length_predicts_the_same_targets(text_run: Path) -> None:
    record = evaluated(text_run, lengths=[4, 16, 64], samples=3)
    assert {row["tokens"] for row in record["by_length"]} == {record["by_length"][0]["tokens"]}
    assert sum(row["tokens"] for row in record["by_position"]) == record["by_length"][0]["tokens"]
    assert record["longest"] == 64 != record["trained_length"]


def test_rows_are_cut_with_their_documents() -> None:
    bounds = torch.tensor([0, 3, 8, 13, 16], dtype=torch.int32)
    batch: Any = {"tokens": torch.arange(16).view(2, 8), "targets": torch.arange(1, 17).view(2, 8),
                  "cu_seqlens": bounds, "sample_ids": torch.tensor([0, 1]), "target_bytes": 16}  # fmt: skip
    cut = cut_rows(batch, 4)
    assert cut["cu_seqlens"] is not None
    assert cut["cu_seqlens"].tolist() == [0, 3, 4, 8, 12, 13, 16]
    assert cut["tokens"].tolist() == torch.arange(16).view(4, 4).tolist()
    assert contexts((4, 4), cut["cu_seqlens"]).tolist() == [[1, 2, 3, 1], [1, 2, 3, 4], [1, 2, 3, 4], [1, 1, 2, 3]]
    assert contexts((2, 3), None).tolist() == [[1, 2, 3], [1, 2, 3]]


def test_bytes_are_counted_target_by_target(tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator(["the quick brown fox jumps over the lazy dog and the cat sat on the mat"] * 9, trainer)
    words.save(str(tmp_path / "words.json"))
    tokenizer = TokenizerConfig(kind="file", file=str(tmp_path / "words.json"))
    run = train(tiny_run("words", max_steps=1, run={"tokenizer": tokenizer})).run_dir
    record = evaluated(run)
    last = read_metrics(run / "metrics.csv")[-1]
    total = record["by_length"][-1]
    assert total["bytes"] > total["tokens"]
    assert total["bits_per_byte"] == pytest.approx(last["val/bits_per_byte"], rel=1e-6)
    assert sum(row["bytes"] for row in record["by_position"]) == total["bytes"]


def test_a_model_trained_on_a_task_beats_chance_and_another_does_not(task_run: Path, text_run: Path) -> None:
    record = evaluated(task_run)
    assert record["trained_on"] == "this task"
    assert [(level["length"], level["size"], level["rows"]) for level in record["levels"]] == [
        (12, 1, 256),
        (12, 4, 256),
    ]
    one, four = record["levels"]
    assert one["chance"] == four["chance"] == pytest.approx(1 / 6)
    assert one["answers"] == 256 and four["answers"] == 1024
    assert one["accuracy"] == one["exact"] > 0.9
    assert four["accuracy"] > 0.5
    assert four["exact"] <= four["accuracy"]
    other = evaluated(text_run, suite="copying", sizes=[4], samples=64)
    assert other["trained_on"] == "text_files"
    assert other["levels"][0]["accuracy"] < 0.3


def test_a_right_and_a_wrong_model_score_one_and_nothing(task_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting itself: stand-ins for the model that know the answers, or all but one of a row's."""
    rows = synthetic.rows(TASKS["copying"], 0, 12, 4, 8, 20)
    answers = {row.tokens.tobytes(): row.targets for row in rows}

    def stand_in(wrong: int) -> Callable[..., torch.Tensor]:
        def logits(self: LoadedRun, tokens: torch.Tensor, cu_seqlens: None = None) -> torch.Tensor:
            given = np.stack([answers[row.numpy().tobytes()] for row in tokens]).clip(0)
            given[:, given.shape[1] - wrong :] = 0
            return torch.nn.functional.one_hot(torch.from_numpy(given), 8).float()

        return logits

    for wrong, accuracy, exact in ((0, 1.0, 1.0), (1, 0.75, 0.0), (4, 0.0, 0.0)):
        monkeypatch.setattr(LoadedRun, "logits", stand_in(wrong))
        level = evaluated(task_run, sizes=[4], samples=20)["levels"][0]
        assert (level["accuracy"], level["exact"]) == (accuracy, exact)


def test_an_evaluation_is_repeatable_and_its_seed_matters(task_run: Path) -> None:
    # A task that it has not learnt, so that other rows give other figures.
    asked: dict[str, Any] = {"suite": "parity", "sizes": [8], "samples": 64}
    first, again, other = (evaluated(task_run, seed=seed, **asked)["levels"] for seed in (0, 0, 1))
    assert first == again != other
    assert evaluated(task_run, batch_size=3, **asked)["levels"] == first


def test_the_record_holds_every_suite_and_the_pictures_stand_alone(task_run: Path) -> None:
    (task_run / "evaluation.json").unlink(missing_ok=True)
    for suite, lengths in (("copying", [12, 24]), ("parity", [])):
        evaluated(task_run, suite=suite, sizes=[1, 2, 4], samples=16, lengths=lengths)
    record = json.loads((task_run / "evaluation.json").read_text())
    assert record["format_version"] == 1
    assert list(record["suites"]) == ["copying", "parity"]
    levels = record["suites"]["copying"]["levels"]
    assert [(level["length"], level["size"]) for level in levels] == [(n, s) for n in (12, 24) for s in (1, 2, 4)]
    text = (task_run / "evaluation.md").read_text()
    for suite in record["suites"]:
        assert f"![accuracy of {suite}](evaluation-{suite}.svg)" in text
        picture = (task_run / f"evaluation-{suite}.svg").read_text()
        root = ElementTree.fromstring(picture)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        drawn = len(root.findall(".//{http://www.w3.org/2000/svg}circle"))
        assert drawn == len(record["suites"][suite]["levels"])
        assert picture.count("http") == 1, "it refers to nothing but its namespace"
    assert "has never seen this task" in text
    for level in levels:
        assert f"| {level['accuracy']:.4f} |" in text


def test_points_lie_where_the_axes_say() -> None:
    plot = LogPlot(x=(1, 100), y=(0, 1), x_label="x", y_label="y", linear_y=True, x_ticks=[1, 10, 100])
    plot.point(10, 0.5, "middle", "red", filled=True)
    root = ElementTree.fromstring(standalone(plot.drawn()))
    svg = "{http://www.w3.org/2000/svg}"
    (dot,) = root.findall(f".//{svg}circle")
    texts = {text.text: text for text in root.findall(f".//{svg}text")}
    assert {"1", "10", "100", "0", "0.2", "0.4", "0.6", "0.8", "x", "y"} <= set(texts)
    assert float(texts["10"].attrib["x"]) == float(dot.attrib["cx"])
    between = float(texts["0.4"].attrib["y"]) + float(texts["0.6"].attrib["y"])
    assert between / 2 - 4 == pytest.approx(float(dot.attrib["cy"]), abs=0.02)


def test_the_verb_prints_what_it_writes(text_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", f"run={text_run}", "lengths=[16,32]"]) == 0
    out = capsys.readouterr().out
    record = json.loads((text_run / "evaluation.json").read_text())["suites"]["text"]
    for row in (*record["by_length"], *record["by_position"]):
        assert f"{row['bits_per_byte']:.4f}" in out
    for name in ("evaluation-length.svg", "evaluation-position.svg"):
        ElementTree.parse(text_run / name)
    assert main(["evaluate", "--help"]) == 0
    assert "suite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("request_", "error", "where"),
    [
        ({"suite": "mqra"}, ConfigError, "evaluate.suite"),
        ({"suite": "text"}, ConfigError, "evaluate.suite"),
        ({"suite": "needle"}, ConfigError, "evaluate.suite"),
        ({"sizes": [7]}, ConfigError, "evaluate.sizes"),
        ({"sizes": [0]}, ConfigError, "evaluate.sizes"),
        ({"lengths": [-1]}, ConfigError, "evaluate.lengths"),
        ({"samples": -1}, ConfigError, "evaluate.samples"),
        ({"seed": -1}, ConfigError, "evaluate.seed"),
        ({"tasks": ["arc_easy"]}, ConfigError, "evaluate.tasks"),
        ({"suite": "lm_eval"}, ConfigError, "evaluate.tasks"),
    ],
)
def test_mistakes_are_named(request_: dict[str, Any], error: type[Exception], where: str, task_run: Path) -> None:
    with pytest.raises(error) as caught:
        evaluated(task_run, **request_)
    assert caught.value.where == where  # type: ignore[attr-defined]


def test_lengths_that_do_not_divide_the_longest_are_refused(text_run: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be cut into rows of 12") as caught:
        evaluated(text_run, lengths=[12, 32])
    assert caught.value.where == "evaluate.lengths"


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResumeError):
        evaluated(tmp_path)
    with pytest.raises(ConfigError) as caught:
        evaluate_config(["suite=mqar"])
    assert caught.value.where == "evaluate.run"


def test_a_corpus_that_has_changed_since_is_refused(
    tiny_run: Callable[..., RunConfig], tmp_path: Path, tiny_corpus: Path
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(tiny_corpus.read_text())
    run = train(tiny_run("run", max_steps=1, run={"data": {"name": "text_files", "files": [str(corpus)]}})).run_dir
    corpus.write_text(tiny_corpus.read_text().replace("cat", "cow"))
    with pytest.raises(ResumeError, match="the data have changed"):
        evaluated(run)
