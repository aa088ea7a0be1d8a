"""`plugins check` says which promise of what is installed is broken, how, and how to see it again."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from plugin_site import Site

from subquad.__main__ import main
from subquad.contracts import CONTRACT_VERSION
from subquad.registry import load_registry
from subquad.testing.kernel_suite import KernelSuite
from subquad.testing.mixer_suite import MixerSuite
from subquad.testing.verdict import promises
from subquad_kernels.catalogue import CATALOGUE

PLUGIN = """
from mutant_mixers import NoConfig
from subquad import Growth, MixerSpec, hookimpl

@hookimpl
def subquad_provide_mixers():
    return [
        MixerSpec(name=name, summary="s", paper="p", config=NoConfig, build=f"mutant_mixers:{build}",
                  work_growth=Growth.LINEAR, carry_growth=Growth.CONSTANT, float32_parameters=("rate",),
                  operators=("linear_attention",))
        for name, build in (("sound", "Sound"), ("leaky", "LeaksOneFutureToken"))
    ]
"""
CAUSALITY = "no_output_depends_on_later_tokens"


@pytest.fixture
def acme(site: Site) -> Iterator[None]:
    """A distribution of two mixers, of which one sees the future."""
    site.install("acme-mixers", PLUGIN)
    load_registry.cache_clear()
    yield
    load_registry.cache_clear()


@pytest.mark.usefixtures("acme")
def test_a_mixer_that_keeps_its_promises_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "sound", "json=verdict.json"]) == 0
    printed = capsys.readouterr().out
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["kept"] is True
    assert verdict["summary"] == printed.rstrip().splitlines()[-1]
    assert verdict["contract_version"] == CONTRACT_VERSION
    (found,) = verdict["verdicts"]
    assert found["origin"] == "acme-mixers 1.5"
    assert [promise["name"] for promise in found["promises"]] == promises(MixerSuite)
    assert all(f"  {name}  " in printed for name in promises(MixerSuite))
    apart = {promise["name"]: promise["reason"] for promise in found["promises"] if not promise["applies"]}
    assert apart == {
        "its_bidirectional_form_sees_both_sides": "it has no bidirectional form",
        "what_it_shares_is_as_declared_and_has_gradients": "it shares nothing here",
        "weight_decay_spares_what_is_declared": "it declares no parameter without decay",
    }
    assert all(re.search(rf"  {name} +does not apply: {reason}\n", printed) for name, reason in apart.items())
    judged = len(promises(MixerSuite)) - len(apart)
    assert f"{judged} of {judged} promises are kept, {len(apart)} do not apply\n" in printed


@pytest.mark.usefixtures("acme")
def test_a_promise_that_does_not_apply_is_neither_kept_nor_broken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "sound", "only=its_bidirectional_form_sees_both_sides"]) == 0
    printed = capsys.readouterr().out
    assert "does not apply: it has no bidirectional form" in printed
    assert "0 of 0 promises are kept, 1 does not apply" in printed


def test_a_promise_applies_if_it_does_behind_a_layer_of_its_own_kind(capsys: pytest.CaptureFixture[str]) -> None:
    """rwkv7 publishes the values of its first layer; a reader of another layer's keys shares at its first as well."""
    asked = "only=what_it_shares_is_as_declared_and_has_gradients"
    for name, applies in (("rwkv7", True), ("gla", False)):
        assert main(["plugins", "check", name, asked]) == 0
        assert ("1 of 1 promises are kept\n" in capsys.readouterr().out) is applies


def test_a_kernel_s_promise_without_a_workload_does_not_apply() -> None:
    flash = type("Checked", (KernelSuite,), {"operator": "softmax_attention", "kernel": "sdpa_flash"})
    assert flash().inapplicable() == {}
    (packed,) = [w for w in CATALOGUE.operator("selective_scan").examples if "documents" in w.shape][:1]
    scan = type("Checked", (KernelSuite,), {"operator": "selective_scan", "kernel": "chunked", "workloads": (packed,)})
    assert scan().inapplicable() == {"is_exact_about_causality": "no workload of it shows causality"}


