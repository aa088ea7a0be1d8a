"""Every Triton launch compiles ahead of time for the devices that matter, and its registers hold what they must."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from forked_scripts import FORKS

from subquad_kernels.builtin import KERNELS
from subquad_kernels.catalogue import Kernel

SPILLS = {
    # Around its loops, not in them.
    ("segment_attention/tiled", "_summary_gradients_kernel", "sm_90"): 48,
    # Inside its loop too: eight warps would repeat products (README). With every gate, packed, 720 bytes.
    ("linear_attention/fused", "_read", "sm_90"): 128,
    ("linear_attention/fused", "_differentiate_q", "sm_90"): 128,
    ("linear_attention/fused", "_differentiate_kv", "sm_90"): 768,
    # Of triton 3.7.1. It has no loop. With every gate, 248 bytes.
    ("linear_attention/fused", "_differentiate", "sm_90"): 96,
    # Of triton 3.7.1: mostly what its loop reads and never changes. With every gate, 352 bytes of keys.
    ("linear_attention/fused", "_differentiate_queries", "sm_90"): 352,
    # Of triton 3.6, with which it was timed (README); of 3.7.1, 80.
    ("linear_attention/fused", "_differentiate_keys", "sm_90"): 128,
    # Two warp groups would spill none, and hold as many registers. Of triton 3.6.
    ("gated_linear_attention/fused", "_differentiate", "sm_90"): 560,
    ("gated_linear_attention/fused", "_read", "sm_90"): 48,
    # Of triton 3.7.1. In two launches neither half spills, and they take a third longer on an H200 (README).
    ("delta_rule/fused", "_differentiate_key", "sm_90"): 64,
    # Of triton 3.7.1. Twice as many warps spill none, and take a fifth longer on an H200 (README).
    ("delta_rule/fused_diagonal", "relate", "sm_90"): 320,
    # Of triton 3.7.1. Tiles of 32 channels spill none, and take as long or longer (README).
    ("delta_rule/fused_diagonal", "differentiate", "sm_90"): 128,
    # Where documents are packed or states given; of `differentiate` around its walks, not in them. Of `scan` 112 bytes
    # but for the first segment's last state, which it leaves to the others.
    ("selective_scan/fused", "scan", "sm_90"): 120,
    ("selective_scan/fused", "differentiate", "sm_90"): 16,
    # No register: the table by which libdevice's sine reduces arguments that never come here.
    ("rotary/fused", "_rotate", "sm_90"): 32,
    ("rotary/fused", "_turn", "sm_90"): 32,
}
"""Bytes a thread may spill at most, where any."""


def named(*keys: str) -> list[Any]:
    return [pytest.param(kernel, id=kernel.key) for kernel in KERNELS if kernel.key in keys]


def written_in_triton(kernel: Kernel) -> bool:
    if kernel.replayable:  # it may launch a neighbour's
        return True
    spec = importlib.util.find_spec(kernel.implementation.partition(":")[0])
    return spec is not None and spec.origin is not None and "@triton.jit" in Path(spec.origin).read_text()


TRITON_KERNELS = [pytest.param(kernel, id=kernel.key) for kernel in KERNELS if written_in_triton(kernel)]


def compiled(kernel: Kernel, targets: str, *flags: str) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("compile_launches.py")
    printed = FORKS.run(script, kernel.operator, kernel.name, targets, *flags)
    return [json.loads(line) for line in printed.splitlines()]


def assert_nothing_is_unset(launches: list[dict[str, Any]]) -> None:
    assert launches
    wrong = [launch for launch in launches if "failure" in launch or launch.get("unset")]
    assert not wrong, wrong
    trapped = [launch for launch in launches if launch.get("tensor_memory", 0) > TENSOR_MEMORY]
    assert not trapped, f"what wants more columns of tensor memory than there are is compiled to a trap: {trapped}"


def assert_sound(kernel: Kernel, launches: list[dict[str, Any]]) -> None:
    assert_nothing_is_unset(launches)
    spilling = [
        launch
        for launch in launches
        if launch["spilled"] > SPILLS.get((kernel.key, launch["kernel"], launch["target"]), 0)
    ]
    assert not spilling, spilling


TENSOR_MEMORY = 512
"""Columns of a multiprocessor of compute capability 10."""
LONG = ("gated_linear_attention/fused", "delta_rule/fused_diagonal")
"""Of minutes where cores are busy."""


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(kernel, id=kernel.key, marks=[pytest.mark.slow] if kernel.key in LONG else [])
        for kernel in KERNELS
        if written_in_triton(kernel)
    ],
)
def test_a_packed_step_and_a_decode_compile_for_hopper_and_do_not_spill(kernel: Kernel) -> None:
    assert_sound(kernel, compiled(kernel, "sm_90", "--sample"))


OF_MATRICES = (
    "linear_attention/fused", "gated_linear_attention/fused", "delta_rule/fused", "delta_rule/fused_diagonal",
)  # fmt: skip
"""Kernels whose states have keys for rows and values for columns."""

# Of what ptxas 12.8 left unset with tiles as narrow as keys or values: the fastest to compile.
WAS_UNSET = {
    "linear_attention/fused": ("64,32", "_differentiate_kv"),
    "delta_rule/fused": ("32,64", "_differentiate_query"),
}


@pytest.mark.parametrize("kernel", named(*WAS_UNSET))
def test_keys_and_values_of_two_widths_leave_no_register_unset(kernel: Kernel) -> None:
    pair, launch = WAS_UNSET[kernel.key]
    assert_nothing_is_unset(
        compiled(kernel, "sm_90", "--widths", "bfloat16", "--pairs", pair, "--packed", "--launch", launch)
    )


# (products, accesses by tensors of pointers, scans) that Triton begins with. The time of two of its passes goes with
# the products times, and the accesses times, all that these are connected with; a scan over the tokens of a chunk is
# thousands of instructions. Before they were cut down `_invert` had 58 and 66, `invert` 48 and 42, `_differentiate` 24,
# 35 and 5; of the selective scan, whose loads of a row each took Triton 2.9 and 1.2 s of a core, `scan` had 97 accesses
# and `differentiate` 67; `scan` had 54, packed, while it loaded its first chunk before its loop,
# and of the delta rule `differentiate` 10 and 37, with both kinds of written keys one after the other.
FAST_TO_COMPILE = {
    ("delta_rule/fused", "_invert"): (16, 32, 1),
    ("delta_rule/fused_diagonal", "invert"): (12, 12, 0),
    ("delta_rule/fused_diagonal", "differentiate"): (8, 30, 0),
    ("gated_linear_attention/fused", "_read"): (16, 16, 0),
    ("gated_linear_attention/fused", "_differentiate"): (20, 24, 0),
    ("selective_scan/fused", "scan"): (0, 50, 0),
    ("selective_scan/fused", "differentiate"): (0, 50, 0),
}


@pytest.mark.parametrize(("key", "launch"), FAST_TO_COMPILE, ids=str)
def test_what_took_longest_to_compile_stays_small(key: str, launch: str) -> None:
    """Counted, as seconds depend on what else the machine does. The others compile beside it (`first_calls`)."""
    (kernel,) = (kernel for kernel in KERNELS if kernel.key == key)
    limits = FAST_TO_COMPILE[key, launch]
    launches = compiled(kernel, "sm_90", "--sample", "--launch", launch)
    assert launches
    for found in launches:
        counts = tuple(found[name] for name in ("dots", "accesses", "scans"))
        assert all(count <= limit for count, limit in zip(counts, limits)), found


@pytest.mark.slow
@pytest.mark.timeout(6000)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", named(*OF_MATRICES))
def test_no_pair_of_widths_leaves_a_register_unset(kernel: Kernel, dtype: str) -> None:
    """Every width of keys with every width of values, packed and not: what spills there is a matter of speed."""
    assert_nothing_is_unset(compiled(kernel, "sm_90", "--widths", dtype))


HEADS_TOGETHER = ("--widths", "bfloat16", "--heads", "32,1")
"""Calls whose heads share keys, several of which a program takes."""


@pytest.mark.parametrize("kernel", named("linear_attention/fused"))
def test_a_packed_step_of_heads_that_share_keys_compiles_for_hopper(kernel: Kernel) -> None:
    launches = compiled(kernel, "sm_90", *HEADS_TOGETHER, "--pairs", "128,64", "--packed")
    assert "_read_heads" in {launch["kernel"] for launch in launches}
    assert_sound(kernel, launches)


@pytest.mark.parametrize("kernel", named("linear_attention/fused"))
def test_a_chunk_of_wide_heads_compiles_for_hopper_and_leaves_room_for_another(kernel: Kernel) -> None:
    """Half of the 228 KB of a multiprocessor, less the one that each program costs."""
    wide = ("--widths", "bfloat16", "--pairs", "128,128", "--launch")
    chunks, walks = (compiled(kernel, "sm_90", *wide, name) for name in ("_differentiate", "_walk"))
    assert_sound(kernel, chunks)
    assert_nothing_is_unset(walks)
    assert max(launch["shared"] for launch in chunks + walks) <= 113 * 1024


LOADS_STATES = {
    "_summarise": ("--sample",),
    "_differentiate_q": ("--sample",),
    "_differentiate_kv": ("--widths", "bfloat16", "--pairs", "64,64", "--packed"),
    "_walk": (*HEADS_TOGETHER, "--pairs", "128,64", "--packed"),
}
"""Packed calls in whose loops a document's own state, or the gradient of its last, takes the place of the carried one.
"""


@pytest.mark.parametrize("launch", LOADS_STATES)
@pytest.mark.parametrize("kernel", named("linear_attention/fused"))
def test_a_walk_that_exchanges_its_state_compiles_for_tensor_memory(kernel: Kernel, launch: str) -> None:
    """Triton 3.6 cannot where a branch loads it, nor 3.7.1 in a loop with stages."""
    launches = compiled(kernel, "sm_100", *LOADS_STATES[launch], "--launch", launch)
    assert launches
    assert not [launch for launch in launches if "failure" in launch]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", named("linear_attention/fused"))
def test_no_width_of_heads_that_share_keys_leaves_a_register_unset(kernel: Kernel, dtype: str) -> None:
    together = ("--widths", dtype, *HEADS_TOGETHER[2:])
    assert_nothing_is_unset(compiled(kernel, "sm_90", *together, "--pairs", "64,48", "64,64", "96,64", "128,64"))


@pytest.mark.slow
@pytest.mark.timeout(3000)
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
