"""What a run pins and denies holds when it generates and is evaluated, and in `bench models=`; what cannot is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from subquad.__main__ import main
from subquad.schema import ModelConfig, RunConfig
from subquad.training.fit import train

Said = pytest.CaptureFixture[str]
HYBRID = {
    "window": {"mixer": "window", "num_heads": 2, "window": 8},
    "segment_attention": {"mixer": "segment_attention", "num_heads": 2, "segment_len": 4},
}
BENCH = ("bench", "models=[scout_swa]", "contexts=[64]", "tokens=4")
SMALL = "model.d_model=32,trainer.accelerator=cpu,compiler=constant"


@pytest.fixture
def trained(tiny_run: Callable[..., RunConfig]) -> Callable[..., Path]:
    """A run of windows and segments with what it pins and denies; the folder."""

    def run(**asked: object) -> Path:
        model = ModelConfig(name="hybrid", d_model=32, num_layers=2, schedule=list(HYBRID), mixers=dict(HYBRID))
        return train(tiny_run("run", max_steps=1, run={"model": model, **asked})).run_dir

    return run


def generated(run: Path, said: Said) -> str:
    said.readouterr()
    assert main(["generate", f"run={run}", "prompt=abc", "max_tokens=4"]) == 0
    return said.readouterr().err


@pytest.mark.parametrize(
    ("asked", "kernel"),
    [
        ({}, "compacted"),
        ({"kernel": {"segment_attention": "sdpa_merge"}}, "sdpa_merge"),
        ({"kernel": {"segment_attention": "reference"}}, "reference"),
        ({"deny": ["compacted"]}, "sdpa_merge"),
    ],
    ids=str,
)
def test_generate_decodes_by_what_the_run_pins_and_says_so(
    trained: Callable[..., Path], asked: dict[str, object], kernel: str, capsys: Said
) -> None:
    said = generated(trained(**asked), capsys)
    assert f"decoded by rotary tables; softmax_attention sdpa_flash; segment_attention {kernel}\n" in said
    assert "gives way" not in said


def test_a_pin_that_cannot_decode_gives_way_by_name_and_holds_elsewhere(
    trained: Callable[..., Path], capsys: Said
) -> None:
    run = trained(kernel={"softmax_attention": "windowed"})
    said = generated(run, capsys)
    named = "kernel.softmax_attention=windowed gives way to sdpa_flash in window.decode (layer 0): needs as many"
    assert named in said
    assert said.count("gives way") == 1, "the prompt is read by what was pinned"
    assert "softmax_attention sdpa_flash" in said
    assert main(["evaluate", f"run={run}", "lengths=[32]"]) == 0
    assert "gives way" not in capsys.readouterr().err, "whole rows are computed by what was pinned"


def test_a_run_pinned_on_another_device_generates_and_is_evaluated_here(
    trained: Callable[..., Path], capsys: Said
) -> None:
    run = trained()
    config = (run / "config.yaml").read_text()
    assert "\nkernel: {}\n" in config
    (run / "config.yaml").write_text(config.replace("\nkernel: {}\n", "\nkernel: {segment_attention: tiled}\n"))
    methods = "kernel.segment_attention=tiled gives way to compacted in segment_attention.{} (layer 1): runs on cuda"
    assert methods.format("prefill, decode") in generated(run, capsys)
    assert main(["evaluate", f"run={run}", "lengths=[32]"]) == 0
    assert methods.format("packed") in capsys.readouterr().err


def test_bench_decodes_by_what_its_overrides_pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.chdir(tmp_path)
    asked = {"": "compacted", ",kernel.segment_attention=sdpa_merge": "sdpa_merge", ',"deny=[compacted]"': "sdpa_merge"}
    for pin, kernel in asked.items():
        assert main([*BENCH, f"overrides=[{SMALL}{pin}]"]) == 0
        assert f"decoded by rotary tables; softmax_attention sdpa_flash; segment_attention {kernel}\n" in (
            capsys.readouterr().out
        )
        (row,) = json.loads(Path("bench-decoding.json").read_text())["rows"]
        assert row["kernels"] == {
            "rotary": "tables", "softmax_attention": "sdpa_flash", "segment_attention": kernel,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "kernel.segment_attention=tiled",
            ("segment_attention/tiled cannot run here: runs on cuda only", "kernel.segment_attention", "compacted"),
        ),
        ("plan=plan.json", ("a plan names the kernels of training", "kernel.OPERATOR=NAME")),
    ],
)
def test_bench_refuses_what_no_decoded_token_would_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said, override: str, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*BENCH, f"overrides=[{SMALL},{override}]"]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not Path("bench-decoding.json").exists()


def test_decoding_in_place_is_told_as_it_is_in_a_graph() -> None:
    from decoding_models import model_of

    from subquad.compiler.pipeline import decoding_kernels
    from subquad.compose import load_config
    from subquad.training.compilation import compile_for_generation

    model = model_of("mamba", "softmax_attention")
    run = ["model=transformer", "model.context_len=32", "trainer.accelerator=cpu", "compiler=constant"]
    compile_for_generation(model, load_config(run))
    assert decoding_kernels(model, 1, in_place=False) == {
        "causal_conv": "taps", "selective_scan": "chunked", "rotary": "tables", "softmax_attention": "sdpa_flash",
    }  # fmt: skip
    assert decoding_kernels(model, 1, in_place=True)["cached_attention"] == "reference"
    assert "softmax_attention" not in decoding_kernels(model, 1, in_place=True)


def test_a_pin_of_an_operator_that_no_layer_calls_is_named(trained: Callable[..., Path], capsys: Said) -> None:
    """Of what reads a cache in place only while it trains: a pin of that counts when the run generates."""
    run = trained(kernel={"delta_rule": "chunked", "cached_attention": "reference", "segment_attention": "sdpa_merge"})
    nothing = [
        f"kernel.{pin} changes nothing here: no layer calls {pin.partition('=')[0]}"
        for pin in ("delta_rule=chunked", "cached_attention=reference")
    ]
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "changes nothing" in line] == nothing
    assert set(nothing) <= set(json.loads((run / "plan.json").read_text())["notes"])
    assert [line for line in generated(run, capsys).splitlines() if "changes nothing" in line] == nothing[:1]