@pytest.mark.usefixtures("acme")
def test_a_broken_promise_says_where_and_how_to_repeat_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "leaky", "seed=3", "json=verdict.json"]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"^BROKEN {CAUSALITY}\n  x: b=2 t=13: output 0 changed with tokens 1 and later$", printed, re.M)
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["kept"] is False
    (broken,) = [promise for promise in verdict["verdicts"][0]["promises"] if promise["name"] == CAUSALITY]
    assert "output 0 changed" in broken["broken"]
    assert f"again: {broken['again']}" in printed
    assert main(shlex.split(broken["again"])[3:]) == 1
    again = capsys.readouterr().out
    assert "1 of 1 promises are broken" in again
    assert broken["broken"] in again


def test_a_bidirectional_form_is_judged_by_its_own_promise(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "retnet", "config={bidirectional: true}"]) == 2
    assert "mend    leave it out; only=its_bidirectional_form_sees_both_sides" in capsys.readouterr().err
    assert main(["plugins", "check", "retnet", "only=its_bidirectional_form_sees_both_sides"]) == 0


@pytest.mark.usefixtures("acme")
def test_a_distribution_is_checked_in_all_that_it_declares(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "acme-mixers", f"only={CAUSALITY}"]) == 1
    printed = capsys.readouterr().out
    assert "mixer sound (acme-mixers 1.5) on cpu" in printed
    assert "mixer leaky (acme-mixers 1.5) on cpu" in printed
    assert "1 of 2 promises are broken" in printed


def test_the_kernels_of_a_distribution_are_checked_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "subquad", "only=hands_back_new_memory"]) == 0
    printed = capsys.readouterr().out
    assert "kernel linear_attention/chunked (subquad " in printed
    assert "mixer window" not in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["wimdow"], "did you mean 'window'?"),
        (["window", "only=is_causal"], "no promise is called 'is_causal'"),
        (["window", "config={num_heads: 3}"], "3 heads do not divide the width 16"),
        (["window", "config={num_haeds: 2}"], "did you mean 'num_heads'?"),
        (["window", "config={"], "config={num_heads: 2}"),
        (["window", "d_model=-1"], "d_model is -1"),
        (["window", "target=tpu"], "use cpu or cuda"),
        (["window", "targte=cpu"], "did you mean 'target'?"),
    ],
    ids=str,
)
def test_what_cannot_be_checked_is_a_usage_error(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "check", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("words", "width"), [([], 32), (["config={head_dim: 16}"], 16), (["d_model=64"], 64)], ids=str)
def test_a_mixer_gets_the_least_width_that_its_config_takes(words: list[str], width: int, tmp_path: Path) -> None:
    """Heads of mamba3 have 64 channels, of twice the width, unless told."""
    record = tmp_path / "verdict.json"
    assert main(["plugins", "check", "mamba3", "only=one_seed_gives_one_mixer", f"json={record}", *words]) == 0
    assert f"d_model={width}" in json.loads(record.read_text())["verdicts"][0]["again"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_target_that_is_not_here_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "window", "target=cuda"]) == 2
    assert "there is no cuda here" in capsys.readouterr().err


def test_a_plugin_that_was_skipped_is_named_with_its_reason(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.install("broken-plugin", "raise RuntimeError('out of order')")
    load_registry.cache_clear()
    try:
        with pytest.warns(UserWarning, match="broken-plugin"):
            assert main(["plugins", "check", "broken-plugin"]) == 2
    finally:
        load_registry.cache_clear()
    assert "broken-plugin was skipped: RuntimeError: out of order" in capsys.readouterr().err


def test_nothing_is_judged_where_assertions_are_removed() -> None:
    code = "from subquad.testing.verdict import judge; judge(object)"
    result = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "RunError: python -O removes assertions" in result.stderr


def test_plugins_shows_the_version_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    assert capsys.readouterr().out.startswith(f"Contract {CONTRACT_VERSION}:")
    assert main(["plugins", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contract_version"] == CONTRACT_VERSION


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["softmax_attention", "window", "segment_attention", "mamba"])
def test_our_mixers_keep_their_promises_on_cuda(mixer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", mixer, "target=cuda"]) == 0, capsys.readouterr().out
