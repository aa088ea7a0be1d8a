"""The proxies against their definitions, and the table that a command writes for the choice of mixers."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import TinyRun
from subquad.__main__ import main
from subquad.compiler.quality.distill import distill
from subquad.compiler.quality.gauss_newton import gauss_newton
from subquad.compiler.quality.local_error import local_error
from subquad.compiler.quality.measure import PROXIES, measure_quality
from subquad.compiler.quality.proxy import HeldOut, block_of, exchanged
from subquad.compiler.quality.replace_one_kl import replace_one_kl
from subquad.compiler.quality.table import QualityTable
from subquad.errors import ConfigError
from subquad.model.build import build_model
from subquad.model.language_model import LanguageModel
from subquad.schema import ChannelMixerConfig, ModelConfig
from subquad.training.fit import train

MIXERS: dict[str, Any] = {
    "softmax_attention": {"mixer": "softmax_attention", "num_heads": 2},
    "window": {"mixer": "window", "num_heads": 2, "window": 3},
    "narrow": {"mixer": "window", "num_heads": 2, "window": 1},
}
CONFIG = ModelConfig(
    d_model=16, num_layers=3, vocab_size=23, context_len=32, mixers=MIXERS, schedule=["softmax_attention"],
    channel_mixer=ChannelMixerConfig(d_hidden=24), init_std=0.3,
)  # fmt: skip


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(1)
    return build_model(CONFIG).double().eval()


@pytest.fixture
def student(model: LanguageModel) -> nn.Module:
    torch.manual_seed(2)
    other = copy.deepcopy(block_of(model, 1).mixer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return other


def drawn(packed: bool, number: int = 3) -> list[HeldOut]:
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(number):
        tokens = torch.randint(23, (2, 11), generator=generator)
        targets = torch.randint(23, (2, 11), generator=generator)
        targets[0, 4] = -100
        bounds = torch.tensor([0, 5, 11, 22], dtype=torch.int32) if packed else None
        batches.append(HeldOut(tokens, targets, bounds))
    return batches


@pytest.mark.parametrize("proxy", PROXIES.values())
@pytest.mark.parametrize("packed", [False, True])
def test_a_mixer_that_does_the_same_loses_nothing_and_the_model_is_left_as_it_was(
    proxy: Any, packed: bool, model: LanguageModel, student: nn.Module
) -> None:
    batches = drawn(packed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    teacher = block_of(model, 1).mixer
    assert proxy(model, 1, copy.deepcopy(teacher), batches) == pytest.approx(0.0, abs=1e-12)
    assert proxy(model, 1, student, batches) > 1e-6
    assert block_of(model, 1).mixer is teacher
    assert not teacher._forward_hooks
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_the_local_error_is_the_share_of_the_output_that_is_missed(
    packed: bool, model: LanguageModel, student: nn.Module
) -> None:
    missed = whole = 0.0
    for batch in drawn(packed):
        x = model.embedding(batch.tokens)
        if packed:
            x = x.reshape(1, -1, 16)
        x = block_of(model, 1).norm(block_of(model, 0)(x, batch.cu_seqlens))
        output = block_of(model, 1).mixer(x, batch.cu_seqlens)
        missed += float((student(x, batch.cu_seqlens) - output).pow(2).sum())
        whole += float(output.pow(2).sum())
    assert local_error(model, 1, student, drawn(packed)) == pytest.approx(missed / whole, rel=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_the_divergence_is_that_of_the_models_predictions(
    packed: bool, model: LanguageModel, student: nn.Module
) -> None:
    total, tokens = 0.0, 0
    other = copy.deepcopy(model)
    block_of(other, 1).mixer = student
    for batch in drawn(packed):
        before = torch.distributions.Categorical(logits=model(batch.tokens, batch.cu_seqlens))
        after = torch.distributions.Categorical(logits=other(batch.tokens, batch.cu_seqlens))
        total += float(torch.distributions.kl_divergence(before, after).sum())
        tokens += batch.tokens.numel()
    # The proxy rounds logits to float32, as it must for models in half precision.
    assert replace_one_kl(model, 1, student, drawn(packed)) == pytest.approx(total / tokens, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("packed", [False, True])
def test_the_gauss_newton_error_is_the_squared_first_order_change_of_each_rows_loss(
    packed: bool, model: LanguageModel, student: nn.Module
) -> None:
    """The first-order change, by finite differences: the mixer's output moved a little towards the student's."""

    class Between(nn.Module):
        def __init__(self, teacher: nn.Module, share: float) -> None:
            super().__init__()
            self.teacher, self.share = teacher, share

        def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
            output: torch.Tensor = self.teacher(x, cu_seqlens)
            return output + self.share * (student(x, cu_seqlens) - output)

    def row_losses(share: float, batch: HeldOut) -> torch.Tensor:
        with exchanged(model, 1, Between(block_of(model, 1).mixer, share)), torch.no_grad():
            logits = model(batch.tokens, batch.cu_seqlens)
        nats = nn.functional.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none", ignore_index=-100)
        return nats.sum(dim=1) / (batch.targets >= 0).sum(dim=1)

    step = 1e-4
    changes = [(row_losses(step, batch) - row_losses(-step, batch)) / (2 * step) for batch in drawn(packed)]
    expected = float(torch.cat(changes).square().mean() / 2)
    # The loss is computed from float32 logits: its gradient carries their rounding.
    assert gauss_newton(model, 1, student, drawn(packed)) == pytest.approx(expected, rel=1e-4)


def test_distillation_brings_a_student_of_the_same_kind_close_and_trains_nothing_else(model: LanguageModel) -> None:
    model = model.float()
    batches = drawn(packed=True)
    torch.manual_seed(4)
    student = copy.deepcopy(block_of(model, 1).mixer)
    student.init_parameters(0.3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = local_error(model, 1, student, batches)
    distill(model, 1, student, batches, steps=150, learning_rate=1e-2)
    assert local_error(model, 1, student, batches) < 0.2 * start
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def measured(model: LanguageModel, keys: list[str], config: ModelConfig = CONFIG, **given: Any) -> QualityTable:
    values: dict[str, Any] = {
        "proxy": "local_error", "train": drawn(False), "held_out": drawn(False), "steps": 3, "learning_rate": 1e-3,
        "seed": 0, "origin": "a test", "progress": lambda *_: None,
    }  # fmt: skip
    return measure_quality(model.float(), config, keys, **values | given)


def test_the_trained_mixer_loses_nothing_and_a_figure_does_not_depend_on_the_other_candidates(
    model: LanguageModel,
) -> None:
    both = measured(model, ["softmax_attention", "window", "narrow"])
    alone = measured(model, ["narrow"])
    assert [row["softmax_attention"] for row in both.loss] == [0.0] * 3
    assert [row["narrow"] for row in both.loss] == [row["narrow"] for row in alone.loss]
    assert len({row["narrow"] for row in both.loss}) == 3
    assert both.rows(["window"], MIXERS, 3, 16) == tuple({"window": row["window"]} for row in both.loss)


def test_candidates_with_other_channel_mixers_cannot_be_compared(model: LanguageModel) -> None:
    mixers = MIXERS | {"window": MIXERS["window"] | {"channel_mixer": {"d_hidden": 48}}}
    with pytest.raises(ConfigError, match="differ in their channel mixers"):
        measured(model, ["window"], replace(CONFIG, mixers=mixers))


def test_the_command_measures_a_run_and_training_reads_what_it_wrote(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def config(folder: str) -> Any:
        made = tiny_run(folder, max_steps=4)
        made.model = replace(made.model, mixers=MIXERS)
        return made

    run_dir = train(config("teacher")).run_dir
    out = tmp_path / "quality.json"
    arguments = [
        "proxy",
        f"run={run_dir}",
        "candidates=[softmax_attention, narrow]",
        f"out={out}",
        "steps=2",
        "batches=2",
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "replace_one_kl: teacher at step 4, 2 distillation steps" in shown.out
    assert shown.err.count("of the output missed") == 2
    table = QualityTable.load(out)
    assert all(row["softmax_attention"] == 0 < row["narrow"] for row in table.loss)
    student = config("student")
    student.model = replace(student.model, schedule=["auto"], candidates=["narrow", "softmax_attention"])
    student.budget.quality = str(out)
    assert "softmax_attention" in (train(student).run_dir / "config.yaml").read_text().split("schedule:")[1][:60]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "no run folder"),
        (["run=absent"], "there is no folder"),
        (["run=x", "proxy=kl"], "no proxy is called 'kl'"),
        (["run=x", "batches=0"], "batches is 0"),
        (["run=x", "learning_rate=0"], "learning_rate is 0"),
        (["run=x", "out=absent/quality.json"], "there is no folder"),
        (["run=x", "candidates=[a"], "is not YAML"),
        (["run=x", "step=3"], "there is no key 'step'"),
    ],
)
def test_a_request_that_cannot_be_met_is_a_usage_error(
    arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["proxy", *arguments]) == 2
    assert what in capsys.readouterr().err
