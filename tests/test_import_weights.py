"""Checkpoints that Hugging Face's own code wrote give, in our models, the logits that its code gives."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_site import Site
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import TinyRun
from subquad import (
    ConfigError,
    NotFoundError,
    build_model,
    import_weights,
    load_config,
)
from subquad.model.import_layout import WHY_NOT, import_map, with_layout
from subquad.model.language_model import LanguageModel
from subquad.registry import KNOWN_IMPORTS, load_registry
from subquad.schema import ModelConfig
from subquad.training.checkpoint import newest_checkpoint
from subquad.training.fit import train

transformers = pytest.importorskip("transformers", minversion="5", reason="needs subquad[hf]")

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
TOLERANCE = 1e-5
"""Of logits of size one in float32: a hundred roundings of 1e-7."""
T = 67
"""More than a chunk of theirs and of ours, and no multiple of one."""


def llama(**options: Any) -> nn.Module:
    sizes = SIZES | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | options))  # type: ignore[no-any-return]


def mistral(**options: Any) -> nn.Module:
    sizes = SIZES | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5}
    return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes | options))  # type: ignore[no-any-return]


def mamba(**options: Any) -> nn.Module:
    return transformers.MambaForCausalLM(  # type: ignore[no-any-return]
        transformers.MambaConfig(**SIZES | {"state_size": 4, "time_step_rank": 3} | options)
    )


def mamba2(**options: Any) -> nn.Module:
    sizes = SIZES | {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 16}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes | options))  # type: ignore[no-any-return]


def qwen3_next(**options: Any) -> nn.Module:
    sizes = SIZES | {
        "intermediate_size": 48, "layer_types": ["linear_attention"] * 2, "num_experts": 0, "linear_key_head_dim": 16,
        "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }  # fmt: skip
    config = transformers.Qwen3NextConfig(**sizes | options)
    return transformers.Qwen3NextForCausalLM(config)  # type: ignore[no-any-return]


def xlstm(**options: Any) -> nn.Module:
    sizes = SIZES | {"num_heads": 4, "autocast_kernel_dtype": "float32"}
    return transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**sizes | options))  # type: ignore[no-any-return]


CASES: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama, one head of keys, tied, wider heads": lambda: llama(
        num_key_value_heads=1, head_dim=12, tie_word_embeddings=True, rope_parameters={"rope_theta": 500.0}
    ),
    "mistral": mistral,
    "mistral without a window": lambda: mistral(sliding_window=None),
    "mamba": mamba,
    "mamba, untied": lambda: mamba(tie_word_embeddings=False, expand=3, conv_kernel=3),
    "mamba2": mamba2,
    "mamba2, tied": lambda: mamba2(tie_word_embeddings=True, n_groups=1),
    "qwen3_next": qwen3_next,
    "qwen3_next, a head of keys for each": lambda: qwen3_next(linear_num_key_heads=4, tie_word_embeddings=True),
    "xlstm": xlstm,
    "xlstm, other caps": lambda: xlstm(gate_soft_cap=5.0, output_logit_soft_cap=0.5, qk_dim_factor=1.0),
}


MIXERS = {
    "llama": "softmax_attention", "mistral": "window", "mamba": "mamba", "mamba2": "mamba2",
    "qwen3_next": "gated_delta_net", "xlstm": "mlstm",
}  # fmt: skip


def architecture(case: str) -> str:
    """The model_type that a case begins with."""
    return re.split("[ ,]", case)[0]


@pytest.fixture(autouse=True)
def _same_draws_and_torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where these packages are installed, transformers calls their kernels in place of its own torch code."""
    for package in ("fla", "mamba_ssm", "causal_conv1d", "mambapy"):
        monkeypatch.setitem(sys.modules, package, None)
    torch.manual_seed(0)


