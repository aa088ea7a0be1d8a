"""Synthetic tasks: answers beside independent brute force, chance by counting, draws that depend on nothing else."""

from __future__ import annotations

import ast
import itertools
import operator
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from subquad.errors import ConfigError, NotFoundError
from subquad.training.evaluation import synthetic as judged
from subquad.training.sources import synthetic
from subquad.training.sources.configs import SyntheticConfig
from subquad.training.sources.source import DataContext
from subquad.training.tasks import modular_arithmetic
from subquad.training.tasks.catalogue import TASKS
from subquad.training.tasks.task import scattered
from subquad.training.tokenizer import ByteTokenizer

Answers = dict[int, int]
"""Answers by position."""


def context(seq_len: int) -> DataContext:
    return DataContext(tokenizer=ByteTokenizer(), seq_len=seq_len, cache=None)


# Solvers read a row's tokens from left to right, as plain Python, and share nothing with the generators.


def solve_mqar(tokens: list[int], size: int, vocab: int) -> Answers:
    values = {tokens[place]: tokens[place + 1] for place in range(0, 2 * size, 2)}
    return {place: values[token] for place, token in enumerate(tokens) if place >= 2 * size and token}


def solve_copying(tokens: list[int], size: int, vocab: int) -> Answers:
    marker = tokens.index(1)
    return dict(enumerate((token for token in tokens[:marker] if token), start=marker))


def solve_in_context_recall(tokens: list[int], size: int, vocab: int) -> Answers:
    seen: dict[int, int] = {}
    answers = {}
    for place in range(0, len(tokens) - 1, 2):
        key, value = tokens[place], tokens[place + 1]
        if key in seen:
            answers[place] = seen[key]
        assert seen.setdefault(key, value) == value
    return answers


def solve_needle(tokens: list[int], size: int, vocab: int) -> Answers:
    text = " ".join(map(str, tokens))
    needles = dict(re.findall(r"\b0 (\d+) (\d+ \d+ \d+ \d+)", text))
    assert len(needles) == size
    key = tokens[tokens.index(1) + 1]
    return dict(enumerate(map(int, needles[str(key)].split()), start=len(tokens) - 4))


def solve_variable_tracking(tokens: list[int], size: int, vocab: int) -> Answers:
    query = tokens.index(2)
    holds: dict[int, int] = {}
    for place in range(query):
        if tokens[place] == 0:
            holds[tokens[place + 1]] = tokens[place + 2]
        elif tokens[place] == 1:
            holds[tokens[place + 1]] = holds[tokens[place + 2]]
    asked = tokens[query + 1]
    return dict(enumerate((name for name, value in holds.items() if value == asked), start=query + 1))


def solve_parity(tokens: list[int], size: int, vocab: int) -> Answers:
    return {place: 1 + tokens[: place + 1].count(2) % 2 for place, token in enumerate(tokens) if token}


def solve_modular_arithmetic(tokens: list[int], size: int, vocab: int) -> Answers:
    signs = {6: "+", 7: "-", 8: "*"}
    text = "".join(signs.get(token, str(token - 1)) for token in tokens[:-1] if token)
    return {len(tokens) - 1: 1 + value_of(ast.parse(text, mode="eval").body) % 5}


def value_of(node: ast.expr) -> int:
    if isinstance(node, ast.BinOp):
        apply = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}[type(node.op)]
        return int(apply(value_of(node.left), value_of(node.right)))
    assert isinstance(node, ast.Constant)
    return int(node.value)  # type: ignore[arg-type]


