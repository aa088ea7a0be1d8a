"""Models from recipes: exact parameter counts, packing, carries, decay groups, and errors that name their key."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from subquad.compose import load_config
from subquad.contracts import MIXER_METHODS, Mixer
from subquad.errors import ConfigError, NotFoundError, PluginError
from subquad.model import build
from subquad.model.build import build_model, full_schedule
from subquad.schema import ChannelMixerConfig, ModelConfig

PUBLISHED = {
    "scout_mamba_430m": 430_765_056,
    "scout_mamba_1_59b": 1_592_678_400,
    "scout_swa_470m": 469_570_560,
    "transformer_340m": 341_099_520,
    "scout_swa_1_57b": 1_569_835_008,
    "mamba2_370m": 368_346_624,
    "log_linear_mamba2_825m": 825_465_312,
}
MIXERS: dict[str, Any] = {
    "mamba": {"mixer": "mamba", "state_dim": 4},
    "segment_attention": {"mixer": "segment_attention", "num_heads": 2, "segment_len": 4},
    "window": {"mixer": "window", "num_heads": 2, "window": 8},
    "softmax_attention": {"mixer": "softmax_attention", "num_heads": 2},
}


def small_config(**changes: Any) -> ModelConfig:
    values = dict(
        d_model=16, num_layers=4, vocab_size=40, context_len=24, schedule=list(MIXERS), mixers=dict(MIXERS),
        channel_mixer=ChannelMixerConfig(d_hidden=24),
    )  # fmt: skip
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def small_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    return build_model(small_config(**changes)).double()


@pytest.mark.parametrize(("recipe", "parameters"), PUBLISHED.items())
def test_the_papers_sizes_have_the_papers_parameter_counts(recipe: str, parameters: int) -> None:
    config = load_config([f"model={recipe}"]).model
    config.context_len = config.context_len or 4096
    model = build_model(config, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize(
    ("said", "std"), [("0.02", 0.02), ("1", 1.0), ("width", 96**-0.5), ("small", (2 / 480) ** 0.5)]
)
def test_linear_maps_start_as_wide_as_is_said_or_follows_from_the_width(said: str, std: float) -> None:
    config = load_config(["model=transformer", "model.d_model=96", f"model.init_std={said}"]).model
    config.vocab_size, config.context_len = 256, 64
    model: Any = build_model(config)
    for linear in (model.embedding, model.blocks[0].mixer.q_proj, model.blocks[3].channel_mixer.down):
        assert float(linear.weight.detach().std()) == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("recipe", ["scout_mamba", "scout_swa", "transformer", "mamba", "mamba2", "log_linear_mamba2"])
def test_every_laptop_recipe_builds_and_runs(recipe: str) -> None:
    config = load_config([f"model={recipe}"])
    config.model.vocab_size, config.model.context_len = 256, config.trainer.seq_len
    model = build_model(config.model)
    with torch.no_grad():
        assert model(torch.randint(0, 256, (1, 9))).shape == (1, 9, 256)


def test_the_schedule_repeats_to_the_number_of_blocks() -> None:
    assert full_schedule(small_config(num_layers=6, schedule=["mamba", "window"])) == ["mamba", "window"] * 3
    model = small_model(num_layers=3, schedule=["mamba", "window"])
    assert [block.mixer_name for block in model.blocks] == ["mamba", "window", "mamba"]


def test_packed_documents_equal_separate_ones_across_rows() -> None:
    model = small_model()
    tokens = torch.randint(0, 40, (2, 12))
    bounds = [0, 5, 12, 12, 13, 24]  # the row end at 12 included, an empty document too
    packed = model(tokens, torch.tensor(bounds, dtype=torch.int32)).reshape(1, 24, -1)
    flat = tokens.reshape(1, 24)
    parts = [model(flat[:, a:b]) for a, b in itertools.pairwise(bounds) if b > a]
    assert (packed - torch.cat(parts, dim=1)).abs().max() < 1e-12


@pytest.mark.parametrize("split", [0, 1, 4, 7, 12])
def test_prefill_and_decode_equal_forward(split: int) -> None:
    model = small_model()
    tokens = torch.randint(0, 40, (2, 12))
    whole, carry, found = model(tokens), model.empty_carry(2), []
    if split:
        logits, carry = model.prefill(tokens[:, :split], carry)
        found.append(logits)
    for t in range(split, 12):
        logits, carry = model.decode(tokens[:, t], carry)
        found.append(logits.unsqueeze(1))
    assert (torch.cat(found, dim=1) - whole).abs().max() < 1e-12


@pytest.mark.parametrize("mixer", list(MIXERS))
def test_logits_depend_on_earlier_tokens_alone(mixer: str) -> None:
    model = small_model(schedule=[mixer], num_layers=2)
    tokens = torch.randint(0, 40, (1, 14))
    before = model(tokens)
    for t in range(1, 14):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 40
        assert torch.equal(model(changed)[:, :t], before[:, :t])


@pytest.mark.parametrize("recompute", ["all", "cheap"])
def test_activation_checkpointing_changes_no_gradient(recompute: str) -> None:
    tokens, bounds = torch.randint(0, 40, (2, 12)), torch.tensor([0, 12, 24], dtype=torch.int32)
    gradients = []
    for on in (False, True):
        model = small_model()
        model.activation_checkpointing, model.recompute = on, recompute
        model(tokens, bounds).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_cheap_recomputation_repeats_no_product_and_no_operator() -> None:
    tokens, flops = torch.randint(0, 40, (2, 12)), {}
    for recompute in (None, "cheap", "all"):
        model = small_model()
        model.activation_checkpointing, model.recompute = recompute is not None, recompute or "all"
        loss = model(tokens).square().mean()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops[recompute] = counter.get_total_flops()
    assert flops[None] == flops["cheap"] < flops["all"]


def test_weight_decay_spares_vectors_and_what_mixers_declare() -> None:
    model = small_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = ([names[id(p)] for p in group["params"]] for group in model.parameter_groups(0.1))
    assert len(decayed) + len(spared) == len(names)
    assert {"blocks.0.mixer.A_log", "blocks.0.mixer.D", "blocks.0.mixer.dt_proj.bias", "norm.weight"} <= set(spared)
    assert {"embedding.weight", "blocks.0.mixer.in_proj.weight", "blocks.1.mixer.q_proj.weight"} <= set(decayed)
    assert [group["weight_decay"] for group in model.parameter_groups(0.1)] == [0.1, 0.0]


def test_tied_embeddings_are_one_entry_of_the_state_dict() -> None:
    assert "lm_head.weight" not in small_model().state_dict()
    assert "lm_head.weight" in small_model(tie_embeddings=False).state_dict()


def test_a_block_may_have_no_channel_mixer_or_one_of_its_own() -> None:
    mixers = {
        "bare": {**MIXERS["mamba"], "channel_mixer": None},
        "wide": {**MIXERS["mamba"], "channel_mixer": {"d_hidden": 99}},
    }
    model = small_model(mixers=mixers, schedule=["bare", "wide"], num_layers=2)
    assert model.blocks[0].channel_mixer is None
    assert model.blocks[1].channel_mixer.up.weight.shape == (99, 16)


@pytest.mark.parametrize(
    ("changes", "where", "word"),
    [
        ({"schedule": []}, "model.schedule", "empty"),
        ({"mixers": {"a": {"mixer": "mamba"}}, "schedule": ["b"]}, "model.schedule", "'b'"),
        ({"mixers": {"a": {}}, "schedule": ["a"]}, "model.mixers.a", "which mixer"),
        ({"mixers": {"a": {"mixer": "mambo"}}, "schedule": ["a"]}, "model.mixers.a.mixer", "did you mean 'mamba'"),
        ({"mixers": {"a": {"mixer": "mamba", "stat": 3}}, "schedule": ["a"]}, "model.mixers.a.stat", "state_dim"),
        ({"mixers": {"a": {"mixer": "mamba", "state_dim": "x"}}, "schedule": ["a"]}, "model.mixers.a", "x"),
        ({"mixers": {"a": {"mixer": "window", "num_heads": 3}}, "schedule": ["a"]}, "num_heads", "divide"),
        (
            {"mixers": {"a": {"mixer": "segment_attention", "segment_len": 0}}, "schedule": ["a"]},
            "model.mixers.a",
            "segment_len is 0",
        ),
        ({"vocab_size": 0}, "model.vocab_size", "vocab_size is 0"),
        ({"num_layers": 0}, "model.num_layers", "num_layers is 0"),
    ],
)
def test_a_recipe_that_cannot_be_built_is_refused_by_its_key(changes: dict[str, Any], where: str, word: str) -> None:
    with pytest.raises((ConfigError, NotFoundError)) as error:
        build_model(small_config(**changes))
    assert where in error.value.where
    assert word in str(error.value)


@pytest.mark.parametrize("named", ["subquad_ssm.mamba:Mambo", "subquad_ssm.mambo:Mamba"])
def test_a_builder_that_is_not_there_is_the_plugins_error(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = build.check_mixers(small_config())
    wrong = {key: replace(entry, spec=replace(entry.spec, build=named)) for key, entry in entries.items()}
    monkeypatch.setattr(build, "check_mixers", lambda config: wrong)
    with pytest.raises(PluginError, match=named):
        build_model(small_config())


def test_a_mixer_without_a_method_is_refused_when_it_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "unfinished.py").write_text(
        "from torch import nn\n\n\nclass Unfinished(nn.Module):\n"
        "    def __init__(self, config, context):\n        super().__init__()\n\n"
        "    def empty_carry(self, batch_size):\n        return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entries = build.check_mixers(small_config())
    wrong = {key: replace(one, spec=replace(one.spec, build="unfinished:Unfinished")) for key, one in entries.items()}
    monkeypatch.setattr(build, "check_mixers", lambda config: wrong)
    with pytest.raises(PluginError, match="has no forward, prefill, decode, init_parameters\n") as error:
        build_model(small_config())
    assert error.value.where == "unfinished:Unfinished"


def test_the_methods_of_a_mixer_are_those_of_its_protocol() -> None:
    assert tuple(name for name in vars(Mixer) if not name.startswith("_")) == MIXER_METHODS


def test_what_a_builder_itself_cannot_import_is_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    entries = build.check_mixers(small_config())
    wrong = {key: replace(one, spec=replace(one.spec, build="needs_more:Mixer")) for key, one in entries.items()}
    monkeypatch.setattr(build, "check_mixers", lambda config: wrong)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        build_model(small_config())
