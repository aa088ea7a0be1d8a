"""Other people's packages: absent, old, half built or refusing is a reported fact, found out without importing them."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from subquad_kernels import catalogue, optional_packages
from subquad_kernels.builtin import KERNELS
from subquad_kernels.catalogue import CATALOGUE, Kernel
from subquad_kernels.self_check import check_kernel
from subquad_kernels.workload import DeviceLimits, Option, Workload

ADAPTERS = [kernel for kernel in KERNELS if kernel.requires and not kernel.requires[0].startswith("triton")]
PACKAGES = {"fla": "fla-core", "mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d", "flash_attn": "flash-attn"}
HOPPER = DeviceLimits(kind="cuda", name="NVIDIA H100", capability=(9, 0))
AMPERE = DeviceLimits(kind="cuda", name="NVIDIA A100", capability=(8, 0))
VERSIONS = {"fla-core": "0.6.0", "mamba-ssm": "2.3.2.post1", "causal-conv1d": "1.6.1", "flash-attn": "2.8.3"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The distributions that seem installed, extensions included; tests change it."""
    versions = VERSIONS | {"triton": "3.7.1"}
    for module in (catalogue, optional_packages):
        monkeypatch.setattr(module, "installed_version", versions.get)
    for kernel in ADAPTERS:
        for extension in kernel.extensions:
            module = ModuleType(extension)
            module.__spec__ = ModuleSpec(extension, None)
            monkeypatch.setitem(sys.modules, extension, module)
    return versions


def workload(operator: str, dtype: str = "bfloat16", phase: str = "forward", **changes: Option) -> Workload:
    """The first example of an operator, with other options, or other lengths of its axes."""
    example = CATALOGUE.operator(operator).examples[0]
    shape = dict(example.shape) | {axis: int(size) for axis, size in changes.items() if axis not in example.options}
    options = dict(example.options) | {name: value for name, value in changes.items() if name in example.options}
    return replace(example, dtype=dtype, phase=phase, shape=shape, options=options)  # type: ignore[arg-type]


SCAN = workload("selective_scan")
REVERSED = replace(SCAN, options={**SCAN.options, "reversed": True})


def test_there_is_an_adapter_of_every_package() -> None:
    assert {Requirement(kernel.requires[0]).name for kernel in ADAPTERS} == set(VERSIONS)


@pytest.mark.parametrize("kernel", ADAPTERS, ids=lambda kernel: kernel.key)
def test_an_absent_package_is_a_refusal_that_says_what_to_install(kernel: Kernel, installed: dict[str, str]) -> None:
    assert kernel.missing() is None
    name = Requirement(kernel.requires[0]).name
    del installed[name]
    refusal = kernel.refusal(CATALOGUE.operator(kernel.operator).examples[0], HOPPER)
    assert refusal == f"{name} is not installed (pip install '{kernel.requires[0]}')"


@pytest.mark.parametrize("kernel", ADAPTERS, ids=lambda kernel: kernel.key)
def test_another_version_is_refused_by_both_numbers(kernel: Kernel, installed: dict[str, str]) -> None:
    name = Requirement(kernel.requires[0]).name
    for other in ("0.1", "99.0"):
        installed[name] = other
        missing = kernel.missing()
        assert missing is not None
        assert f"{name} {other} is installed, {kernel.requires[0]} is needed" in missing


@pytest.mark.parametrize("kernel", [kernel for kernel in ADAPTERS if kernel.extensions], ids=lambda kernel: kernel.key)
def test_a_build_without_its_extension_is_refused(
    kernel: Kernel, installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, kernel.extensions[0])
    missing = kernel.missing()
    assert missing is not None
    assert kernel.extensions[0] in missing
    assert "--no-build-isolation" in missing


@pytest.mark.parametrize("kernel", ADAPTERS, ids=lambda kernel: kernel.key)
def test_what_was_found_out_about_another_version_expires(kernel: Kernel, installed: dict[str, str]) -> None:
    before = replace(kernel).version
    installed["triton"] = "3.8.0"  # stands beside every verdict and measurement already
    assert replace(kernel).version == before
    installed[Requirement(kernel.requires[0]).name] += ".1"
    assert replace(kernel).version != before


def test_asking_for_kernels_imports_no_package_of_others() -> None:
    code = (
        "import sys, subquad_kernels.builtin as b\n"
        "from subquad_kernels.catalogue import CATALOGUE\n"
        "from subquad_kernels.workload import DeviceLimits\n"
        "limits = DeviceLimits(kind='cuda', name='x', capability=(9, 0))\n"
        "for k in b.KERNELS:\n"
        "    for w in CATALOGUE.operator(k.operator).examples: k.refusal(w, limits)\n"
        "    k.version\n"
        f"print(sorted({{*sys.modules}} & {{*{[*PACKAGES, 'triton', 'torch']!r}}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kernel", ADAPTERS, ids=lambda kernel: kernel.key)
