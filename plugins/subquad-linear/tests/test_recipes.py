"""The recipes: each composes, the laptop sizes run, the paper sizes have the block layout's parameter count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from subquad import build_model, load_config

PACKAGE = Path(__file__).resolve().parent.parent
README = (PACKAGE / "README.md").read_text(encoding="utf-8")


def retnet_block(d: int) -> int:
    """Sun et al. 2023, section 2.2: q, k of d^2; v, gate and output of 2 d^2."""
    return 2 * d * d + 3 * 2 * d * d


def gla_block(d: int) -> int:
    """Yang et al. 2023, section 4.4: q, k of d^2 / 2; v, gate, output of d^2; decays of rank 16; a norm of d / 4."""
    return 4 * d * d + 16 * (d + d // 2) + d // 2 + d // 4


def gated_delta_net_block(d: int) -> int:
    """Yang et al. 2024: q, k of 0.75 d^2; v, gate, output of 1.5 d^2; taps; two gates; A, dt and a norm of 256."""
    return 6 * d * d + 4 * 3 * d + 2 * 6 * d + 2 * 6 + 256


def log_linear_gated_delta_net_block(d: int, n: int) -> int:
    """Guo et al. 2025, released code: Gated DeltaNet of 6 heads, n keys and 2 n values each; 15 weights a head; L."""
    gated_delta_net = 8 * d * 6 * n + 4 * 4 * 6 * n + 2 * 6 * d + 2 * 6 + 2 * n
    return gated_delta_net + 6 * 15 * (d + 1)


def delta_net_block(d: int) -> int:
    """Yang et al. 2024, section 3: q, k, v, output of d^2; taps; the write gate; a norm of a head."""
    return 4 * d * d + 4 * 3 * d + 8 * d + d // 8


def lightning_block(d: int) -> int:
    """MiniMax 2025: q, k, v, gate, output of d^2, and a norm of d."""
    return 5 * d * d + d


def mlstm_block(d: int) -> int:
    """Beck et al. 2025: q, k of d^2 / 2; v, gate, output of d^2; two gates of 4 heads with biases; a norm of d."""
    return 4 * d * d + 2 * 4 * (d + 1) + d


def rwkv6_layer(d: int) -> int:
    """Peng et al. 2024, appendix: 13 d^2 + 464 d, two LayerNorms of 2 d among them; here of one RMSNorm of d each.

    One of the two is counted here, the other by the test.
    """
    return 13 * d * d + 464 * d - 4 * d + d


def rwkv7_layer(d: int) -> int:
    """Peng et al. 2025, appendix: 12 d^2 + 2 d (d_w + d_a + d_v + d_g) + 19 d; norms as above.

    The value residual is 2 d d_v + d of that, its base among the 19 d, and missing in the first layer.
    """
    return 12 * d * d + 2 * d * (64 + 64 + 128) + 18 * d - 4 * d + d


def value_residuals(d: int, layers: int) -> int:
    """Of all layers but the first."""
    return (layers - 1) * (2 * d * 32 + d)


def slstm_block(d: int) -> int:
    """Beck et al. 2024: four gates and four recurrent maps of d^2 / 4; biases; taps of 4 and a bias; a norm of d."""
    return 2 * d * d + 4 * d + 5 * d + d


def log_linear_block(d: int) -> int:
    """Guo et al. 2025 on GLA's block: a decay and 15 weights for each of 4 heads; L; a norm of d / 4."""
    return 4 * d * d + 4 * (d + 1) + 4 * 15 * (d + 1) + d // 4


def ttt_block(d: int, inner: int) -> int:
    """Sun et al. 2024, released code: q, k, v, output of d^2, rates, 16 token scales, LN of heads and of all, and W."""
    return 4 * d * d + 16 * (d + 1) + 16 + 2 * d + 2 * d + inner


def ttt_mamba_layer(d: int, inner: int) -> int:
    """Sun et al. 2024, released code: a gate for the map that q and k share, their taps of 4 and biases.

    Before it, a convolution with bias and its norm.
    """
    return ttt_block(d, inner) + 2 * 5 * d + 5 * d + d


