"""A stream that is never held: every document once, packed, and gone on with at the very sample."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compared_runs import assert_same_run
from forked_ranks import fork_ranks
from mortal_run import Death, live

from subquad.errors import ConfigError, DataError, ResumeError
from subquad.schema import RunConfig
from subquad.training.batch import Batch
from subquad.training.data import build_data
from subquad.training.fit import train
from subquad.training.module import TrainingModule
from subquad.training.run_folder import RunFolder
from subquad.training.sources import hf, mixture
from subquad.training.sources.configs import HfConfig, MixtureConfig
from subquad.training.sources.source import IGNORED, DataContext, Place, Sample
from subquad.training.sources.streamed import StreamedText
from subquad.training.streamed_batches import StreamedBatches
from subquad.training.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer

datasets = pytest.importorskip("datasets")
TinyRun = Callable[..., RunConfig]

DOCUMENTS, FILES, SEQ_LEN, LANES = 120, 3, 16, 4
TEXTS = [f"<{number}:{'abcdefghij'[: number % 10]}>" for number in range(DOCUMENTS)]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The documents in three files of each format."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    found: dict[str, list[str]] = {"json": [], "parquet": [], "text": []}
    for number in range(FILES):
        own, base = TEXTS[number * DOCUMENTS // FILES :][: DOCUMENTS // FILES], tmp_path / f"part-{number}"
        paths = {name: base.with_suffix(f".{name}") for name in found}
        paths["json"].write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in own))
        paths["text"].write_text("\n".join(own) + "\n")
        pyarrow.parquet.write_table(pyarrow.table({"text": own}), paths["parquet"], row_group_size=7)
        for name, path in paths.items():
            found[name].append(str(path))
    return found


def streamed(files: dict[str, list[str]], kind: str = "json", tokenizer: Tokenizer | None = None, **fields: Any) -> Any:
    settings = {"shuffle_buffer": 8, "lanes": LANES, "validation_fraction": 0.1} | fields
    config = HfConfig(path=kind, data_files=files[kind], streaming=True, **settings)
    return hf.build(config, DataContext(tokenizer=tokenizer or ByteTokenizer(), seq_len=SEQ_LEN, cache=None))


def held_out(source: StreamedText) -> set[str]:
    return {text for text in TEXTS if source._is_held_out(text.encode())}


def text_of(samples: list[Sample]) -> str:
    return bytes(np.concatenate([sample.tokens for sample in samples]).tolist()).decode()


def where(place: Place) -> Place:
    """The place without what `datasets` says of it, which counts from where it began."""
    return replace(place, begins=None)


def epoch_of_lane(source: StreamedText, lane: int) -> list[str]:
    """The documents of a lane's first epoch, taken apart again."""
    first = takewhile(lambda row: row[1].epoch == 0, source.lane_rows(lane, 0, Place()))
    whole = text_of([sample for sample, _ in first])
    return [f"<{part}" for part in whole[: whole.rindex(">") + 1].split("<")[1:]]


@pytest.mark.parametrize("kind", ["json", "parquet", "text"])
@pytest.mark.parametrize("lanes", [1, 3, 4])
def test_an_epoch_of_all_lanes_shows_every_training_document_once(files: Any, kind: str, lanes: int) -> None:
    source = streamed(files, kind, lanes=lanes)
    by_lane = [epoch_of_lane(source, lane) for lane in range(lanes)]
    seen, wanted = list(chain(*by_lane)), set(TEXTS) - held_out(source)
    assert len(set(seen)) == len(seen)
    # The end of an epoch lies in a row with the next one's beginning, which counts as of that.
    assert set(seen) <= wanted
    assert len(wanted) - len(seen) <= 3 * lanes
    assert by_lane[0] != sorted(by_lane[0], key=TEXTS.index)
    assert held_out(source)


