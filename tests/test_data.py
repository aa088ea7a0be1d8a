"""Batches: boundaries as brute force finds them, targets within a document, resume that repeats and skips nothing."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subquad.errors import ConfigError, DataError, NotFoundError
from subquad.schema import RunConfig, TokenizerConfig, TrainerConfig
from subquad.training.batch import Batch
from subquad.training.data import FixedBatches, NumberedBatches, TextData, build_data, shuffled
from subquad.training.sources.configs import SyntheticConfig, TextFilesConfig
from subquad.training.sources.packed_text import PackedText
from subquad.training.sources.source import DataContext
from subquad.training.sources.synthetic import Synthetic
from subquad.training.sources.text_files import build as build_text_files
from subquad.training.tokenizer import ByteTokenizer

SEQ_LEN = 8


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Documents of lengths 1 to 30 with bytes that say which document they are from, and one held-out file."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.txt").write_bytes(bytes([33 + number]) * (1 + number))
    (folder / "held.txt").write_bytes(b"held out, and of no other kind")
    return folder


def config_of(corpus: Path, **trainer: Any) -> RunConfig:
    return RunConfig(
        data={"name": "text_files", "files": [f"{corpus}/*.txt"], "validation_files": [f"{corpus}/held.txt"]},
        trainer=TrainerConfig(**{"batch_size": 3, "seq_len": SEQ_LEN, "accelerator": "cpu", **trainer}),
        seed=5,
    )


def take(loader: Any, count: int) -> list[Batch]:
    iterator = iter(loader)
    taken = [next(iterator) for _ in range(count)]
    del iterator  # stops worker processes
    return taken


def ids(batches: list[Batch]) -> list[list[int]]:
    return [batch["sample_ids"].tolist() for batch in batches]


# Rows and boundaries


def brute_force(corpus: Path, sample_id: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens, targets and the document number of each token, counted out by hand."""
    stream: list[tuple[int, int]] = []
    for number, path in enumerate(sorted(path for path in corpus.glob("*.txt") if path.name != "held.txt")):
        stream += [(byte, number) for byte in path.read_bytes()]
    row = stream[sample_id * SEQ_LEN : sample_id * SEQ_LEN + SEQ_LEN + 1]
    tokens = [byte for byte, _ in row[:-1]]
    targets = [after[0] if after[1] == before[1] else -100 for before, after in itertools.pairwise(row)]
    return tokens, targets, [number for _, number in row[:-1]]


def test_boundaries_and_targets_are_those_that_brute_force_finds(corpus: Path) -> None:
    data = build_data(config_of(corpus))
    for batch in take(data.train_dataloader(), 40):
        bounds, predicted = [0], 0
        for row, sample_id in enumerate(batch["sample_ids"].tolist()):
            tokens, targets, document = brute_force(corpus, sample_id)
            assert batch["tokens"][row].tolist() == tokens
            assert batch["targets"][row].tolist() == targets
            changes = [i for i in range(1, SEQ_LEN) if document[i] != document[i - 1]]
            bounds += [row * SEQ_LEN + i for i in changes] + [(row + 1) * SEQ_LEN]
            predicted += sum(target != -100 for target in targets)
        assert batch["cu_seqlens"] is not None
        assert batch["cu_seqlens"].tolist() == bounds
        assert batch["cu_seqlens"].dtype == torch.int32
        assert batch["tokens"].dtype == batch["targets"].dtype == batch["sample_ids"].dtype == torch.int64
        assert batch["target_bytes"] == predicted


def test_no_token_predicts_another_document(corpus: Path) -> None:
    """Each document repeats one byte of its own, so a target that differs from its token would be a stranger's."""
    data = build_data(config_of(corpus))
    ignored = 0
    for batch in take(data.train_dataloader(), 40):
        kept = batch["targets"] != -100
        assert torch.equal(batch["tokens"][kept], batch["targets"][kept])
        ignored += int((~kept).sum())
    assert ignored > 0