LAYOUTS = {
    # recipe: (parameters of a mixer, d_model, blocks, hidden width of SwiGLU, vocabulary, tied)
    "retnet_340m": (retnet_block(1024), 1024, 24, 1536, 32000, True),
    "gla_340m": (gla_block(1024), 1024, 24, 2816, 32000, True),
    "gated_delta_net_340m": (gated_delta_net_block(1024), 1024, 21, 2816, 32000, True),
    "log_linear_gated_delta_net_340m": (log_linear_gated_delta_net_block(1024, 128), 1024, 21, 2816, 32000, True),
    "log_linear_gated_delta_net_796m": (log_linear_gated_delta_net_block(1536, 192), 1536, 21, 4096, 32000, False),
    "delta_net_340m": (delta_net_block(1024), 1024, 24, 2816, 32000, False),
    "mlstm_340m": (mlstm_block(1024), 1024, 24, 2752, 32000, True),
    "lightning_340m": (lightning_block(1024), 1024, 24, 2560, 32000, True),
    "rwkv6_470m": (rwkv6_layer(1024), 1024, 24, 0, 65536, False),  # layers of two blocks
    "rwkv7_450m": (rwkv7_layer(1024), 1024, 24, 0, 65536, False),
    "ttt_linear_350m": (ttt_block(1024, 1024 * (64 + 1)), 1024, 24, 2736, 32000, True),
    "ttt_mlp_350m": (ttt_block(1024, 1024 * (8 * 64 + 5)), 1024, 24, 2736, 32000, True),
    "ttt_linear_mamba_350m": (ttt_mamba_layer(1024, 1024 * (64 + 1)), 1024, 24, 2736, 32000, True),  # of two blocks
    "ttt_mlp_mamba_350m": (ttt_mamba_layer(1024, 1024 * (8 * 64 + 5)), 1024, 24, 2736, 32000, True),
    "log_linear_340m": (log_linear_block(1024), 1024, 24, 2816, 32000, True),
}


@pytest.mark.parametrize("recipe", LAYOUTS)
def test_the_paper_s_size_has_the_parameter_count_of_its_block_layout(recipe: str) -> None:
    mixer, d, blocks, d_hidden, vocabulary, tied = LAYOUTS[recipe]
    norms = d + (d if d_hidden else 0)
    expected = blocks * (mixer + 3 * d * d_hidden + norms) + d + vocabulary * d * (1 if tied else 2)
    expected += value_residuals(d, blocks) if recipe == "rwkv7_450m" else 0
    config = load_config([f"model={recipe}"])
    config.model.context_len = 4096
    model = build_model(config.model, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    row = README.partition(f"| `{recipe}` |")[2].partition("\n")[0]
    assert f"| {expected:,} |" in row
    written = (PACKAGE / "subquad_linear" / "conf" / "model" / f"{recipe}.yaml").read_text(encoding="utf-8")
    assert f"{expected:,} parameters" in written.partition("\n")[0]


def test_rwkv_has_the_published_count_but_for_what_is_left_out() -> None:
    """Peng et al. 2024: 13 d^2 L + 464 d L + 4 d + 2 d V. Peng et al. 2025: RWKV7-World-0.4B has 450,767,872."""
    d, layers, vocabulary = 1024, 24, 65536
    norms = 2 * d * layers + 3 * d  # biases of LayerNorms, and the norm behind the embedding
    finch = 13 * d * d * layers + 464 * d * layers + 4 * d + 2 * d * vocabulary
    for recipe, published in (("rwkv6_470m", finch), ("rwkv7_450m", 450_767_872)):
        config = load_config([f"model={recipe}"])
        config.model.context_len = 4096
        model = build_model(config.model, device="meta")
        assert sum(parameter.numel() for parameter in model.parameters()) == published - norms, recipe


def test_xlstm_has_seven_matrix_lstms_to_a_scalar_one() -> None:
    config = load_config(["model=xlstm_340m"]).model
    config.context_len = 4096
    model = build_model(config, device="meta")
    kinds = [type(block.mixer).__name__ for block in model.blocks]
    assert (kinds.count("MatrixLSTM"), kinds.count("ScalarLSTM")) == (21, 3)
    d = 1024
    blocks = 21 * (mlstm_block(d) + 3 * d * 2752 + 2 * d) + 3 * (slstm_block(d) + 3 * d * 1344 + 2 * d)
    expected = blocks + d + 32000 * d
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert f"| {expected:,} |" in README.partition("| `xlstm_340m` |")[2].partition("\n")[0]


@pytest.mark.parametrize("recipe", sorted({*(name.rsplit("_", 1)[0] for name in LAYOUTS), "slstm", "xlstm"}))
def test_the_laptop_size_composes_builds_and_learns(recipe: str) -> None:
    config = load_config([f"model={recipe}"]).model
    assert config.name == recipe
    config.vocab_size, config.context_len = 64, 64
    torch.manual_seed(0)
    model = build_model(config)
    logits = model(torch.randint(0, 64, (2, 33)))
    assert logits.shape == (2, 33, 64)
    logits.logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