def written(model: nn.Module, folder: Path, **options: Any) -> str:
    """The source of a checkpoint whose every parameter, norms and biases too, is drawn anew."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    return f"hf:{folder}"


def layout(source: str) -> ModelConfig:
    """What `model=imported model.init_from=SOURCE` composes, without the second that Hydra takes."""
    return with_layout(ModelConfig(name="imported", schedule=[], init_from=source, context_len=128))


def imported(source: str) -> LanguageModel:
    """Our model of a checkpoint."""
    config = layout(source)
    model = build_model(config)
    import_weights(model, config)
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(50, (2, T))


@pytest.mark.cross_check
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if "without" in case else pytest.mark.oracle(MIXERS[architecture(case)]))
        for case in CASES
    ],
)
@torch.no_grad()
def test_an_imported_model_has_the_logits_of_the_original(case: str, tmp_path: Path) -> None:
    theirs = CASES[case]().eval()
    ours = imported(written(theirs, tmp_path))
    x = tokens()
    expected = theirs(x, use_cache=False).logits
    assert expected.std() > 0.1, "logits that hardly vary would agree whatever the maps do"
    torch.testing.assert_close(ours(x), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.cross_check
@torch.no_grad()
def test_fused_maps_of_an_xlstm_are_taken_apart(tmp_path: Path) -> None:
    theirs = xlstm().eval()
    source = written(theirs, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for block in range(SIZES["num_hidden_layers"]):
        prefix = f"backbone.blocks.{block}."
        for fused, parts in {
            "mlstm_layer.qkv_opreact.weight": [
                f"mlstm_layer.{name}.weight" for name in ("q", "k", "v", "ogate_preact")
            ],
            "mlstm_layer.ifgate_preact.weight": [f"mlstm_layer.{name}gate_preact.weight" for name in "if"],
            "mlstm_layer.ifgate_preact.bias": [f"mlstm_layer.{name}gate_preact.bias" for name in "if"],
            "ffn.proj_up_gate_z.weight": ["ffn.proj_up_gate.weight", "ffn.proj_up.weight"],
        }.items():
            tensors[prefix + fused] = torch.cat([tensors.pop(prefix + part) for part in parts])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    changed(tmp_path, weight_mode="fused")
    x = tokens()
    torch.testing.assert_close(imported(source)(x), theirs(x, use_cache=False).logits, rtol=TOLERANCE, atol=TOLERANCE)


def changed(folder: Path, **values: Any) -> None:
    """Edit a checkpoint's config.json; None removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refused(source: str) -> ConfigError | NotFoundError:
    """The error of an import, which says where."""
    with pytest.raises((ConfigError, NotFoundError)) as caught:
        imported(source)
    assert "hf:" in caught.value.where
    return caught.value


def test_every_architecture_that_is_declared_is_compared() -> None:
    assert {architecture(case) for case in CASES} == set(load_registry().imports) == set(MIXERS)


