"""Strings under a run's model, beside one call of the model a token; lm-eval's tasks where it is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding_models import taped, types_that_kernels_are_chosen_for

from subquad.errors import ConfigError, DataError, NotFoundError
from subquad.model.decoder import Decoder
from subquad.schema import EvaluateConfig, RunConfig
from subquad.training.evaluation import likelihood as likelihood_module
from subquad.training.evaluation.evaluate import evaluate
from subquad.training.evaluation.likelihood import Likelihood, windows_of
from subquad.training.evaluation.lm_eval_adapter import metrics_of
from subquad.training.evaluation.loaded_run import load
from subquad.training.fit import train
from subquad.training.tokenizer import ByteTokenizer

TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("likelihood")


@pytest.fixture
def run(tiny_run: Callable[..., RunConfig], place: Path) -> Path:
    folder = place / "run"
    return folder if folder.exists() else train(tiny_run("run", max_steps=12, run={"run_dir": str(folder)})).run_dir


def plain(run: Path, read: bytes, predicted: bytes, max_len: int) -> tuple[float, bool]:
    """log p(predicted | read), a call of the model a byte."""
    model, nats, greedy = load(run, "run").model, 0.0, True
    for byte in predicted:
        with torch.inference_mode():
            logits = model(torch.tensor([list(read[-max_len:])]))[0, -1].double()
        nats += float(torch.log_softmax(logits, 0)[byte])
        greedy &= int(logits.argmax()) == byte
        read += bytes([byte])
    return nats, greedy


def test_continuations_are_scored_as_byte_by_byte(run: Path) -> None:
    likelihood = Likelihood(load(run, "run"), ByteTokenizer(), max_len=64)
    pairs = [("the cat", " sat"), ("", "the"), ("the cat ", "sat on the mat"), ("a" * 50, "b"), ("dog\n\n", "x")]
    for (context, continuation), scored in zip(pairs, likelihood.of_continuations(pairs), strict=True):
        # White space that ends a context is predicted too: it goes to the continuation.
        read = context.rstrip()
        nats, greedy = plain(run, read.encode() or b"\n", (context[len(read) :] + continuation).encode(), 64)
        assert scored.log_probability == pytest.approx(nats, rel=1e-5)
        assert scored.greedy == greedy


def test_a_likeliest_continuation_is_greedy_and_another_is_not(run: Path) -> None:
    likelihood = Likelihood(load(run, "run"), ByteTokenizer(), max_len=64)
    likeliest = likelihood.continuation("the quick", [], 4)
    assert len(likeliest) == 4
    other = likeliest[:-1] + chr(ord(likeliest[-1]) ^ 1)
    scored = likelihood.of_continuations([("the quick", likeliest), ("the quick", other)])
    assert [one.greedy for one in scored] == [True, False]
    assert plain(run, b"the quick", likeliest.encode(), 64)[1]
    stop = likeliest[2]
    assert likelihood.continuation("the quick", ["never", stop], 4) == likeliest[: likeliest.index(stop)]


def test_texts_are_written_on_the_same_weights_by_kernels_for_decoding(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of whole rows are chosen for the precision of training; every step is replayed where texts are long."""
    loaded = load(run, "run")
    expected = Likelihood(loaded, ByteTokenizer(), max_len=64).continuation("the quick", [], 48)
    types = types_that_kernels_are_chosen_for(monkeypatch)
    decoders = list[Decoder]()

    def decoder(*arguments: Any, **rest: Any) -> Decoder:
        decoders.append(Decoder(*arguments, **rest))
        return decoders[-1]

    monkeypatch.setattr(likelihood_module, "Decoder", decoder)
    monkeypatch.setattr(likelihood_module, "cuda_graphs", lambda device, wanted: taped if wanted else None)
    likelihood = Likelihood(loaded, ByteTokenizer(), max_len=64)
    assert likelihood.continuation("the quick", [], 48) == expected
    assert likelihood.continuation("the quick", [], 5) == expected[:5]
    assert types == ["float32"]
    assert [bool(one.graphs) for one in decoders] == [True, False]
    of_decoder, of_run = (list(model.parameters()) for model in (decoders[0]._model, loaded.model))
    assert [one.data_ptr() for one in of_decoder] == [one.data_ptr() for one in of_run]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 20, 24])
def test_windows_predict_each_token_once_from_full_contexts(length: int) -> None:
    tokens = list(range(100, 100 + length))
    windows = list(windows_of(tokens, 7, 8))
    assert [token for window in windows for token in window.targets] == tokens
    read = [7, *tokens]
    for window in windows:
        end = tokens.index(window.targets[-1]) + 1
        assert window.inputs == read[max(0, end - 8) : end]
        assert len(window.inputs) == 8 or window is windows[0]


