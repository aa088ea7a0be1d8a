"""`explain module=` shows what a stranger's model would run, and says in three lines what is wrong with a call."""

from __future__ import annotations

from pathlib import Path

import pytest

from subquad.__main__ import main
from subquad.commands.explain import explain_module
from subquad.compose import load_config
from subquad.errors import ConfigError

SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F

T = 12

class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(T, T))

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, self.bias)

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 3)
        self.biased = Biased()

    def forward(self, x, mask=None):
        return self.biased(self.encoder(x, mask)[:, None])

def causal():
    return Both().eval(), (torch.randn(2, T, 16), nn.Transformer.generate_square_subsequent_mask(T))

def alone():
    return Both().eval()

def inputs():
    return {"x": torch.randn(4, T, 16)}

def dummy():
    model = Both().eval()
    model.dummy_inputs = torch.randn(3, T, 16)
    return model

def number():
    return 3

def missing():
    import a_package_nobody_has
"""


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A module beside the user, of a name of its own: imported modules stay."""
    module = f"their_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{module}.py").write_text(SOURCE, encoding="utf-8")
    return module


def test_it_names_nodes_masks_kernels_and_what_is_declined(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"module={name}:causal", "target=cpu", "measure=false"]) == 0
    shown = capsys.readouterr().out
    assert "softmax_attention  in MultiheadAttention.forward, layer 0,1,2" in shown
    assert "b=2 t=12 s=12 h=2 h_kv=2 k=8 v=8   causal=True window=0   float32   forward" in shown
    assert "sdpa_flash" in shown
    assert "layer 0,1,2 MultiheadAttention (encoder.layers.0.self_attn, ...): sdpa, mask causal" in shown
    assert "rewritten by torch_encoder_layer" in shown
    assert "layer 3 Biased.forward runs as written: its mask is learned" in shown


def test_another_device_is_explained_without_it(name: str) -> None:
    shown = explain_module([f"module={name}:causal", "target=h100"])
    assert "data sheet" in shown
    assert "sdpa_efficient" in shown


def test_inputs_come_from_a_function(name: str) -> None:
    shown = explain_module([f"module={name}:alone", f"example={name}:inputs", "target=cpu", "measure=false"])
    assert "batch 4, 12 tokens" in shown


def test_inputs_come_from_the_model_which_is_said(name: str) -> None:
    with pytest.warns(UserWarning, match="Both is called with its own dummy_inputs"):
        shown = explain_module([f"module={name}:dummy", "target=cpu", "measure=false"])
    assert "batch 3, 12 tokens" in shown


@pytest.mark.parametrize(
    ("factory", "more", "what"),
    [
        ("alone", [], "nothing says how Both is called"),
        ("number", [], "it returned int, not a torch.nn.Module"),
        ("nobody", [], "has no function 'nobody'"),
        ("causal", ["modle=3"], "there is no key 'modle'"),
        ("causal", ["measure=perhaps"], "'perhaps' is not a valid bool"),
        ("causal", ["target=abacus"], "abacus"),
    ],
)
def test_a_wrong_call_is_told_in_three_lines(
    name: str, factory: str, more: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", f"module={name}:{factory}", *more]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 3
    assert what in told[0]
    assert told[1].startswith("  where") and told[2].startswith("  mend")


@pytest.mark.parametrize("module", ["nowhere_to_be_found:f", "nowhere_to_be_found", ":f"])
def test_a_module_that_is_not_there_is_told(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"module={module}"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3


def test_an_error_in_the_users_own_code_is_the_users_to_see(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"module={name}:missing"]) == 1
    assert "a_package_nobody_has" in capsys.readouterr().err


def test_no_recipe_can_name_code_to_run(name: str) -> None:
    with pytest.raises(ConfigError, match="no key 'module'"):
        load_config([f"+module={name}:causal"])