@torch.no_grad()
def test_a_wrong_map_shows_in_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(llama(num_key_value_heads=4), tmp_path)
    x = tokens()
    right = imported(source)(x)
    block = import_map(source).blocks["softmax_attention"]
    monkeypatch.setitem(block, "mixer.q_proj.weight", "self_attn.k_proj.weight")
    monkeypatch.setitem(block, "mixer.k_proj.weight", "self_attn.q_proj.weight")
    assert (imported(source)(x) - right).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_prefill_and_decode_of_an_imported_model_go_on_from_each_other(tmp_path: Path) -> None:
    model = imported(written(qwen3_next(), tmp_path))
    x = tokens()
    first, carry = model.prefill(x[:, :-1], model.empty_carry(2))
    last, _ = model.decode(x[:, -1], carry)
    found = torch.cat([first, last[:, None]], dim=1)
    torch.testing.assert_close(found, model(x), rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def test_a_checkpoint_in_shards_and_in_half_precision_is_read(tmp_path: Path) -> None:
    theirs = mamba2().bfloat16()
    source = written(theirs, tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = imported(source).state_dict()
    assert ours["embedding.weight"].dtype == torch.float32
    expected = theirs.state_dict()["backbone.layers.1.mixer.in_proj.weight"].float()
    assert torch.equal(ours["blocks.1.mixer.in_proj.weight"], expected)


def test_a_recipe_that_describes_the_checkpoint_is_taken_and_one_that_does_not_is_named(tmp_path: Path) -> None:
    source = written(mamba2(), tmp_path)
    sizes = [
        "model=mamba2", f"model.init_from='{source}'", "model.d_model=32", "model.num_layers=2", "model.norm_eps=1e-5",
        "model.tie_embeddings=false", "model.mixers.mamba2.state_dim=8", "model.mixers.mamba2.head_dim=16",
        "model.mixers.mamba2.num_groups=2",
    ]  # fmt: skip
    config = load_config(sizes).model
    assert (config.vocab_size, config.name) == (50, "mamba2")
    with pytest.raises(ConfigError, match=r"d_model: 32, not 64; mamba2\.head_dim: 16, not 8\n"):
        load_config([*sizes, "model.d_model=64", "model.mixers.mamba2.head_dim=8"])
    with pytest.raises(ConfigError, match="the mixer of layer 0: mamba2, not mamba"):
        load_config(["model=mamba", *sizes[1:6]])
    with pytest.raises(ConfigError, match=r"leaves layers open \(auto\)"):
        load_config(["model=auto_hybrid", *sizes[1:6]])
    with pytest.raises(ConfigError, match="d_model: 32, not 48"):
        load_config(["model=imported", f"model.init_from='{source}'", "model.d_model=48"])
    with pytest.raises(ConfigError, match="no checkpoint is named"):
        load_config(["model=imported"])


def test_what_our_blocks_cannot_compute_is_refused_by_its_key(tmp_path: Path) -> None:
    for model, key, value in (
        (llama, "attention_bias", True),
        (llama, "hidden_act", "gelu"),
        (llama, "rope_parameters", {"rope_type": "llama3", "rope_theta": 1.0, "factor": 8.0}),
        (mamba, "use_bias", True),
        (mamba2, "time_step_limit", [0.0, 0.5]),
        (mamba2, "time_step_limit", ["none"]),
        (mamba2, "layer_norm_epsilon", 1e-6),
        (qwen3_next, "layer_types", ["linear_attention", "full_attention"]),
        (qwen3_next, "num_experts", 4),
        (xlstm, "v_dim_factor", 2.0),
        (xlstm, "tie_word_embeddings", True),
    ):  # fmt: skip
        folder = tmp_path / f"{model.__name__}-{key}-{value}".replace("/", "")
        source = written(model(), folder)
        changed(folder, **{key: value})
        key = "rotary positions" if key == "rope_parameters" else key
        assert key in str(refused(source))


def test_rwkv_of_transformers_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv"}))
    assert "RWKV-4" in refused(f"hf:{tmp_path}").what


def test_tensors_that_are_missing_left_over_misshapen_or_untied_are_named(tmp_path: Path) -> None:
    source = written(llama(tie_word_embeddings=True), tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)

    def with_tensors(**tensors: Tensor | None) -> str:
        kept = {name: tensor for name, tensor in (whole | tensors).items() if tensor is not None}
        save_file(kept, path, metadata={"format": "pt"})
        return refused(source).what

    name = "model.layers.1.mlp.up_proj.weight"
    assert with_tensors(**{name: None}) == f"the checkpoint lacks: {name}"
    assert with_tensors(**{"model.layers.0.extra": torch.ones(1)}).endswith("computes: model.layers.0.extra")
    found = with_tensors(**{name: torch.ones(40, 32)})
    assert found == f"blocks.1.channel_mixer.up.weight has the shape (48, 32), and the checkpoint has {name} (40, 32)"
    assert "lm_head.weight is not model.embed_tokens.weight" in with_tensors(**{"lm_head.weight": torch.ones(50, 32)})
    save_file(whole | {"lm_head.weight": whole["model.embed_tokens.weight"].clone()}, path)
    imported(source)  # a copy that is one
    path.write_bytes(path.read_bytes()[:100])
    assert "model.safetensors cannot be read" in refused(source).what


def test_a_refused_checkpoint_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    source = written(qwen3_next(), tmp_path)
    config = layout(source)
    model = build_model(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"model.layers.1.linear_attn.in_proj_qkvz.weight": torch.ones(7, 32)}, path)
    with pytest.raises(ConfigError, match=r"qkv_proj.weight has the shape .* does not fit"):
        import_weights(model, config)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_run_starts_from_the_checkpoint_and_goes_on_without_it(tiny_run: TinyRun, tmp_path: Path) -> None:
    source = written(mamba(vocab_size=300), tmp_path / "checkpoint")
    model = load_config(["model=imported", f"model.init_from='{source}'"]).model
    assert model == replace(layout(source), context_len=0)
    config = tiny_run("run", max_steps=1, run={"model": model, "optimizer": {"name": "adamw", "lr": 1e-30}})
    with pytest.warns(UserWarning, match="numbers tokens by its own vocabulary"):
        train(config)
    saved = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None
    expected = imported(source).state_dict()
    assert saved.weights().keys() == expected.keys()
    assert all(torch.equal(saved.weights()[name], tensor) for name, tensor in expected.items())
    shutil.rmtree(tmp_path / "checkpoint")
    assert (
        train(
            tiny_run("run", max_steps=2, run={"model": model, "optimizer": config.optimizer, "resume": config.run_dir})
        ).step
        == 2
    )


def test_every_architecture_stands_in_the_readme() -> None:
    table = (ROOT / "conf" / "README.md").read_text().partition("| `model_type` |")[2].partition("\n\n")[0]
    named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.+?`) \|", table, flags=re.M)))
    assert set(named) == set(load_registry().imports) | set(WHY_NOT)


def test_an_id_is_looked_up_in_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--someone--tiny-llama"
    written(llama(), repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert imported("hf:someone/tiny-llama").embedding.weight.shape == (50, 32)


FOREIGN = """
from subquad import ImportSpec, hookimpl
from subquad.mixers.llama_import import llama

@hookimpl
def subquad_provide_imports():
    return [ImportSpec(model_type="llama_of_mine", summary="as Llama", build="foreign_module:build")]

def build(config):
    config.demand("hidden_act", "silu", default="silu", because="mine has no other")
    return llama(config)
"""


def test_a_plugin_adds_an_architecture(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(llama(), tmp_path / "checkpoint")
    changed(tmp_path / "checkpoint", model_type="llama_of_mine")
    assert "no plugin loads checkpoints of model_type 'llama_of_mine'" in refused(source).what
    site.install("foreign", FOREIGN)
    monkeypatch.setattr("subquad.model.import_layout.load_registry", site.registry)
    assert imported(source).embedding.weight.shape == (50, 32)


def test_the_distribution_that_loads_an_architecture_is_named_where_it_is_missing() -> None:
    registry = load_registry()
    ours = {name: registry.origins[spec].distribution for name, spec in registry.imports.items()}
    assert dict(KNOWN_IMPORTS) == {name: owner for name, owner in ours.items() if owner != "subquad"}


def test_sources_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    assert "names no source" in str(_error(f"{tmp_path}"))
    assert "there is no config.json" in str(_error(f"hf:{tmp_path}"))
    assert "is no id of the hub" in str(_error("hf:not/an/id"))
    assert "the hub does not give 'nobody/nothing'" in str(_error("hf:nobody/nothing"))
    source = written(llama(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pickled weights are not read" in str(refused(source))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    assert "outside of its folder" in str(refused(source))
    changed(tmp_path, hidden_size="wide")
    assert "hidden_size is 'wide' and should be of type int" in str(refused(source))
    changed(tmp_path, model_type="lama")
    assert "did you mean 'llama'?" in refused(source).mend
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in str(refused(source))


def _error(source: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        layout(source)
    return caught.value
