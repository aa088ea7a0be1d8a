"""What is exported loads elsewhere, with the very logits: our own format, transformers' classes, and remote code."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import subquad
from subquad.errors import ConfigError, NotFoundError, ResumeError
from subquad.model.build import build_model
from subquad.model.import_weights import import_weights
from subquad.model.language_model import LanguageModel
from subquad.registry import load_registry
from subquad.schema import ChannelMixerConfig, ExportConfig, GenerateConfig, ModelConfig, RunConfig, TrainerConfig
from subquad.training.checkpoint import write_checkpoint
from subquad.training.export import MODELING, export
from subquad.training.generate import generate
from subquad.training.run_folder import RunFolder, create, write_config
from subquad.training.tokenizer import ByteTokenizer, FileTokenizer, SymbolTokenizer, Tokenizer, save_tokenizer

TOLERANCE = 1e-5
"""Of logits of size one in float32: a hundred roundings of 1e-7; their sums run in another order."""
T = 37

Run = tuple[Path, LanguageModel]
MakeRun = Callable[..., Run]


@pytest.fixture
def run(tmp_path: Path) -> MakeRun:
    """Writes a run folder as training would, with drawn weights: `run("mamba", mamba={"state_dim": 4})`."""

    def written(
        *schedule: str, tokenizer: Tokenizer | None = None, model: dict[str, Any] | None = None, **mixers: Any
    ) -> Run:
        config = ModelConfig(
            **{
                "name": "small", "d_model": 32, "num_layers": 2, "vocab_size": 256, "context_len": 64,
                "schedule": list(schedule), "init_std": 0.2,
                "mixers": {name: {"mixer": name, **mixers.get(name, {})} for name in schedule},
                "channel_mixer": ChannelMixerConfig(d_hidden=48),
            } | (model or {})
        )  # fmt: skip
        torch.manual_seed(0)
        built = build_model(config).eval()
        folder = RunFolder(tmp_path / "run")
        create(folder)
        write_config(folder, RunConfig(model=config, trainer=TrainerConfig(accelerator="cpu")))
        save_tokenizer(tokenizer or ByteTokenizer(), folder.path)
        write_checkpoint(folder.checkpoints, 1, built.state_dict(), {}, keep=1)
        return folder.path, built

    return written


def exported(folder: Path, kind: str) -> tuple[Path, str]:
    out = folder.parent / kind
    return out, export(ExportConfig(run=str(folder), format=kind, out=str(out)))


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(256, (2, T), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        found = model(tokens)
    return found if isinstance(found, torch.Tensor) else found.logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_gives_the_logits_bit_for_bit(run: MakeRun, tied: bool) -> None:
    folder, model = run(
        "mamba", "segment_attention", segment_attention={"num_heads": 2}, model={"tie_embeddings": tied}
    )
    out, told = exported(folder, "safetensors")
    assert "subquad.load_model" in told
    assert torch.equal(logits(subquad.load_model(out)), logits(model))
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == [], "nothing is left over"
    texts = [
        generate(GenerateConfig(run=str(path), prompt="def ", max_tokens=8), out=io.StringIO())
        for path in (folder, out)
    ]
    assert texts[0] == texts[1]


NATIVE: dict[str, dict[str, Any]] = {
    "llama": {"softmax_attention": {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 500.0}},
    "mistral": {"window": {"num_heads": 4, "window": 5, "head_dim": 12}},
    "mamba": {"mamba": {"state_dim": 4, "conv_width": 3}},
    "mamba2": {"mamba2": {"state_dim": 8, "head_dim": 16, "num_groups": 2}},
}
transformers: Any = pytest.importorskip("transformers", minversion="5", reason="needs subquad[hf]")


@pytest.fixture(autouse=True)
def _torch_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their code must not take kernels of packages that happen to be installed; nor write into the user's cache."""
    for name in ("mamba_ssm", "causal_conv1d", "kernels"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", NATIVE)
def test_transformers_own_class_gives_the_same_logits(run: MakeRun, model_type: str, tied: bool) -> None:
    ((mixer, options),) = NATIVE[model_type].items()
    backbone = {} if model_type in ("llama", "mistral") else {"channel_mixer": None}
    folder, model = run(mixer, model={"tie_embeddings": tied, "norm_eps": 1e-5} | backbone, **{mixer: options})
    out, told = exported(folder, "hf")
    assert told.startswith(f"{model_type} of transformers")
    assert not (out / MODELING).exists()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.config.model_type == model_type
    found, expected = logits(theirs), logits(model)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    # And back: our own reader takes it for the same model.
    again = build_model(config := replace(model_config(folder), init_from=f"hf:{out}"))
    import_weights(again, config)
    assert torch.equal(logits(again.eval()), expected)


def model_config(folder: Path) -> ModelConfig:
    from subquad.training.run_folder import read_config

    return read_config(RunFolder(folder), "run").model


def test_every_import_that_claims_an_export_is_tested() -> None:
    assert {spec.model_type for spec in load_registry().imports.values() if spec.export} == set(NATIVE)


@pytest.mark.parametrize("tied", [True, False])
def test_remote_code_gives_the_same_logits_and_texts(run: MakeRun, tied: bool) -> None:
    folder, model = run(
        "mamba2", "segment_attention",
        mamba2={"head_dim": 16}, segment_attention={"num_heads": 2}, model={"tie_embeddings": tied},
    )  # fmt: skip
    out, told = exported(folder, "hf")
    assert "mixers are mamba2, segment_attention" in told
    assert "trust_remote_code=True" in told and "AutoTokenizer" in told
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(logits(theirs), logits(model))
    tokens = torch.tensor([[1, 2, 3]])
    drawn = theirs.generate(tokens, max_new_tokens=5, do_sample=False)
    expected = tokens
    with torch.inference_mode():
        for _ in range(5):
            expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(drawn, expected)
    with pytest.raises(ValueError, match="left padding"):
        theirs(tokens, attention_mask=torch.tensor([[0, 1, 1]]))
    loss = theirs(tokens, labels=tokens).loss
    nats = nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
    assert torch.allclose(loss, nats)
    theirs.save_pretrained(out.parent / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(out.parent / "again", trust_remote_code=True)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("mixer", "options", "model", "reason"),
    [
        ("mamba", {}, {}, "channel mixer"),  # Mamba in blocks with a channel mixer is nobody else's model
        ("mamba2", {"head_dim": 16}, {"channel_mixer": None}, "layer_norm_epsilon is 1e-06"),
        ("softmax_attention", {}, {"logit_cap": 5.0}, "logit_cap"),
        ("softmax_attention", {}, {"channel_mixer": None}, "channel mixer"),
    ],
)  # fmt: skip
def test_what_their_class_does_not_compute_is_exported_with_its_reason(
    run: MakeRun, mixer: str, options: dict[str, Any], model: dict[str, Any], reason: str
) -> None:
    folder, ours = run(mixer, model=model, **{mixer: options})
    out, told = exported(folder, "hf")
    assert reason in told
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(logits(theirs), logits(ours))


TEXT = "Ünïcode \x00\t\n  “quotes” 漢字 🙂 " + bytes(range(256)).decode("latin-1")


def test_bytes_are_numbered_there_as_here(run: MakeRun) -> None:
    folder, _ = run("softmax_attention")
    out, _ = exported(folder, "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    tokens = ByteTokenizer().encode(TEXT)
    assert theirs(TEXT)["input_ids"] == tokens
    assert theirs.decode(tokens) == TEXT


def test_symbols_and_files_are_numbered_there_as_here(run: MakeRun, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as TokenizerFile
    from tokenizers import models, pre_tokenizers

    words = TokenizerFile(models.WordLevel({"the": 0, "cat": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for number, (tokenizer, text) in enumerate(
        ((SymbolTokenizer(20), "3 14 0 19"), (FileTokenizer(words.to_str()), "the cat the dog"))
    ):
        folder, _ = run("softmax_attention", tokenizer=tokenizer)
        out, _ = exported(folder, "hf")
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        for path in (folder, out):
            path.rename(tmp_path / f"{path.name}-{number}")


def test_what_is_wrong_is_named(run: MakeRun, tmp_path: Path) -> None:
    folder, _ = run("softmax_attention")
    for settings, kind, where in (
        ({"format": "hff"}, ConfigError, "export.format"),
        ({"out": str(folder)}, ConfigError, "export.out"),
        ({"run": str(tmp_path)}, ResumeError, f"run={tmp_path}"),
    ):
        with pytest.raises(kind) as caught:
            export(ExportConfig(**{"run": str(folder), "out": str(tmp_path / "new")} | settings))  # type: ignore[arg-type]
        assert caught.value.where == where
        assert not (tmp_path / "new").exists()
    out, _ = exported(folder, "safetensors")
    record = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(record | {"format_version": 9}))
    with pytest.raises(ConfigError, match="format version is 9"):
        subquad.load_model(out)
    record["model"]["d_model"] = 16
    (out / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="size mismatch"):
        subquad.load_model(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"model\.safetensors"):
        subquad.load_model(out)
    with pytest.raises(NotFoundError):
        subquad.load_model(tmp_path)
    (out / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="not what `export` writes"):
        subquad.load_model(out)