def test_rows_are_cut_and_bounded_as_held_rows_are(files: Any) -> None:
    """Without shuffling the one lane is the concatenated training documents."""
    source = streamed(files, lanes=1, shuffle_buffer=1)
    documents = [text for text in TEXTS if text not in held_out(source)]
    tokens = np.frombuffer("".join(documents).encode(), dtype=np.uint8).astype(np.int64)
    begins = np.cumsum([0, *map(len, documents)])
    for number, (sample, place) in enumerate(islice(source.lane_rows(0, 0, Place()), len(tokens) // SEQ_LEN)):
        span = slice(number * SEQ_LEN, (number + 1) * SEQ_LEN)
        assert place.rows == number + 1
        assert (sample.tokens == tokens[span]).all()
        positions = np.arange(SEQ_LEN) + number * SEQ_LEN
        ends = np.isin(positions + 1, begins)
        following = np.append(tokens, 0)[positions + 1]
        assert (sample.targets == np.where(ends, IGNORED, following)).all()
        assert sample.document_starts.tolist() == [i for i in range(1, SEQ_LEN) if positions[i] in begins]
        assert sample.target_bytes == (~ends).sum()


def test_bytes_of_targets_are_counted_where_tokens_are_longer(files: Any) -> None:
    from tokenizers import Tokenizer as TokenizerFile
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    trained = TokenizerFile(BPE())
    trained.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trained.decoder = Decoder()
    alphabet = ByteLevel.alphabet()
    trained.train_from_iterator(TEXTS, BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    source = streamed(files, tokenizer=FileTokenizer(trained.to_str()), lanes=1)
    for sample, _ in islice(source.lane_rows(0, 0, Place()), 20):
        words = source.tokenizer.decode(sample.targets[sample.targets != IGNORED].tolist())
        assert sample.target_bytes == len(words) > (sample.targets != IGNORED).sum()


@pytest.mark.parametrize("kind", ["json", "parquet", "text"])
def test_a_lane_goes_on_from_every_place(files: Any, kind: str) -> None:
    source = streamed(files, kind)
    straight = list(islice(source.lane_rows(1, 7, Place()), 60))
    assert straight[-1][1].epoch > 1
    for number in (0, 1, 4, 5, 13, 29, 44):
        place = Place.from_json(straight[number][1].to_json())
        resumed = islice(streamed(files, kind).lane_rows(1, 7, place), 60 - number - 1)
        for (left, left_place), (right, right_place) in zip(straight[number + 1 :], resumed, strict=True):
            assert where(left_place) == where(right_place)
            assert all(np.array_equal(one, other) for one, other in zip(left, right))


def test_lanes_that_take_turns_in_one_process_keep_places_of_their_own(files: Any) -> None:
    source = streamed(files, "parquet")
    lanes = [source.lane_rows(lane, 0, Place()) for lane in range(LANES)]
    turns = [[next(lane) for lane in lanes] for _ in range(16)]
    for lane in range(LANES):
        for number in (5, 9, 12):
            resumed = islice(streamed(files, "parquet").lane_rows(lane, 0, turns[number][lane][1]), 15 - number)
            for (left, _), (right, _) in zip((turn[lane] for turn in turns[number + 1 :]), resumed, strict=True):
                assert np.array_equal(left.tokens, right.tokens)


def test_epochs_lanes_and_seeds_have_orders_of_their_own(files: Any) -> None:
    source = streamed(files, shuffle_buffer=DOCUMENTS)
    texts = {seed: text_of([sample for sample, _ in islice(source.lane_rows(0, seed, Place()), 40)]) for seed in (0, 1)}
    assert texts[0] != texts[1]
    assert texts[0][:60] not in texts[0][60:]


def test_a_held_out_text_is_not_trained_on_and_stands_in_validation(files: Any) -> None:
    source = streamed(files)
    validation = text_of([source.sample("validation", number) for number in range(source.num_samples("validation"))])
    assert "".join(text for text in TEXTS if text in held_out(source)).startswith(validation)
    rows = chain(*(islice(source.lane_rows(lane, 0, Place()), 60) for lane in range(LANES)))
    whole = text_of([sample for sample, _ in rows])
    assert not [text for text in held_out(source) if text in whole]
    assert source.unigram_bits_per_byte is not None


def test_documents_of_a_validation_split_are_left_out_of_training(files: Any, tmp_path: Path) -> None:
    folder = tmp_path / "splits"
    folder.mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "train.jsonl").write_text(rows)
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[30:60]))
    config = HfConfig(path=str(folder), streaming=True, validation_split="test", lanes=1)
    source = hf.build(config, DataContext(tokenizer=ByteTokenizer(), seq_len=SEQ_LEN, cache=None))
    assert isinstance(source, StreamedText)
    assert set(epoch_of_lane(source, 0)) <= {*TEXTS[:30], *TEXTS[60:]}


