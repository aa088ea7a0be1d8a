"""Every Triton launch compiles ahead of time for the devices that matter, and its registers hold what they must."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from subquad_kernels.builtin import KERNELS
from subquad_kernels.catalogue import Kernel

SPILLS = {
    # Around its loops, not in them.
    ("segment_attention/tiled", "_summary_gradients_kernel", "sm_90"): 48,
    # Inside its loop too: eight warps would repeat products (README). With every gate, packed, 720 bytes.
    ("linear_attention/fused", "_read", "sm_90"): 128,
    ("linear_attention/fused", "_differentiate_q", "sm_90"): 128,
    ("linear_attention/fused", "_differentiate_kv", "sm_90"): 768,
    # Two warp groups would spill none, and hold as many registers. Of triton 3.6.
    ("gated_linear_attention/fused", "_differentiate", "sm_90"): 640,
    ("gated_linear_attention/fused", "_read", "sm_90"): 64,
    # Of triton 3.7.1; tiles of 32 channels spill none, and are found wrong on Hopper in other backwards (README).
    ("delta_rule/fused_diagonal", "differentiate", "sm_90"): 320,
    # No register: the table by which libdevice's sine reduces arguments that never come here.
    ("rotary/fused", "_rotate", "sm_90"): 32,
}
"""Bytes a thread may spill at most, where any."""


def written_in_triton(kernel: Kernel) -> bool:
    spec = importlib.util.find_spec(kernel.implementation.partition(":")[0])
    return spec is not None and spec.origin is not None and "@triton.jit" in Path(spec.origin).read_text()


TRITON_KERNELS = [pytest.param(kernel, id=kernel.key) for kernel in KERNELS if written_in_triton(kernel)]


def compiled(kernel: Kernel, targets: str, *flags: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    script = Path(__file__).with_name("compile_launches.py")
    run = subprocess.run(
        [sys.executable, str(script), kernel.operator, kernel.name, targets, *flags],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def assert_sound(kernel: Kernel, launches: list[dict[str, Any]]) -> None:
    assert launches
    failures = [launch for launch in launches if "failure" in launch]
    assert not failures, failures
    assert not [launch for launch in launches if launch.get("unset")]
    spilling = [
        launch
        for launch in launches
        if launch["spilled"] > SPILLS.get((kernel.key, launch["kernel"], launch["target"]), 0)
    ]
    assert not spilling, spilling


@pytest.mark.parametrize("kernel", TRITON_KERNELS)
def test_a_packed_step_and_a_decode_compile_for_hopper_and_do_not_spill(kernel: Kernel) -> None:
    assert_sound(kernel, compiled(kernel, "sm_90", "--sample"))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", TRITON_KERNELS)
def test_the_launches_of_a_training_step_compile_for_hopper_and_do_not_spill(kernel: Kernel) -> None:
    assert_sound(kernel, compiled(kernel, "sm_90"))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kernel", TRITON_KERNELS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_launch_compiles_for_every_target(kernel: Kernel, target: str) -> None:
    """What fits elsewhere is a matter of speed, and printed; what does not compile there is a fault."""
    launches = compiled(kernel, target, "--all")
    for launch in launches:
        print(json.dumps(launch))
    assert launches
    assert not [launch for launch in launches if "failure" in launch]