def test_a_package_that_cannot_be_imported_is_a_failed_check(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)  # import raises ModuleNotFoundError
    verdict = check_kernel(kernel, CATALOGUE.operator(kernel.operator).examples[0])
    assert not verdict.passed
    assert "ModuleNotFoundError" in verdict.reason


def test_the_extras_install_what_the_kernels_require() -> None:
    with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    wanted = {"fla": optional_packages.FLA, "mamba": optional_packages.MAMBA, "flash": optional_packages.FLASH_ATTN}
    for extra, requirements in wanted.items():
        listed = {Requirement(text).name: Requirement(text).specifier for text in extras[extra]}
        assert listed.items() >= {Requirement(text).name: Requirement(text).specifier for text in requirements}.items()
    conv = Requirement(optional_packages.CAUSAL_CONV1D[0])
    assert conv.specifier == next(Requirement(text).specifier for text in extras["mamba"] if conv.name in text)


@pytest.mark.parametrize("triton", ["3.6.0", "3.7.0"])
@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("linear_attention", {"decay": "token"}),
        ("linear_attention", {"decay": "head"}),
        ("delta_rule", {"decay": "scalar"}),
    ],
)
def test_a_gradient_that_fla_refuses_on_hopper_is_refused_before_it_is_called(
    installed: dict[str, str], triton: str, operator: str, options: dict[str, Option]
) -> None:
    chunked = CATALOGUE.kernel(operator, "fla_chunked")
    training = workload(operator, phase="backward", **options)
    installed["triton"] = triton
    refusal = chunked.refusal(training, HOPPER)
    assert refusal is not None
    assert triton in refusal
    assert "3.7.1" in refusal
    assert chunked.refusal(replace(training, phase="decode"), HOPPER) is None
    assert chunked.refusal(workload(operator, phase="backward", **options | {"decay": "none"}), HOPPER) is None
    assert chunked.refusal(training, AMPERE) is None
    installed["triton"] = "3.7.1"
    assert chunked.refusal(training, HOPPER) is None


@pytest.mark.parametrize(
    ("key", "asked", "word"),
    [
        ("linear_attention/fla_chunked", workload("linear_attention", diagonal=True), "diagonal"),
        ("linear_attention/fla_chunked", workload("linear_attention", "float32"), "TF32"),
        ("linear_attention/fla_chunked", workload("linear_attention", n=11), "even"),
        ("linear_attention/fla_recurrent", workload("linear_attention", "float64"), "float64"),
        ("linear_attention/mamba_ssd", workload("linear_attention", b=1, documents=3), "document"),
        ("linear_attention/mamba_ssd", workload("linear_attention", diagonal=True), "diagonal"),
        ("gated_linear_attention/fla_recurrent", workload("gated_linear_attention", read="before"), "final state"),
        ("delta_rule/fla_chunked", workload("delta_rule", n=288), "256"),
        ("delta_rule/fla_recurrent", workload("delta_rule"), "backward"),
        ("selective_scan/mamba_scan", workload("selective_scan", b=1, documents=3), "documents"),
        ("selective_scan/mamba_scan", workload("selective_scan", initial_state=True), "initial state"),
        ("selective_scan/mamba_scan", workload("selective_scan", softplus=False), "softplus"),
        ("selective_scan/mamba_scan", REVERSED, "forward only"),
        ("selective_scan/mamba_step", workload("selective_scan"), "decode"),
        ("causal_conv/causal_conv1d", workload("causal_conv", c=12), "multiple of 8"),
        ("causal_conv/causal_conv1d", workload("causal_conv", c=16, w=5), "taps"),
        (
            "causal_conv/causal_conv1d",
            workload("causal_conv", b=1, c=16, documents=3, initial_state=True),
            "initial states",
        ),
        ("softmax_attention/flash_attn", workload("softmax_attention", "float32"), "float32"),
        ("softmax_attention/flash_attn", workload("softmax_attention", k=12, v=12), "multiple of 8"),
        ("softmax_attention/flash_attn", workload("softmax_attention", b=1, t=1, s=1, documents=2), "packed token"),
    ],
)
def test_what_a_package_cannot_do_is_refused_by_name(
    installed: dict[str, str], key: str, asked: Workload, word: str
) -> None:
    refusal = CATALOGUE.kernel(*key.split("/")).refusal(asked, HOPPER)
    assert refusal is not None
    assert word in refusal