# Batches


def batches(source: StreamedText, *, rank: int = 0, world_size: int = 1, workers: int = 0, **more: Any) -> Any:
    settings = {"batch_size": 2, "seed": 0, "first": 0, "places": {}} | more
    return StreamedBatches(source, rank=rank, world_size=world_size, num_workers=workers, **settings)


def loaded(found: StreamedBatches, workers: int, count: int) -> list[Batch]:
    loader = torch.utils.data.DataLoader(found, batch_size=None, num_workers=workers)
    return list(islice(loader, count))


def in_turn(*ranks: list[Batch]) -> Iterator[Batch]:
    return chain(*zip(*ranks))


def assert_equal(left: Batch, right: Batch) -> None:
    assert left["sample_ids"].tolist() == right["sample_ids"].tolist()
    assert torch.equal(left["tokens"], right["tokens"])
    assert torch.equal(left["targets"], right["targets"])
    assert torch.equal(left["cu_seqlens"], right["cu_seqlens"])
    assert left["lane"] == right["lane"]
    assert where(Place.from_json(left["place"])) == where(Place.from_json(right["place"]))


def test_neither_workers_nor_ranks_change_what_a_step_takes(files: Any) -> None:
    source = streamed(files)
    straight = loaded(batches(source), 0, 24)
    for workers in (1, 2):
        for left, right in zip(straight, loaded(batches(source, workers=workers), workers, 24), strict=True):
            assert_equal(left, right)
    ranks = [loaded(batches(source, rank=rank, world_size=2, workers=2), 2, 12) for rank in range(2)]
    for left, right in zip(straight, in_turn(*ranks), strict=True):
        assert_equal(left, right)
    ids = [number for batch in straight for number in batch["sample_ids"].tolist()]
    assert len(set(ids)) == len(ids)


def test_batches_go_on_with_other_workers_and_ranks(files: Any) -> None:
    source = streamed(files)
    straight = loaded(batches(source), 0, 24)
    places = {batch["lane"]: Place.from_json(batch["place"]) for batch in straight[:10]}
    resumed = batches(streamed(files), first=10, places=places, workers=2)
    for left, right in zip(straight[10:], loaded(resumed, 2, 14), strict=True):
        assert_equal(left, right)
    ranks = [batches(source, rank=rank, world_size=2, first=5, places=places) for rank in range(2)]
    for left, right in zip(straight[10:], in_turn(*(loaded(rank, 0, 7) for rank in ranks)), strict=True):
        assert_equal(left, right)


def test_lanes_that_cannot_be_shared_out_and_places_of_another_step_are_refused(files: Any) -> None:
    source = streamed(files)
    with pytest.raises(ConfigError, match="4 lanes cannot be shared out to 3 workers of each of 1 ranks"):
        batches(source, workers=3)
    with pytest.raises(ConfigError, match="2 workers of each of 4 ranks"):
        batches(source, workers=2, world_size=4)
    with pytest.raises(ResumeError, match="lane 0 of the stream stands at row 0"):
        batches(source, first=4)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"text_field": "txt"}, "no column 'txt'"),
        ({"text_field": "n"}, "holds int, not text"),
        ({"split": "test"}, "cannot load json"),
    ],
)
def test_mistakes_are_named(files: Any, fields: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what):
        streamed(files, **fields)


def test_a_lane_without_documents_is_named(files: Any) -> None:
    with pytest.raises(DataError, match="lane 150 of 200 holds no training document"):
        next(iter(streamed(files, lanes=200).lane_rows(150, 0, Place())))


def test_a_stream_cannot_be_mixed(files: Any) -> None:
    entry = {"name": "hf", "path": "json", "data_files": files["json"], "streaming": True}
    with pytest.raises(ConfigError, match="is a stream") as caught:
        mixture.build(
            MixtureConfig(sources={"own": entry}),
            DataContext(tokenizer=ByteTokenizer(), seq_len=SEQ_LEN, cache=None),
        )
    assert caught.value.where == "data.sources.own"