def test_long_texts_are_scored_in_windows(run: Path) -> None:
    likelihood = Likelihood(load(run, "run"), ByteTokenizer(), max_len=16)
    texts = [TEXT, "", "short"]
    scores = likelihood.of_texts(texts)
    assert scores[1] == 0.0
    data = TEXT.encode()
    first = plain(run, b"\n", data[:16], 16)[0]
    # Within a window contexts grow from the window's first token on; the last window begins early enough to be full.
    second = sum(plain_in_window(run, (b"\n" + data)[16:32], data[16:32]))
    third = sum(plain_in_window(run, (b"\n" + data)[len(data) - 16 : len(data)], data[32:]))
    assert scores[0] == pytest.approx(first + second + third, rel=1e-5)
    assert scores[2] == pytest.approx(plain(run, b"\n", b"short", 16)[0], rel=1e-5)


def plain_in_window(run: Path, inputs: bytes, targets: bytes) -> list[float]:
    model, skipped = load(run, "run").model, len(inputs) - len(targets)
    with torch.inference_mode():
        return [
            float(torch.log_softmax(model(torch.tensor([list(inputs[: skipped + i + 1])]))[0, -1].double(), 0)[byte])
            for i, byte in enumerate(targets)
        ]


def test_a_continuation_that_is_too_long_is_refused(run: Path) -> None:
    with pytest.raises(DataError, match="9 tokens, more than 8"):
        Likelihood(load(run, "run"), ByteTokenizer(), max_len=8).of_continuations([("a", "b" * 9)])


def test_metrics_are_read_from_lm_evals_keys() -> None:
    values = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 3, " ": " "}
    values |= {"exact_match,strict": 1, "exact_match_stderr,strict": 0.25}
    assert metrics_of(values) == {"acc": (0.5, None), "exact_match (strict)": (1.0, 0.25)}


def test_without_lm_eval_the_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match="lm_eval is not installed") as caught:
        evaluate(EvaluateConfig(run=str(run), suite="lm_eval", tasks=["arc_easy"]))
    assert "subquad[eval]" in caught.value.mend


# With lm-eval itself, on tasks written here, so that nothing is downloaded.

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
{rest}
"""
CHOICES = """
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
"""
GENERATED = """
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["\\n\\n\\n"], max_gen_toks: 5}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.filterwarnings("ignore")  # of other packages: lm-eval's, and those of what it loads
def test_tasks_of_lm_eval_get_the_scores_of_plain_sums(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    likelihood = Likelihood(load(run, "run"), ByteTokenizer(), max_len=32)
    documents: list[dict[str, Any]] = []
    for number, question in enumerate(("the quick", "the cat", "the lazy dog and")):
        choices = [" brown", " zzzzq", " sat on"]
        scores = [plain(run, question.encode(), choice.encode(), 32)[0] for choice in choices]
        best = scores.index(max(scores))
        # Two answers are the model's own, one is not.
        written = likelihood.continuation(question, [], 5)
        documents.append({"question": question, "choices": choices, "answer": best if number else (best + 1) % 3,
                          "written": written if number else "other"})  # fmt: skip
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    paths = []
    for name, kind, rest in (
        ("choices_here", "multiple_choice", CHOICES),
        ("text_here", "loglikelihood_rolling", ROLLING),
        ("written_here", "generate_until", GENERATED),
    ):
        path = tmp_path / f"{name}.yaml"
        path.write_text(TASK.format(name=name, data=data, kind=kind, rest=rest))
        paths.append(str(path))
    record: Any = evaluate(EvaluateConfig(run=str(run), suite="lm_eval", tasks=paths))[2]
    assert record["tasks"]["choices_here"]["acc"][0] == pytest.approx(2 / 3)
    assert record["tasks"]["written_here"]["exact_match"][0] == pytest.approx(2 / 3)
    questions = [document["question"].encode() for document in documents]
    nats = sum(plain(run, b"\n", question, 32)[0] for question in questions)
    bits = -nats / sum(map(len, questions)) / torch.log(torch.tensor(2.0)).item()
    assert record["tasks"]["text_here"]["bits_per_byte"][0] == pytest.approx(bits, rel=1e-5)
    assert "choices_here" in (run / "evaluation.md").read_text()
    with pytest.raises(NotFoundError, match="has no task 'no_such_task'"):
        evaluate(EvaluateConfig(run=str(run), suite="lm_eval", tasks=["no_such_task"]))