def test_one_epoch_shows_every_row_once(corpus: Path) -> None:
    data = build_data(config_of(corpus, batch_size=1))
    total = data.source.num_samples("train")
    assert total == (sum(range(1, 31)) - 1) // SEQ_LEN == data.steps_per_epoch
    batches = take(data.train_dataloader(), 2 * total)
    first, second = (
        [number for row in ids(batches[epoch * total : (epoch + 1) * total]) for number in row] for epoch in (0, 1)
    )
    assert sorted(first) == sorted(second) == list(range(total))
    assert first != second, "each epoch has an order of its own"
    assert first != list(range(total))


def test_target_bytes_count_text_and_not_tokens(corpus: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as TokenizerFile
    from tokenizers import models, pre_tokenizers

    pairs = {chr(33 + i) * n: 2 * i + n - 1 for i in range(94) for n in (1, 2)}
    tokenizer = TokenizerFile(models.BPE(vocab=pairs, merges=[(chr(33 + i), chr(33 + i)) for i in range(94)]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "pairs.json"))
    config = config_of(corpus, batch_size=1)
    config.tokenizer = TokenizerConfig(kind="file", file=str(tmp_path / "pairs.json"))
    data = build_data(config)
    assert data.vocab_size == 188
    for batch in take(data.train_dataloader(), 20):
        spelled = [data.tokenizer.decode([token]) for token in batch["targets"][0].tolist() if token != -100]
        assert batch["target_bytes"] == sum(map(len, spelled))
    assert any(len(word) == 2 for word in spelled)


def test_rows_of_synthetic_tasks_are_documents_of_their_own() -> None:
    task = {"name": "synthetic", "task": "copying"}
    config = RunConfig(data=task, trainer=TrainerConfig(seq_len=64, batch_size=2, accelerator="cpu"))
    data = build_data(config)
    (batch,) = take(data.train_dataloader(), 1)
    assert batch["cu_seqlens"] is None
    assert batch["target_bytes"] == 0
    assert data.unigram_bits_per_byte is None
    assert data.vocab_size == 16
    assert data.tokenizer.encode(data.tokenizer.decode(batch["tokens"][0].tolist())) == batch["tokens"][0].tolist()


# The order of samples


@given(st.integers(1, 400), st.integers(0, 2**40), st.integers(0, 5))
def test_each_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    order = [shuffled(epoch * num_samples + i, num_samples, seed) for i in range(num_samples)]
    assert sorted(order) == list(range(num_samples))


def test_the_order_looks_random() -> None:
    """Over 4000 seeds each of 10 samples stands first about equally often: chi-squared(9) below its 0.9999 quantile."""
    counts = np.bincount([shuffled(0, 10, seed) for seed in range(4000)], minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 33.7
    order = [shuffled(i, 5000, 0) for i in range(5000)]
    assert abs(np.corrcoef(order, range(5000))[0, 1]) < 0.06  # four standard deviations
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06


def test_a_far_position_costs_no_more_memory_than_a_near_one() -> None:
    assert 0 <= shuffled(10**15, 10**12, 1) < 10**12


def copying_source(train_samples: int = 96) -> Synthetic:
    return Synthetic(SyntheticConfig(task="copying", sizes=[2], train_samples=train_samples), 8)


def test_ranks_share_an_epoch_without_overlap() -> None:
    source = copying_source()
    ranks = [NumberedBatches(source, "train", batch_size=4, seed=0, rank=rank, world_size=3) for rank in range(3)]
    seen = [sample for number in range(8) for rank in ranks for sample in rank.sample_ids(number)]
    assert sorted(seen) == list(range(96))


def test_accumulation_and_ranks_change_who_sees_a_sample_but_not_when() -> None:
    """A step of 12 samples holds the same ones as 1 x 12, 3 x 4 micro-batches or 3 ranks x 4."""
    source = copying_source()
    whole = NumberedBatches(source, "train", batch_size=12, seed=0, rank=0, world_size=1)
    micro = NumberedBatches(source, "train", batch_size=4, seed=0, rank=0, world_size=1)
    ranks = [NumberedBatches(source, "train", batch_size=4, seed=0, rank=rank, world_size=3) for rank in range(3)]
    for step in range(10):
        expected = whole.sample_ids(step)
        assert [i for k in range(3) for i in micro.sample_ids(3 * step + k)] == expected
        assert [i for rank in ranks for i in rank.sample_ids(step)] == expected


def test_another_seed_gives_another_order(corpus: Path) -> None:
    config = config_of(corpus)
    first, again = (ids(take(build_data(config).train_dataloader(), 5)) for _ in range(2))
    config.seed = 6
    assert first == again
    assert ids(take(build_data(config).train_dataloader(), 5)) != first


# Resume


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_starts_at_a_step_goes_on_where_the_other_would(corpus: Path, num_workers: int) -> None:
    data = build_data(config_of(corpus, accumulate=2, num_workers=num_workers))
    straight = take(data.train_dataloader(), 12)
    resumed = take(data.train_dataloader(start_step=4), 4)
    assert ids(resumed) == ids(straight[8:])
    for batch, other in zip(resumed, straight[8:], strict=True):
        assert torch.equal(batch["tokens"], other["tokens"])
        assert torch.equal(batch["cu_seqlens"], other["cu_seqlens"])  # type: ignore[arg-type]
    again = build_data(config_of(corpus, accumulate=2))
    again.load_state_dict({"version": 1, "step": 4})
    assert ids(take(again.train_dataloader(), 4)) == ids(straight[8:])
    assert again.state_dict() == {"version": 1, "step": 4}


def test_state_of_a_newer_version_is_refused(corpus: Path) -> None:
    from subquad.errors import ResumeError

    with pytest.raises(ResumeError, match="version 2"):
        build_data(config_of(corpus)).load_state_dict({"version": 2, "step": 4})


class Recorder(L.LightningModule):
    """One weight, and the samples it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[list[int]] = []
        self.validated: list[list[int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["sample_ids"].tolist())
        return self.weight * batch["tokens"].float().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(batch["sample_ids"].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(data: TextData, steps: int, folder: Path, resume: Path | None = None) -> Recorder:
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, accumulate_grad_batches=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, enable_checkpointing=False,
        val_check_interval=4, check_val_every_n_epoch=None, num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*isinstance.*LeafSpec", "ignore:.*LeafSpec")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_lightning_resumes_with_the_next_sample(corpus: Path, tmp_path: Path, num_workers: int) -> None:
    def data() -> TextData:
        return build_data(config_of(corpus, accumulate=2, num_workers=num_workers, validation_batches=1))

    straight = fit(data(), 7, tmp_path)
    before = fit(data(), 3, tmp_path)
    after = fit(data(), 7, tmp_path, resume=tmp_path / "3.ckpt")
    assert len(straight.seen) == 14
    assert before.seen + after.seen == straight.seen
    assert torch.equal(after.weight, straight.weight)
    assert straight.validated
    assert all(batch == straight.validated[0] for batch in straight.validated + after.validated)


# Validation


@pytest.mark.parametrize(
    ("total", "batch_size", "num_batches", "world_size", "expected"),
    [
        (100, 5, 4, 1, (4, 5)),  # batches and rows of each rank
        (100, 5, 4, 2, (2, 5)),
        (12, 5, 4, 1, (2, 5)),  # only two full batches exist
        (3, 5, 4, 1, (1, 3)),  # less than a batch: one smaller batch
        (3, 5, 4, 2, (1, 3)),
    ],
)
def test_validation_is_spread_evenly_and_shared_by_the_ranks(
    total: int, batch_size: int, num_batches: int, world_size: int, expected: tuple[int, int]
) -> None:
    source = Synthetic(SyntheticConfig(task="copying", sizes=[2], validation_samples=total), 8)
    ranks = [
        FixedBatches(source, batch_size=batch_size, num_batches=num_batches, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert [len(rank) for rank in ranks] == [expected[0]] * world_size
    seen = [i for rank in ranks for number in range(len(rank)) for i in rank[number]["sample_ids"].tolist()]
    assert len(seen) == expected[0] * expected[1] * world_size
    if len(seen) <= total:
        assert len(set(seen)) == len(seen)
        gaps = np.diff([*sorted(seen), total])
        assert gaps.max() - gaps.min() <= 1
    with pytest.raises(IndexError):
        ranks[0][len(ranks[0])]


def test_validation_rows_come_from_the_held_out_file(corpus: Path) -> None:
    data = build_data(config_of(corpus, validation_batches=2))
    batches = list(data.val_dataloader())
    assert ids(batches) == ids(list(data.val_dataloader()))
    text = (corpus / "held.txt").read_bytes()
    assert all(bytes(row) in text for batch in batches for row in batch["tokens"].tolist())


# Building


def test_the_cache_folder_holds_the_tokens(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "cache"))
    build_data(config_of(corpus))
    assert len(list((tmp_path / "cache/tokens").glob("*.tokens"))) == 2


def test_the_default_is_python_source() -> None:
    config = RunConfig(
        data={"name": "python_source", "max_bytes": 100_000}, trainer=TrainerConfig(seq_len=64, accelerator="cpu")
    )
    data = build_data(config)
    assert data.fingerprint["source"] == "python_source"
    assert (data.vocab_size, data.tokenizer.kind) == (256, "bytes")
    assert 3 < (data.unigram_bits_per_byte or 0) < 6


@pytest.mark.parametrize(
    ("data", "trainer", "error", "what", "where"),
    [
        ({"name": "shakespear"}, {}, NotFoundError, "no data component is called 'shakespear'", "data.name"),
        ({"name": "synthetic", "tasks": "mqar"}, {}, ConfigError, "no key 'tasks'", "data.tasks"),
        ({"name": "synthetic", "train_samples": "many"}, {}, ConfigError, "many", "data.train_samples"),
        ({"name": "hf"}, {}, ConfigError, "path", "data"),
        ({"name": "text_files"}, {}, ConfigError, "no files are named", "data"),
        ({"name": "synthetic"}, {"batch_size": 0}, ConfigError, "batch_size is 0", "trainer.batch_size"),
        ({"name": "synthetic"}, {"seq_len": 0}, ConfigError, "seq_len is 0", "trainer.seq_len"),
        (
            {"name": "python_source", "max_bytes": 50_000},
            {"seq_len": 10**6},
            DataError,
            "longer than",
            "trainer.seq_len",
        ),
    ],
)
def test_bad_settings_are_refused_with_their_place(
    data: dict[str, Any], trainer: dict[str, Any], error: type[ConfigError], what: str, where: str
) -> None:
    with pytest.raises(error, match=what) as caught:
        build_data(RunConfig(data=data, trainer=TrainerConfig(**trainer)))
    assert caught.value.where.startswith(where)
    assert caught.value.mend


@pytest.fixture
def numbered(corpus: Path, tmp_path: Path) -> NumberedBatches:
    """Batches of the corpus, whose tokens lie in a file."""
    cache = tmp_path / "tokens"
    cache.mkdir()
    source: PackedText = build_text_files(
        TextFilesConfig(files=[f"{corpus}/*.txt"]),
        DataContext(tokenizer=ByteTokenizer(), seq_len=SEQ_LEN, cache=cache),
    )
    return NumberedBatches(source, "train", batch_size=3, seed=0, rank=0, world_size=1)


def test_batches_survive_pickling(numbered: NumberedBatches) -> None:
    """Python 3.14 starts workers by forkserver, which hands the source over as bytes."""
    again = pickle.loads(pickle.dumps(numbered))
    assert torch.equal(again[4]["tokens"], numbered[4]["tokens"])


@pytest.mark.slow
def test_workers_that_start_afresh_read_the_same_batches(numbered: NumberedBatches) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (batch,) = pool.map(numbered.__getitem__, [4])
    assert torch.equal(batch["tokens"], numbered[4]["tokens"])


def test_numbering_has_no_end() -> None:
    source = copying_source(train_samples=4)
    batches = NumberedBatches(source, "train", batch_size=4, seed=0, rank=0, world_size=1)
    epochs: Iterator[list[int]] = (batches.sample_ids(number) for number in range(1000, 1010))
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