# Runs


@pytest.fixture
def stream_run(files: Any, tiny_run: TinyRun) -> TinyRun:
    def config(run_dir: str, **settings: Any) -> RunConfig:
        data = {
            "name": "hf", "path": "json", "data_files": files["json"], "streaming": True, "shuffle_buffer": 8,
            "lanes": LANES, "validation_fraction": 0.1,
        }  # fmt: skip
        run = {"data": data} | settings.pop("run", {})
        return tiny_run(run_dir, **{"seq_len": SEQ_LEN, "every": 3} | settings, run=run)

    return config


def test_a_run_that_broke_and_went_on_with_a_worker_is_the_undisturbed_one(
    stream_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(stream_run("straight", accumulate=2)).run_dir
    config = stream_run("broken", accumulate=2)
    whole = TrainingModule.training_step

    def training_step(self: TrainingModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == 7:
            raise ArithmeticError
        return whole(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", training_step)
        with pytest.raises(ArithmeticError):
            train(config)
    train(replace(config, resume=config.run_dir, trainer=replace(config.trainer, num_workers=1)))
    assert_same_run(Path(str(config.run_dir)), straight)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_ranks_take_what_one_takes_and_one_goes_on_with_their_stream(
    stream_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_ranks(monkeypatch)
    alone = stream_run("alone", accumulate=2)
    straight = train(alone).run_dir
    shared = stream_run("shared", devices=2, max_steps=6)
    train(shared)
    one = replace(alone.trainer, max_steps=12)
    went_on = train(replace(shared, resume=shared.run_dir, trainer=one)).run_dir
    ids = [
        [line.split(",")[1].split() for line in RunFolder(path).samples(0).read_text().splitlines()[1:]]
        for path in (straight, went_on)
    ]
    others = [line.split(",")[1].split() for line in RunFolder(went_on).samples(1).read_text().splitlines()[1:]]
    # Rank by rank up to step 6, then one rank alone.
    assert [own + other for own, other in zip(ids[1][:6], others)] == ids[0][:6]
    assert ids[1][6:] == ids[0][6:]


@pytest.mark.parametrize("sharing", ["context_parallel", "tensor_parallel"])
def test_ranks_that_share_work_on_samples_read_the_same_ones(stream_run: TinyRun, sharing: str) -> None:
    """Two groups of two ranks take what two ranks take that share nothing."""

    def taken(rank: int, ranks: int, **settings: Any) -> list[int]:
        data = build_data(stream_run("run", **settings))
        data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks)  # type: ignore[assignment]
        return [int(number) for batch in islice(data.train_dataloader(), 3) for number in batch["sample_ids"]]

    alone = [taken(rank, 2) for rank in range(2)]
    assert alone[0] != alone[1]
    settings = {"devices": 4, sharing: 2}
    assert [taken(rank, 4, **settings) for rank in range(4)] == [alone[0], alone[0], alone[1], alone[1]]


def test_other_files_are_refused(stream_run: TinyRun, files: Any) -> None:
    config = stream_run("run", max_steps=3)
    train(config)
    with Path(files["json"][2]).open("a") as file:
        file.write('{"text": "more", "n": 1}\n')
    with pytest.raises(ResumeError, match="files"):
        train(replace(config, resume=config.run_dir, trainer=replace(config.trainer, max_steps=6)))


@pytest.mark.slow
def test_a_killed_stream_goes_on_as_if_nobody_had_killed_it(stream_run: TinyRun, tmp_path: Path) -> None:
    assert live(stream_run("straight"), None) == 0
    config = stream_run("killed")
    # Within the second checkpoint or a later one, and within the next that is begun.
    assert live(config, Death("checkpoint", 400)) == -signal.SIGKILL
    config = replace(config, resume=config.run_dir)
    assert live(config, Death("checkpoint", 100)) == -signal.SIGKILL
    assert not RunFolder(tmp_path / "killed").report.exists()
    assert live(replace(config, trainer=replace(config.trainer, num_workers=1)), None) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
