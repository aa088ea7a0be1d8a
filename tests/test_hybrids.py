"""Hybrids in the published ratios: order, parameter counts, shared key heads, carries, and that they learn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from subquad import ConfigError, build_model, load_config
from subquad.model.language_model import LanguageModel
from subquad.testing.mixer_suite import assert_close, carry_bytes

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT / "conf" / "model", ROOT / "plugins" / "subquad-linear" / "subquad_linear" / "conf" / "model")

RATIOS = {
    "gated_delta_net_hybrid": {"gated_delta_net": 3, "softmax_attention": 1},
    "lightning_hybrid": {"lightning": 7, "softmax_attention": 1},
    "jamba": {"mamba": 7, "softmax_attention": 1},
    "samba": {"mamba": 1, "window": 1},
}


def mamba_mixer(d: int) -> int:
    """Gu and Dao 2023, c = 2 d channels: in, taps with bias, maps to steps (d / 16), B and C; steps; A, D; out."""
    c, rank = 2 * d, d // 16
    return 2 * c * d + 5 * c + c * (rank + 32) + (rank + 1) * c + 16 * c + c + c * d


def attention_mixer(d: int, sharing: int) -> int:
    """q and output of d^2; keys and values of d^2 / sharing, the number of query heads to a key head."""
    return 2 * d * d + 2 * d * d // sharing


def gated_delta_net_mixer(d: int) -> int:
    """6 d^2, taps of 4, two gates of 6 heads with A and dt, a norm of 256."""
    return 6 * d * d + 4 * 3 * d + 2 * 6 * d + 2 * 6 + 256


LAYOUTS = {
    # recipe: (parameters of all mixers, d_model, blocks, hidden width of SwiGLU)
    "gated_delta_net_hybrid_370m": (18 * gated_delta_net_mixer(1024) + 6 * attention_mixer(1024, 4), 1024, 24, 2816),
    "lightning_hybrid_340m": (21 * (5 * 1024**2 + 1024) + 3 * attention_mixer(1024, 8), 1024, 24, 2560),
    "jamba_450m": (21 * mamba_mixer(1024) + 3 * attention_mixer(1024, 4), 1024, 24, 3584),
    "samba_421m": (6 * mamba_mixer(1536) + 6 * attention_mixer(1536, 1), 1536, 12, 4096),
}


def tiny(recipe: str, *overrides: str) -> LanguageModel:
    """The laptop recipe on 96 channels, float64, of one period at least."""
    config = load_config([f"model={recipe}", *overrides]).model
    config.d_model, config.vocab_size, config.context_len = 96, 32, 64
    torch.manual_seed(0)
    return build_model(config).double()


def ids(t: int) -> Tensor:
    return torch.randint(0, 32, (2, t), generator=torch.Generator().manual_seed(t))


@pytest.mark.parametrize("recipe", LAYOUTS)
def test_the_sized_recipe_has_the_parameter_count_of_its_layout(recipe: str) -> None:
    mixers, d, blocks, d_hidden = LAYOUTS[recipe]
    expected = mixers + blocks * (3 * d * d_hidden + 2 * d) + d + 32000 * d
    config = load_config([f"model={recipe}"]).model
    config.context_len = 4096
    model = build_model(config, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    (path,) = (folder / f"{recipe}.yaml" for folder in FOLDERS if (folder / f"{recipe}.yaml").exists())
    assert f"{expected:,} parameters" in path.read_text(encoding="utf-8").partition("\n")[0]


@pytest.mark.parametrize("recipe", [*RATIOS, *LAYOUTS])
def test_the_mixers_stand_in_the_published_ratio(recipe: str) -> None:
    ratio = RATIOS[recipe if recipe in RATIOS else recipe.rpartition("_")[0]]
    config = load_config([f"model={recipe}"]).model
    config.vocab_size, config.context_len = 32, 64
    names = Counter(block.mixer_name for block in build_model(config, device="meta").blocks)
    periods = config.num_layers // sum(ratio.values())
    assert names == {name: count * periods for name, count in ratio.items()}


def test_the_attention_of_jamba_is_the_fifth_of_eight() -> None:
    """Lieber et al. 2024: a period of 8 with an offset of 4."""
    names = [block.mixer_name for block in tiny("jamba").blocks]
    assert names.index("softmax_attention") == 4


@pytest.mark.parametrize("recipe", RATIOS)
def test_a_hybrid_learns_a_batch_by_heart(recipe: str) -> None:
    model, batch = tiny(recipe).float(), ids(17)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize("recipe", RATIOS)
def test_prefill_and_decode_of_a_hybrid_equal_its_forward(recipe: str) -> None:
    model, tokens = tiny(recipe), ids(12)
    with torch.no_grad():
        y, carry = model.prefill(tokens[:, :7], model.empty_carry(2))
        parts = [y]
        for t in range(7, 12):
            y_t, carry = model.decode(tokens[:, t], carry)
            parts.append(y_t.unsqueeze(1))
        assert_close(torch.cat(parts, 1), model(tokens), "prefill of 7, then decode")


@pytest.mark.parametrize(
    ("recipe", "key_heads"), [("gated_delta_net_hybrid", 2), ("lightning_hybrid", 1), ("jamba", 1)]
)
def test_of_a_hybrid_only_attention_grows_by_its_shared_key_heads(recipe: str, key_heads: int) -> None:
    """Keys and values of `num_kv_heads` heads of 24, float64, for each of 2 sequences; one attention block a period."""
    model = tiny(recipe)
    with torch.no_grad():
        _, short = model.prefill(ids(8), model.empty_carry(2))
        _, long = model.prefill(ids(20), model.empty_carry(2))
    assert carry_bytes(long) - carry_bytes(short) == 12 * 2 * 2 * key_heads * 24 * 8


def test_a_layer_may_differ_from_others_of_its_mixer() -> None:
    """Two entries of one mixer, each with a config and a channel mixer of its own, beside RWKV's two blocks."""
    model = tiny(
        "rwkv7",
        "+mixer@model.mixers.near=window", "model.mixers.near.window=4",
        "+model.mixers.near.channel_mixer={d_hidden: 40}",
        "+mixer@model.mixers.far=window", "model.mixers.far.window=16", "model.mixers.far.num_kv_heads=1",
        "model.schedule=[rwkv7,rwkv_channel_mix,near,rwkv7,rwkv_channel_mix,far]", "model.num_layers=6",
    )  # fmt: skip
    near, far = model.blocks[2], model.blocks[5]
    assert (near.mixer.window, far.mixer.window) == (4, 16)
    assert (near.mixer.num_kv_heads, far.mixer.num_kv_heads) == (4, 1)
    assert near.channel_mixer.up.weight.shape == (40, 96)
    assert far.channel_mixer is None and model.blocks[0].channel_mixer is None
    assert model(ids(9)).isfinite().all()


def test_keys_that_heads_cannot_share_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="4 heads cannot share 3 key heads"):
        tiny("jamba", "model.mixers.softmax_attention.num_kv_heads=3")