SOLVERS: dict[str, Callable[[list[int], int, int], Answers]] = {
    "mqar": solve_mqar,
    "copying": solve_copying,
    "selective_copying": solve_copying,
    "in_context_recall": solve_in_context_recall,
    "needle": solve_needle,
    "variable_tracking": solve_variable_tracking,
    "parity": solve_parity,
    "modular_arithmetic": solve_modular_arithmetic,
}


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_those_that_brute_force_finds(name: str) -> None:
    task = TASKS[name]
    for size, room, number in itertools.product((1, 2, 3, 8), (0, 1, 17), range(8)):
        vocab = max(task.vocab_size, task.least_vocab(size))
        length = task.least_len(size) + room
        tokens, targets = task.draw(np.random.default_rng((size, room, number)), length, size, vocab)
        assert tokens.shape == targets.shape == (length,)
        assert tokens.dtype == targets.dtype == np.int64
        assert tokens.min() >= 0 and tokens.max() < vocab
        answers = SOLVERS[name](tokens.tolist(), size, vocab)
        found = {int(place): int(targets[place]) for place in np.flatnonzero(targets != -100)}
        assert found == answers
        assert found, "something is asked"


@pytest.mark.parametrize("name", TASKS)
def test_the_smallest_length_and_vocabulary_are_enough_and_one_less_is_refused(name: str) -> None:
    task = TASKS[name]
    for size in (1, 2, *task.sizes):
        length, vocab = task.least_len(size), task.least_vocab(size)
        task.check(length, size, vocab, where="here")
        tokens, targets = task.draw(np.random.default_rng(size), length, size, vocab)
        assert tokens.max() < vocab and targets.max() < vocab
        for wrong in ((length - 1, size, vocab), (length, size, vocab - 1), (length, 0, vocab)):
            with pytest.raises(ConfigError) as caught:
                task.check(*wrong, where="here")
            assert caught.value.where == "here"


@pytest.mark.parametrize("name", TASKS)
def test_chance_is_the_share_of_the_commonest_answer(name: str) -> None:
    task, counts = TASKS[name], Counter[int]()
    size, vocab = 2, max(task.least_vocab(2), min(task.vocab_size, 14))
    random = np.random.default_rng(0)
    for _ in range(3000):
        targets = task.draw(random, task.least_len(size) + 2, size, vocab).targets
        counts.update(targets[targets != -100].tolist())
    total, chance = counts.total(), task.chance(size, vocab)
    # Five standard deviations of a share; answers within a row are not independent, hence the rows instead of answers.
    assert abs(max(counts.values()) / total - chance) <= 5 * (chance * (1 - chance) / 3000) ** 0.5


