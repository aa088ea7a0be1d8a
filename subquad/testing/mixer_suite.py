"""What every mixer promises, as tests: subclass `MixerSuite` and name your mixer.

    class TestGatedConv(MixerSuite):
        mixer = "gated_conv"
        config = {"conv_width": 3}

Everything runs in float64 on the CPU, so that what should be equal is equal to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from subquad.compiler.capture import capture, install, kernel_of, operator_nodes
from subquad.compiler.example import METHODS
from subquad.component_config import typed_config
from subquad.contracts import MixerContext, MixerSpec
from subquad.registry import load_registry
from subquad_kernels.catalogue import load_attribute

TOLERANCE = 1e-11
"""Relative to the largest value; float64 rounds at 1e-16, and sums here have up to some hundred terms."""
GROWTH_SLACK = 0.1
"""How far the measured exponent of growth may lie above the declared one: lower-order terms at finite lengths."""


class MixerSuite:
    """The conformance suite. Set `mixer` (the registry's name); `config` and the sizes may be changed."""

    mixer: ClassVar[str]
    config: ClassVar[Mapping[str, object]] = {}
    d_model: ClassVar[int] = 16
    length: ClassVar[int] = 13
    context_len: ClassVar[int] = 64

    # What a test works with

    @property
    def spec(self) -> MixerSpec:
        """The declaration, as the registry found it."""
        return load_registry().mixer(self.mixer)

    def build(self, *, seed: int = 0, device: str = "cpu") -> Any:
        """A small mixer in float64 with parameters drawn wide enough that every path matters."""
        torch.manual_seed(seed)
        context = MixerContext(
            d_model=self.d_model, layer_index=0, num_layers=1, context_len=self.context_len
        )
        build: Any = load_attribute(self.spec.build)
        with torch.device(device):
            mixer = build(typed_config(self.spec.config, dict(self.config), "config"), context)
        if device != "meta":
            mixer.init_parameters(0.3)
        return mixer.double()

    def tokens(self, b: int, t: int, *, seed: int = 1) -> Tensor:
        """Fresh inputs.  Shape: b t d"""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(b, t, self.d_model, generator=generator, dtype=torch.float64)

    # What is promised

    def test_is_discovered_under_its_name(self) -> None:
        assert self.mixer in load_registry().mixers
        assert load_registry().origin(self.spec)

    def test_keeps_shape_at_any_length(self) -> None:
        mixer = self.build()
        for b, t in ((1, 1), (2, 2), (3, self.length)):
            assert mixer(self.tokens(b, t)).shape == (b, t, self.d_model)

    def test_no_output_depends_on_later_tokens(self) -> None:
        if not self.spec.causal:
            return
        mixer, x = self.build(), self.tokens(2, self.length)
        y = mixer(x)
        for t in range(1, self.length):
            changed = x.clone()
            changed[:, t:] = self.tokens(2, self.length - t, seed=t + 2)
            assert torch.equal(mixer(changed)[:, :t], y[:, :t]), f"outputs before token {t} changed with it"

    def test_every_output_depends_on_its_own_token(self) -> None:
        mixer, x = self.build(), self.tokens(1, self.length).requires_grad_()
        y = mixer(x)
        for t in range(self.length):
            (gradient,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
            assert gradient[:, t].abs().max() > 0, f"output {t} ignores token {t}"

    def test_sequences_of_a_batch_do_not_mix(self) -> None:
        mixer, x = self.build(), self.tokens(3, self.length)
        order = torch.tensor([2, 0, 1])
        assert_close(mixer(x[order]), mixer(x)[order])

    def test_gradient_reaches_every_parameter(self) -> None:
        mixer = self.build()
        mixer(self.tokens(2, self.length)).square().sum().backward()
        for name, parameter in mixer.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.abs().max() > 0, f"the gradient of {name} is zero"

    def test_packed_documents_equal_separate_ones(self) -> None:
        if not self.spec.packed:
            return
        mixer = self.build()
        for lengths in ([self.length], [4, 1, 8], [0, 5, 0, 1, 1, 7, 0]):
            x = self.tokens(1, sum(lengths))
            boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            together, parts = x.clone().requires_grad_(), x.clone().requires_grad_()
            packed = mixer(together, boundaries)
            separate = torch.cat([mixer(document) for document in parts.split(lengths, dim=1) if document.shape[1]], 1)
            assert_close(packed, separate)
            pull = self.tokens(1, sum(lengths), seed=5)
            packed_gradients = gradients(packed, pull, together, mixer)
            separate_gradients = gradients(separate, pull, parts, mixer)
            for name, found in packed_gradients.items():
                assert_close(found, separate_gradients[name], name)

    def test_prefill_and_decode_equal_forward_at_every_split(self) -> None:
        mixer, x = self.build(), self.tokens(2, self.length)
        with torch.no_grad():
            whole = mixer(x)
            for split in range(self.length + 1):
                carry, outputs = mixer.empty_carry(2), []
                if split:
                    y, carry = mixer.prefill(x[:, :split], carry)
                    outputs.append(y)
                for t in range(split, self.length):
                    y_t, carry = mixer.decode(x[:, t], carry)
                    outputs.append(y_t.unsqueeze(1))
                assert_close(torch.cat(outputs, 1), whole, f"split at {split}")

    def test_prefill_in_two_parts_equals_one(self) -> None:
        mixer, x = self.build(), self.tokens(2, self.length)
        with torch.no_grad():
            whole, last = mixer.prefill(x, mixer.empty_carry(2))
            for split in range(1, self.length):
                first, carry = mixer.prefill(x[:, :split], mixer.empty_carry(2))
                second, carry = mixer.prefill(x[:, split:], carry)
                assert_close(torch.cat([first, second], 1), whole, f"split at {split}")
                for found, expected in zip(tree_leaves(carry), tree_leaves(last)):
                    if isinstance(found, Tensor):
                        assert_close(found, expected, f"carry, split at {split}")
                    else:
                        assert found == expected

    def test_captures_as_one_node_per_operator(self) -> None:
        captured = capture(self.build())
        assert not captured.declined, f"not captured: {dict(captured.declined)}"
        for method in METHODS:
            nodes = [operator.name for _, operator in operator_nodes(captured.graphs[method].graph)]
            assert sorted(set(nodes)) == sorted(self.spec.operators), f"{method} calls {nodes}"

    def test_running_its_graphs_changes_neither_results_nor_state_dict(self) -> None:
        plain, rewritten = self.build(), self.build()
        install(rewritten, capture(rewritten).graphs)
        x = self.tokens(2, self.length)
        boundaries = torch.tensor([0, 3, self.length], dtype=torch.int32)
        assert list(rewritten.state_dict()) == list(plain.state_dict())
        assert torch.equal(rewritten(x), plain(x))
        if self.spec.packed:
            assert torch.equal(rewritten(x[:1], boundaries), plain(x[:1], boundaries))
        y, carry = rewritten.prefill(x[:, :5], rewritten.empty_carry(2))
        y_t, _ = rewritten.decode(x[:, 5], carry)
        expected, carry = plain.prefill(x[:, :5], plain.empty_carry(2))
        expected_t, _ = plain.decode(x[:, 5], carry)
        assert torch.equal(y, expected)
        assert torch.equal(y_t, expected_t)

    def test_calls_operators_and_leaves_the_kernel_to_the_compiler(self) -> None:
        for graph_module in capture(self.build()).graphs.values():
            for node, operator in operator_nodes(graph_module.graph):
                assert kernel_of(node) == "default", f"{operator.name} is called with a kernel of the mixer's choice"

    def test_work_grows_no_faster_than_declared(self) -> None:
        mixer = self.build(device="meta")
        counts = []
        for t in (1024, 2048, 4096):
            x = torch.empty(1, t, self.d_model, device="meta", dtype=torch.float64)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                mixer(x)
            counts.append(counter.get_total_flops())
        growth = math.log2(counts[2] / counts[1])
        assert growth <= self.spec.work_growth.value + GROWTH_SLACK, f"work grows as t^{growth:.2f}"

    def test_carry_grows_no_faster_than_declared(self) -> None:
        mixer = self.build()
        sizes = []
        with torch.no_grad():
            for t in (128, 256, 512):
                _, carry = mixer.prefill(self.tokens(1, t), mixer.empty_carry(1))
                sizes.append(carry_bytes(carry))
        growth = math.log2(max(sizes[2], 1) / max(sizes[1], 1))
        assert growth <= self.spec.carry_growth.value + GROWTH_SLACK, f"the carry grows as t^{growth:.2f}"

    def test_one_seed_gives_one_mixer(self) -> None:
        first, second, other = self.build(seed=3), self.build(seed=3), self.build(seed=4)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
        assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))

    def test_names_only_parameters_that_exist(self) -> None:
        names = [name for name, _ in self.build().named_parameters()]
        for declared in (*self.spec.no_decay, *self.spec.float32_parameters):
            assert declared in names, f"'{declared}' is declared and is no parameter"


def assert_close(found: Tensor, expected: Tensor, what: str = "values", tolerance: float = TOLERANCE) -> None:
    """max |found - expected| <= tolerance * max(|expected|, 1e-3), of equal shapes."""
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    # What is zero but for rounding has no largest value to be relative to.
    scale = max(float(expected.detach().abs().max()), 1e-3)
    error = float((found - expected).detach().abs().max()) / scale
    assert error <= tolerance, f"{what}: off by {error:.1e} of the largest value"


def gradients(y: Tensor, pull: Tensor, x: Tensor, mixer: nn.Module) -> dict[str, Tensor]:
    """Gradients of sum(y * pull) with respect to the input (`x`) and to every parameter, by name."""
    names, parameters = zip(*mixer.named_parameters())
    found = torch.autograd.grad((y * pull).sum(), [x, *parameters])
    return dict(zip(("x", *names), found))


def carry_bytes(carry: object) -> int:
    """What a carry occupies; integers count as none."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(carry) if isinstance(leaf, Tensor))