def possible_answers(name: str, tokens: list[int], size: int) -> list[list[int]]:
    """The tokens of a row that may be its answers, for each of the answers in turn (the last list serves the rest)."""
    if name == "mqar":
        return [tokens[1 : 2 * size : 2]]
    if name == "in_context_recall":
        return [list(dict(zip(tokens[0::2], tokens[1::2])).values())]
    if name == "needle":
        found = re.findall(r"\b0 \d+ (\d+) (\d+) (\d+) (\d+)", " ".join(map(str, tokens)))
        return [list(map(int, values)) for values in zip(*found)]
    if name == "variable_tracking":
        return [[tokens[place + 1] for place in range(tokens.index(2)) if tokens[place] in (0, 1)]]
    return [[token for token in tokens[: tokens.index(1)] if token]]


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("parity", "modular_arithmetic")])
def test_a_row_guess_is_right_as_often_as_a_random_one_of_the_rows_answers(name: str) -> None:
    task, size, vocab = TASKS[name], 3, 64
    random, shares = np.random.default_rng(0), []
    for _ in range(1500):
        tokens, targets = task.draw(random, task.least_len(size) + 40, size, vocab)
        possible = possible_answers(name, tokens.tolist(), size)
        answers = targets[targets != -100].tolist()
        picked = [possible[min(place, len(possible) - 1)] for place in range(len(answers))]
        shares.append(np.mean([choices.count(answer) / len(choices) for choices, answer in zip(picked, answers)]))
    assert np.mean(shares) == pytest.approx(task.row_guess(size, vocab), abs=5 * np.std(shares) / 1500**0.5 + 1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_chance_of_arithmetic_is_that_of_all_expressions(size: int) -> None:
    counts = Counter(
        value_of(ast.parse("".join(map(str, itertools.chain(*zip(numbers, [*signs, ""])))), mode="eval").body) % 5
        for numbers in itertools.product(range(5), repeat=size)
        for signs in itertools.product("+-*", repeat=size - 1)
    )
    assert modular_arithmetic.most_frequent_share(size) == pytest.approx(max(counts.values()) / counts.total(), 1e-12)


def test_every_arrangement_of_pieces_in_noise_is_as_likely() -> None:
    random = np.random.default_rng(0)
    noise, pieces = np.zeros(3, dtype=np.int64), [np.array([1, 1]), np.array([2, 2])]
    counts = Counter(tuple(scattered(random, noise, pieces).tolist()) for _ in range(5000))
    assert len(counts) == 10  # two places among five
    assert all(abs(count / 5000 - 0.1) < 5 * (0.09 / 5000) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("name", TASKS)
def test_a_source_mixes_sizes_and_its_rows_depend_on_seed_split_and_number_only(name: str) -> None:
    sizes = [1, 3]
    length = TASKS[name].least_len(3) + 20

    def built(**fields: int) -> synthetic.Synthetic:
        return synthetic.build(SyntheticConfig(task=name, sizes=sizes, **fields), context(length))

    first, again, other = built(), built(), built(seed=1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    rows = [first.sample("train", number) for number in range(40)]
    assert all(np.array_equal(row.tokens, again.sample("train", i).tokens) for i, row in enumerate(rows))
    for split_rows in (
        [first.sample("validation", number) for number in range(40)],
        [other.sample("train", number) for number in range(40)],
    ):
        assert any(not np.array_equal(one.tokens, two.tokens) for one, two in zip(rows, split_rows))
    for row in rows:
        answers = [SOLVERS[name](row.tokens.tolist(), size, first.tokenizer.vocab_size)
                   for size in sizes if fits(name, row.tokens.tolist(), size)]  # fmt: skip
        assert {int(p): int(row.targets[p]) for p in np.flatnonzero(row.targets != -100)} in answers


def fits(name: str, tokens: list[int], size: int) -> bool:
    """Whether a row may have that size, where a solver must be told."""
    if name == "mqar":
        return (tokens[3] >= 128) == (size == 3)  # a value of the second pair
    if name == "needle":
        return tokens.count(0) == size
    return True


def test_rows_to_judge_by_are_none_that_was_trained_on() -> None:
    task = TASKS["mqar"]
    source = synthetic.build(SyntheticConfig(task="mqar", sizes=[4], vocab_size=64), context(32))
    trained = {source.sample(split, i).tokens.tobytes() for split in ("train", "validation") for i in range(500)}  # type: ignore[arg-type]
    asked = {row.tokens.tobytes() for row in judged.rows(task, 0, 32, 4, 64, 500)}
    assert len(asked) == 500
    assert not asked & trained
    again = judged.rows(task, 0, 32, 4, 64, 3)
    assert [row.tokens.tolist() for row in again] == [row.tokens.tolist() for row in judged.rows(task, 0, 32, 4, 64, 3)]


def test_sizes_left_open_are_those_that_fit() -> None:
    source = synthetic.build(SyntheticConfig(task="mqar"), context(64))
    assert source.fingerprint["sizes"] == [4, 8, 16]


@pytest.mark.parametrize(
    ("fields", "error", "where"),
    [
        ({"task": "mqra"}, NotFoundError, "data.task"),
        ({"task": "mqar", "sizes": [20]}, ConfigError, "data.sizes"),
        ({"task": "mqar", "sizes": [0]}, ConfigError, "data.sizes"),
        ({"task": "mqar", "sizes": [8], "vocab_size": 9}, ConfigError, "data.sizes"),
        ({"task": "needle", "vocab_size": 3}, ConfigError, "trainer.seq_len"),
        ({"vocab_size": -1}, ConfigError, "data.vocab_size"),
        ({"train_samples": 0}, ConfigError, "data.train_samples"),
    ],
)
def test_mistakes_are_named(fields: dict[str, object], error: type[Exception], where: str) -> None:
    with pytest.raises(error) as caught:
        synthetic.build(SyntheticConfig(**fields), context(64))  # type: ignore[arg-type]
    assert caught.value.where == where  # type: ignore[attr-defined]
