"""What every mixer promises, as tests: subclass `MixerSuite` and name your mixer.

    class TestGatedConv(MixerSuite):
        mixer = "gated_conv"
        config = {"conv_width": 3}

Everything that should be equal runs in float64, on `device`, and is equal to rounding; types and pins are tested in
float32 and bfloat16. Inputs follow from `seed`: a failure says the shapes, and the same seed repeats it. The suite
needs no pytest; `python -m subquad plugins check NAME` runs it for what is installed.

A mixer that shares tensors with other layers is judged closed off (`ClosedMixer`): what it reads is drawn, and what it
publishes is part of its output. `published` says what earlier layers publish, for a mixer that reads it if it is there.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from subquad.compiler.capture import Captured, capture, install, kernel_of, operator_nodes
from subquad.compiler.example import IN_PLACE, METHODS
from subquad.component_config import typed_config
from subquad.contracts import NOTHING_SHARED, Carry, DecodesInPlace, MixerContext, MixerSpec, SharedTensor, Sharing
from subquad.errors import SubquadError
from subquad.model.block import Block
from subquad.model.language_model import LanguageModel
from subquad.registry import load_registry
from subquad.testing.closed_mixer import ClosedCarry, ClosedMixer
from subquad_kernels.catalogue import load_attribute

TOLERANCE = 1e-11
"""Relative to the largest value; float64 rounds at 1e-16, and sums here have up to some hundred terms."""
CHUNK = 64
"""A length that kernels like to divide time by: what goes wrong at the edge of a chunk shows at 63, 64 and 65."""
GROWTH_SLACK = 0.1
"""How far the measured exponent of growth may lie above the declared one: lower-order terms at finite lengths."""


class MixerSuite:
    """The conformance suite. Set `mixer` (the registry's name); `config` and the sizes may be changed."""

    mixer: ClassVar[str]
    config: ClassVar[Mapping[str, object]] = {}
    d_model: ClassVar[int] = 16
    length: ClassVar[int] = 13
    context_len: ClassVar[int] = 64
    published: ClassVar[Mapping[str, SharedTensor]] = {}
    device: ClassVar[str] = "cpu"
    seed: ClassVar[int] = 0

    # What a test works with

    @property
    def spec(self) -> MixerSpec:
        """The declaration, as the registry found it."""
        return load_registry().mixer(self.mixer)

    def build(self, *, seed: int = 0, device: str | None = None) -> Any:
        """A small mixer in float64 with parameters drawn wide enough that every path matters."""
        torch.manual_seed(self.seed + seed)
        context, sharing = self.place()
        build: Any = load_attribute(self.spec.build)
        where = device or self.device
        # Drawn on the CPU, so that one seed is one mixer on every device.
        with torch.device("meta" if where == "meta" else "cpu"):
            mixer = build(self.typed_config(), context)
        if where == "meta":
            return self._closed(mixer.double(), sharing)
        mixer.init_parameters(0.3)
        with torch.no_grad():
            for parameter in mixer.parameters():
                # Papers start maps at zero so that a block does nothing at first; here that would hide what it does.
                if not parameter.any():
                    parameter.normal_(std=0.3)
        return self._closed(mixer.double().to(where), sharing)

    def place(self) -> tuple[MixerContext, Sharing]:
        """Where the mixer stands, and what it shares there; whatever it reads, an earlier layer publishes."""
        context = MixerContext(
            d_model=self.d_model,
            layer_index=1 if self.published else 0,
            num_layers=2 if self.published else 1,
            context_len=self.context_len,
            published=self.published,
        )
        if self.spec.shares is None:
            return context, NOTHING_SHARED
        sharing = self.spec.shares(self.typed_config(), context)
        return dataclasses.replace(context, published={**self.published, **sharing.reads}), sharing

    def capture(self, mixer: Any) -> Captured:
        """The graphs of a mixer that `build` gave."""
        return capture(mixer.mixer, mixer.sharing) if isinstance(mixer, ClosedMixer) else capture(mixer)

    @classmethod
    def to_both_sides(cls) -> type[MixerSuite] | None:
        """The suite on the mixer's bidirectional form, if it declares one and shares nothing."""
        suite = cls()
        if not suite.spec.bidirectional or suite.place()[1]:
            return None
        return type(f"{cls.__name__}ToBothSides", (cls,), {"config": {**cls.config, "bidirectional": True}})

    @classmethod
    def behind_itself(cls) -> type[MixerSuite] | None:
        """The suite on the mixer behind a layer of its own kind, if it shares something else there."""
        _, sharing = cls().place()
        behind = type(f"{cls.__name__}BehindItself", (cls,), {"published": sharing.publishes})
        return behind if not cls.published and behind().place()[1] != sharing else None

    def inapplicable(self) -> dict[str, str]:
        """Promises about what this mixer does not declare, and so cannot break: why, by name.

        Their tests find nothing to look at and pass; `plugins check` does not count them.
        """
        spec = self.spec
        pinned, named = self._pinned_here(), (*spec.no_decay, *spec.float32_parameters)
        applies = (
            ("no_output_depends_on_later_tokens", spec.causal, "it sees later tokens"),
            ("packed_documents_equal_separate_ones", spec.packed, "it takes no packed documents"),
            ("float32_parameters_keep_their_bits_under_bfloat16", pinned, "it pins no parameter to float32"),
            ("its_bidirectional_form_sees_both_sides", self.to_both_sides(), "it has no bidirectional form"),
            ("what_it_shares_is_as_declared_and_has_gradients", self.place()[1], "it shares nothing here"),
            ("names_only_parameters_that_exist", named, "it names no parameters"),
            ("weight_decay_spares_what_is_declared", spec.no_decay, "it declares no parameter without decay"),
        )
        return {promise: reason for promise, declared, reason in applies if not declared}

    def _names_elsewhere(self) -> list[str]:
        """Parameters of the mixer's other forms: to both sides, behind or in front of a layer of its own kind."""
        in_front = type("InFront", (type(self),), {"published": {}}) if self.published else None
        forms = [form for form in (in_front, self.behind_itself(), self.to_both_sides()) if form is not None]
        return [name for form in forms for name, _ in form().build().named_parameters()]

    def _pinned_here(self) -> list[str]:
        """What is declared to keep float32 and is a parameter of this form."""
        names = [name for name, _ in self.build().named_parameters()]
        return [name for name in self.spec.float32_parameters if name in names]

    def _closed(self, mixer: nn.Module, sharing: Sharing) -> Any:
        return ClosedMixer(mixer, sharing) if sharing else mixer

    def typed_config(self) -> Any:
        """The mixer's config dataclass, from `config`."""
        return typed_config(self.spec.config, dict(self.config), "config")

    def build_in(self, dtype: torch.dtype) -> Any:
        """The small mixer in a narrower type; what is declared so keeps float32."""
        mixer = self.build().float()
        pinned = {name: mixer.get_parameter(name).detach().clone() for name in self._pinned_here()}
        mixer.to(dtype)
        for name, value in pinned.items():
            mixer.get_parameter(name).data = value
        return mixer

    def tokens(self, b: int, t: int, *, seed: int = 1) -> Tensor:
        """Fresh inputs.  Shape: b t d"""
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        x = torch.randn(b, t, self.d_model, generator=generator, dtype=torch.float64)
        return x.to(self.device)

    def boundaries(self, *lengths: int) -> Tensor:
        """`cu_seqlens` of documents of these lengths."""
        return torch.tensor([0, *lengths], device=self.device).cumsum(0).to(torch.int32)

    # What is promised

    def test_is_discovered_under_its_name(self) -> None:
        registry = load_registry()
        assert self.mixer in registry.mixers, f"no installed plugin declares '{self.mixer}'"
        assert registry.origin(self.spec), f"'{self.mixer}' comes from no distribution"

    def test_keeps_shape_at_any_length(self) -> None:
        mixer = self.build()
        for b, t in ((1, 1), (2, 2), (3, self.length), (1, CHUNK - 1), (2, CHUNK + 1), (1, 2 * CHUNK + 3)):
            found, expected = tuple(mixer(self.tokens(b, t)).shape), (b, t, self.d_model)
            assert found == expected, f"x: b={b} t={t}: the output has shape {found} instead of {expected}"

    def test_no_output_depends_on_later_tokens(self) -> None:
        if not self.spec.causal:
            return
        mixer = self.build()
        edges = (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK)
        for length, cuts in ((self.length, range(1, self.length)), (2 * CHUNK + 3, edges)):
            x = self.tokens(2, length)
            y = mixer(x)
            for t in cuts:
                changed = x.clone()
                changed[:, t:] = self.tokens(2, length - t, seed=t + 2)
                early = (mixer(changed)[:, :t] != y[:, :t]).any(-1).any(0).nonzero()
                assert not len(early), f"x: b=2 t={length}: output {int(early[0])} changed with tokens {t} and later"

    def test_every_output_depends_on_its_own_token(self) -> None:
        mixer, x = self.build(), self.tokens(1, self.length).requires_grad_()
        y = mixer(x) * self.tokens(1, self.length, seed=5)  # a norm without a projection has sums of zero
        for t in range(self.length):
            (gradient,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
            assert gradient[:, t].abs().max() > 0, f"output {t} ignores token {t}"

    def test_sequences_of_a_batch_do_not_mix(self) -> None:
        mixer, x = self.build(), self.tokens(3, self.length)
        order = torch.tensor([2, 0, 1])
        assert_close(mixer(x[order]), mixer(x)[order], f"x: b=3 t={self.length}, sequences in another order")

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
        for lengths in ([self.length], [4, 1, 8], [0, 5, 0, 1, 1, 7, 0], [CHUNK + 1, 0, 1, CHUNK, 2]):
            x = self.tokens(1, sum(lengths))
            boundaries = self.boundaries(*lengths)
            together, parts = x.clone().requires_grad_(), x.clone().requires_grad_()
            packed = mixer(together, boundaries)
            separate = torch.cat([mixer(document) for document in parts.split(lengths, dim=1) if document.shape[1]], 1)
            assert_close(packed, separate, f"outputs, documents of {lengths}")
            pull = self.tokens(1, sum(lengths), seed=5)
            packed_gradients = gradients(packed, pull, together, mixer)
            separate_gradients = gradients(separate, pull, parts, mixer)
            for name, found in packed_gradients.items():
                assert_close(found, separate_gradients[name], f"gradient of {name}, documents of {lengths}")

    def test_prefill_and_decode_equal_forward_at_every_split(self) -> None:
        mixer, x = self.build(), self.tokens(2, self.length)
        with torch.no_grad():
            whole = mixer(x)
            for split in range(self.length + 1):
                carry, outputs = mixer.empty_carry(2), []
                if split:
                    y, carry = mixer.prefill(x[:, :split], carry)
                    outputs.append(y)
                begun = carry
                for t in range(split, self.length):
                    y_t, carry = mixer.decode(x[:, t], carry)
                    outputs.append(y_t.unsqueeze(1))
                where = f"x: b=2 t={self.length}, prefill of {split}, then decode"
                assert_close(torch.cat(outputs, 1), whole, where)
                if isinstance(mixer, DecodesInPlace) and split < self.length:
                    in_place, last = decoded_in_place(mixer, begun, x[:, split:], where)
                    assert_close(in_place, whole[:, split:], f"{where} in place")
                    assert_same_carry(last, carry, f"{where} in place")

    def test_prefill_in_two_parts_equals_one(self) -> None:
        mixer = self.build()
        edges = (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK)
        for length, splits in ((self.length, range(1, self.length)), (2 * CHUNK + 3, edges)):
            x = self.tokens(2, length)
            with torch.no_grad():
                forward = mixer(x)
                whole, last = mixer.prefill(x, mixer.empty_carry(2))
                assert_close(whole, forward, f"x: b=2 t={length}, prefill against forward")
                for split in splits:
                    where = f"x: b=2 t={length}, split at {split}"
                    first, carry = mixer.prefill(x[:, :split], mixer.empty_carry(2))
                    second, carry = mixer.prefill(x[:, split:], carry)
                    assert_close(torch.cat([first, second], 1), whole, where)
                    assert_same_carry(carry, last, where)

    def test_gradients_flow_through_a_carry_as_through_a_sequence(self) -> None:
        mixer, x, pull = self.build(), self.tokens(2, self.length), self.tokens(2, self.length, seed=5)
        whole = x.clone().requires_grad_()
        expected = gradients(mixer(whole), pull, whole, mixer)
        for split in (1, self.length // 2):
            parts = x.clone().requires_grad_()
            first, carry = mixer.prefill(parts[:, :split], mixer.empty_carry(2))
            second, carry = mixer.prefill(parts[:, split:-1], carry)
            last, _ = mixer.decode(parts[:, -1], carry)
            found = gradients(torch.cat([first, second, last.unsqueeze(1)], 1), pull, parts, mixer)
            for name, gradient in found.items():
                what = f"gradient of {name}, x: b=2 t={self.length}, split at {split} and before the last token"
                assert_close(gradient, expected[name], what)

    def test_gradients_are_those_of_finite_differences(self) -> None:
        mixer, x, pull = self.build(), self.tokens(1, 7), self.tokens(1, 7, seed=5)
        leaf = x.clone().requires_grad_()
        found = gradients(mixer(leaf), pull, leaf, mixer)
        with torch.no_grad():
            for name, value in {"x": x, **dict(mixer.named_parameters())}.items():
                assert_slope(found[name], value, lambda: (mixer(x) * pull).sum(), f"x: b=1 t=7: {name}", self.seed)

    def test_two_calls_give_the_same_bits(self) -> None:
        mixer, x, pull = self.build(), self.tokens(2, self.length), self.tokens(2, self.length, seed=5)
        results = []
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            y = mixer(leaf)
            with torch.no_grad():
                prefilled, carry = mixer.prefill(x, mixer.empty_carry(2))
                y_t, carry = mixer.decode(x[:, 0], carry)
            results.append({"y": y, **gradients(y, pull, leaf, mixer), "prefill": prefilled, "decode": y_t})
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), f"x: b=2 t={self.length}: {name} differs from call to call"

    def test_arguments_are_left_as_they_were(self) -> None:
        mixer, x, cu_seqlens = self.build(), self.tokens(1, self.length), self.boundaries(3, self.length - 3)
        with torch.no_grad():
            _, carry = mixer.prefill(x, mixer.empty_carry(1))
            calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
                "forward": (mixer, (x,)),
                "prefill": (mixer.prefill, (x, carry)),
                "decode": (mixer.decode, (x[:, 0].clone(), carry)),
            }
            if self.spec.packed:
                calls["packed forward"] = (mixer, (x, cu_seqlens))
            for name, (call, arguments) in calls.items():
                before = snapshot(arguments)
                call(*arguments)
                assert same(arguments, before), f"x: b=1 t={self.length}: {name} writes into its arguments"

    def test_results_share_no_memory_with_what_the_caller_may_overwrite(self) -> None:
        """A buffer of inputs is reused, one carry is continued twice: neither changes what was handed out before."""
        mixer, x = self.build(), self.tokens(2, self.length)
        with torch.no_grad():
            empty = snapshot(mixer.empty_carry(2))
            y, carry = mixer.prefill(x, mixer.empty_carry(2))
            assert same(mixer.empty_carry(2), empty), "the empty carry is not empty after a prefill"
            buffer = self.tokens(2, 1, seed=3)[:, 0].contiguous()
            y_t, after = mixer.decode(buffer, carry)
            again, after_again = mixer.decode(buffer, carry)
            assert same((y_t, after), (again, after_again)), "one carry, continued twice alike, gives two results"
            handed_out = snapshot((y, carry, y_t, after))
            mixer.decode(buffer + 1, after)
            x.fill_(math.nan)
            buffer.fill_(math.nan)
            found = same((y, carry, y_t, after), handed_out)
        assert found, f"x: b=2 t={self.length}: outputs or carries change when the input's memory is written to"

    def test_keeps_the_type_of_its_input(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            mixer, x = self.build_in(dtype), self.tokens(2, self.length).to(dtype)
            with torch.no_grad():
                empty = mixer.empty_carry(2)
                prefilled, carry = mixer.prefill(x[:, :-1], empty)
                y_t, after = mixer.decode(x[:, -1], carry)
                outputs = {"forward": mixer(x), "prefill": prefilled, "decode": y_t}
            for name, y in outputs.items():
                assert y.dtype == dtype, f"{name} of {dtype} gives {y.dtype}"
                assert y.device == x.device, f"{name} on {x.device} gives an output on {y.device}"
                assert y.isfinite().all(), f"{name} of {dtype}, b=2 t={self.length}, is not finite"
            for name, later in (("prefill", carry), ("decode", after)):
                types = [leaf.dtype if isinstance(leaf, Tensor) else type(leaf) for leaf in tree_leaves(later)]
                first = [leaf.dtype if isinstance(leaf, Tensor) else type(leaf) for leaf in tree_leaves(empty)]
                assert types == first, f"the carry of {dtype} is {first} when empty and {types} after {name}"

    def test_float32_agrees_with_float64(self) -> None:
        """To 1e-3 of the largest output: float32 rounds at 6e-8, and recurrences may magnify it ten thousand times."""
        x = self.tokens(2, self.length)
        with torch.no_grad():
            found, expected = self.build_in(torch.float32)(x.float()), self.build()(x)
            assert_close(found.double(), expected, f"float32, x: b=2 t={self.length}", tolerance=1e-3)
            if torch.device(self.device).type != "cpu":
                on_cpu = self.build(device="cpu")(x.cpu())
                assert_close(expected.cpu(), on_cpu, f"{self.device} against cpu, x: b=2 t={self.length}")

    def test_float32_parameters_keep_their_bits_under_bfloat16(self) -> None:
        """A change too small for bfloat16 (2^-10 of the value; bfloat16 rounds at 2^-9) still reaches the output."""
        kind = torch.device(self.device).type
        x = self.tokens(2, CHUNK).float()
        for name in self._pinned_here():
            mixer = self.build_in(torch.float32)
            parameter = mixer.get_parameter(name)
            with torch.no_grad(), torch.autocast(kind, dtype=torch.bfloat16):
                # Away from zero, where a relative change is none; on values of bfloat16, to which it would be rounded.
                parameter.copy_(torch.where(parameter.abs() < 0.05, 0.05, parameter).bfloat16().float())
                y = mixer(x)
                parameter.mul_(1 + 2**-10)
                assert not torch.equal(mixer(x), y), f"x: b=2 t={CHUNK}: {name} is used after rounding to bfloat16"

    def test_state_dict_holds_all_that_was_drawn(self) -> None:
        first, second, x = self.build(seed=3), self.build(seed=4), self.tokens(2, self.length)
        second.load_state_dict(snapshot(first.state_dict()))
        with torch.no_grad():
            assert torch.equal(first(x), second(x)), "a mixer that loads another's state_dict gives other outputs"
            steps = [mixer.decode(x[:, -1], mixer.prefill(x, mixer.empty_carry(2))[1])[0] for mixer in (first, second)]
        assert torch.equal(*steps), "a mixer that loads another's state_dict decodes otherwise"

    def test_is_built_on_the_meta_device_and_filled_later(self) -> None:
        hollow, full, x = self.build(device="meta"), self.build(), self.tokens(2, self.length)
        for name, value in (*hollow.named_parameters(), *hollow.named_buffers()):
            assert value.device.type == "meta", f"{name} is made on {value.device} when the mixer is built on meta"
        hollow.to_empty(device=self.device)
        with torch.no_grad():
            for value in (*hollow.parameters(), *hollow.buffers()):
                value.fill_(math.nan if value.is_floating_point() else -1)  # what memory held before
            hollow.load_state_dict(full.state_dict())
            assert torch.equal(hollow(x), full(x)), "built on meta and loaded, it differs: a buffer is in no state_dict"

    def test_a_deep_copy_is_equal_and_independent(self) -> None:
        mixer, x = self.build(), self.tokens(2, self.length)
        with torch.no_grad():
            y, twin = mixer(x), copy.deepcopy(mixer)
            assert torch.equal(twin(x), y), "a deep copy gives other outputs"
            for parameter in twin.parameters():
                parameter.zero_()
            assert torch.equal(mixer(x), y), "writing to a deep copy changes the original"

    def test_config_survives_pickle_and_its_own_values(self) -> None:
        config = self.typed_config()
        assert pickle.loads(pickle.dumps(config)) == config, f"{config} comes back from pickle as another"
        again: Any = typed_config(self.spec.config, dataclasses.asdict(config), "config")
        assert again == config, f"{config}, built from its own values, is {again}"

    def test_compiles_without_graph_breaks(self) -> None:
        mixer, x = self.build(), self.tokens(1, self.length)
        with torch.no_grad():
            _, carry = mixer.prefill(x, mixer.empty_carry(1))
            calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
                "forward": (mixer.forward, (x,)),
                "prefill": (mixer.prefill, (x, carry)),
                "decode": (mixer.decode, (x[:, 0], carry)),
            }
            if self.spec.packed:
                calls["packed"] = (mixer.forward, (x, self.boundaries(4, 0, self.length - 4)))
            for name, (call, arguments) in calls.items():
                torch._dynamo.reset()
                try:
                    found = torch.compile(call, fullgraph=True, backend="eager")(*arguments)
                except torch._dynamo.exc.TorchDynamoException as error:
                    cause = str(error).strip().splitlines()[0]
                    raise AssertionError(f"x: b=1 t={self.length}: {name} breaks the graph: {cause}") from None
                for left, right in zip(tree_leaves(found), tree_leaves(call(*arguments)), strict=True):
                    if isinstance(left, Tensor):
                        assert_close(left, right, f"compiled {name}, x: b=1 t={self.length}")

    def test_captures_as_one_node_per_operator(self) -> None:
        captured = self.capture(self.build())
        reasons = "; ".join(dict.fromkeys(captured.declined.values()))
        assert not captured.declined, (
            f"not captured: {', '.join(captured.declined)}: {reasons}. A method is traced once, with stand-ins for its "
            "tensors: let it not branch or loop on their values, and write sizes out (`x.shape[0], x.shape[1]`)"
        )
        for method in METHODS:
            if method == IN_PLACE:
                continue  # not of every mixer, and by operators of its own: the device knows how long a cache is
            nodes = [operator.name for _, operator in operator_nodes(captured.graphs[method].graph)]
            declared = sorted(self.spec.operators)
            assert sorted(set(nodes)) == declared, f"{method} calls {nodes}, and {declared} are declared"

    def test_running_its_graphs_changes_neither_results_nor_state_dict(self) -> None:
        plain, rewritten = self.build(), self.build()
        install(getattr(rewritten, "mixer", rewritten), self.capture(rewritten).graphs)
        x = self.tokens(2, self.length)
        boundaries = self.boundaries(3, self.length - 3)
        assert list(rewritten.state_dict()) == list(plain.state_dict()), "running graphs changes the state_dict's keys"
        assert torch.equal(rewritten(x), plain(x)), f"x: b=2 t={self.length}: the graph of forward differs"
        if self.spec.packed:
            assert torch.equal(rewritten(x[:1], boundaries), plain(x[:1], boundaries)), "the packed graph differs"
        y, carry = rewritten.prefill(x[:, :5], rewritten.empty_carry(2))
        y_t, _ = rewritten.decode(x[:, 5], carry)
        where = "x_t: b=2 after 5 tokens"
        in_place = [
            decoded_in_place(mixer, carry, x[:, 5:7], where)
            for mixer in (rewritten, plain)
            if isinstance(mixer, DecodesInPlace)
        ]
        expected, carry = plain.prefill(x[:, :5], plain.empty_carry(2))
        expected_t, _ = plain.decode(x[:, 5], carry)
        assert torch.equal(y, expected), "x: b=2 t=5: the graph of prefill differs"
        assert torch.equal(y_t, expected_t), f"{where}: the graph of decode differs"
        if in_place:
            found, wanted = in_place
            assert same(found, wanted), f"{where}: the graph of decode_in_place differs"

    def test_calls_operators_and_leaves_the_kernel_to_the_compiler(self) -> None:
        for graph_module in self.capture(self.build()).graphs.values():
            for node, operator in operator_nodes(graph_module.graph):
                assert kernel_of(node) == "default", f"{operator.name} is called with a kernel of the mixer's choice"

    def test_its_bidirectional_form_sees_both_sides(self) -> None:
        """Of every token, as far ahead as its causal form sees behind: all there are, or what is within a window."""
        form = self.to_both_sides()
        if form is None:
            return
        suite, x = form(), self.tokens(2, self.length)
        mixer = suite.build()
        behind, seen = self._tokens_seen(self.build()), self._tokens_seen(mixer)
        for t, ignored in enumerate((behind | behind.T) & ~seen):
            blind = ignored.nonzero().flatten().tolist()
            assert not blind, f"x: b=2 t={self.length}: output {t} ignores tokens {blind}"
        x.requires_grad_()
        for call in (
            lambda: mixer.empty_carry(2), lambda: mixer.prefill(x, ()), lambda: mixer.decode(x[:, 0], ())
        ):  # fmt: skip
            try:
                call()
            except SubquadError:
                continue
            raise AssertionError("a bidirectional mixer has a carry, and what its tokens see is not there yet")
        graphs = suite.capture(mixer).graphs
        assert {"forward", "packed"} == graphs.keys(), f"captured: {', '.join(graphs)} instead of forward and packed"
        twin = suite.build()
        install(twin, graphs)
        bounds = self.boundaries(3, 0, self.length - 3)
        assert_close(twin(x), mixer(x), f"x: b=2 t={self.length}: the graph of forward")
        assert_close(twin(x[:1], bounds), mixer(x[:1], bounds), f"x: b=1 t={self.length}: the packed graph")
        torch._dynamo.reset()
        assert_close(torch.compile(mixer, fullgraph=True, backend="eager")(x), mixer(x), "compiled forward")
        suite.test_packed_documents_equal_separate_ones()
        suite.test_sequences_of_a_batch_do_not_mix()
        suite.test_gradient_reaches_every_parameter()
        suite.test_gradients_are_those_of_finite_differences()
        suite.test_work_grows_no_faster_than_declared()

    def _tokens_seen(self, mixer: Any) -> Tensor:
        """Which token each output depends on.  Shape: t t (bool), an output a row"""
        x = self.tokens(2, self.length).requires_grad_()
        y = mixer(x) * self.tokens(2, self.length, seed=5)
        slopes = [torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)[0] for t in range(self.length)]
        return torch.stack([slope.abs().amax(dim=(0, 2)) > 0 for slope in slopes])

    def test_what_it_shares_is_as_declared_and_has_gradients(self) -> None:
        mixer, x = self.build(), self.tokens(2, self.length)
        if not isinstance(mixer, ClosedMixer):
            return
        shared = {name: tensor.detach().requires_grad_() for name, tensor in mixer.drawn(x).items()}
        own = mixer.mixer
        y, published = own(x, None, shared)
        declared = mixer.sharing.publishes
        assert published.keys() == declared.keys(), f"it publishes {list(published)}, and {list(declared)} are declared"
        with torch.no_grad():
            first = {name: read[:, :-1] for name, read in shared.items()}
            last = {
                name: mixer.thinned(name, read, 1) if mixer.sharing.reads[name].history else read[:, -1:]
                for name, read in shared.items()
            }
            _, carry, early = own.prefill(x[:, :-1], own.empty_carry(2), first)
            _, _, late = own.decode(x[:, -1], carry, last)
        t = self.length
        for name, promised in declared.items():
            for call, given, length in (("forward", published, t), ("prefill", early, t - 1), ("decode", late, 1)):
                shape, dtype = tuple(given[name].shape), given[name].dtype
                enough = shape[1] >= length if promised.history and call == "decode" else shape[1] == length
                assert (2, *promised.shape) == shape[:1] + shape[2:] and enough, f"{call}: {name} has shape {shape}"
                assert dtype == x.dtype, f"{call} of {x.dtype} publishes {name} as {dtype}"
        pull = self.tokens(2, self.length, seed=5)
        found = torch.autograd.grad((y * pull).sum(), list(shared.values()), allow_unused=True) if shared else ()
        with torch.no_grad():
            for (name, read), gradient in zip(shared.items(), found):
                assert gradient is not None and gradient.abs().max() > 0, f"no output depends on {name}"
                assert_slope(gradient, read, lambda: (own(x, None, shared)[0] * pull).sum(), name, self.seed)

    def test_work_grows_no_faster_than_declared(self) -> None:
        """Arithmetic as operators and matrix products count it, and bytes written, which show the rest."""
        mixer = self.build(device="meta")
        lengths, flops, written = (1024, 2048, 4096), [], []
        for t in lengths:
            x = torch.empty(1, t, self.d_model, device="meta", dtype=torch.float64)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                mixer(x)
            with _BytesWritten() as traffic, torch.no_grad():
                mixer(x)
            flops.append(counter.get_total_flops())
            written.append(traffic.bytes)
        for what, counts in (("work", flops), ("memory written", written)):
            growth = math.log2(max(counts[2], 1) / max(counts[1], 1))
            declared = self.spec.work_growth.exponent(*lengths[1:])
            assert growth <= declared + GROWTH_SLACK, (
                f"{what} at t = {lengths} is {counts}: it grows as t^{growth:.2f}, and t^{declared:.3g} is declared"
            )

    def test_carry_grows_no_faster_than_declared(self) -> None:
        mixer = self.build()
        lengths, sizes = (128, 256, 512), []
        with torch.no_grad():
            for t in lengths:
                _, carry = mixer.prefill(self.tokens(1, t), mixer.empty_carry(1))
                sizes.append(carry_bytes(carry.own if isinstance(carry, ClosedCarry) else carry))
        growth = math.log2(max(sizes[2], 1) / max(sizes[1], 1))
        declared = self.spec.carry_growth.exponent(*lengths[1:])
        assert growth <= declared + GROWTH_SLACK, (
            f"the carry at t = {lengths} is {sizes} bytes: it grows as t^{growth:.2f}, and t^{declared:.3g} is declared"
        )

    def test_one_seed_gives_one_mixer(self) -> None:
        first, second, other = self.build(seed=3), self.build(seed=3), self.build(seed=4)
        for (name, a), b in zip(first.named_parameters(), second.parameters()):
            assert torch.equal(a, b), f"{name} differs between two mixers of one seed"
        drawn = [not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters())]
        assert any(drawn), "the seed changes no parameter"

    def test_names_only_parameters_that_exist(self) -> None:
        names = [name for name, _ in self.build().named_parameters()] + self._names_elsewhere()
        for declared in (*self.spec.no_decay, *self.spec.float32_parameters):
            assert declared in names, f"'{declared}' is declared and is no parameter: they are {', '.join(names)}"

    def test_weight_decay_spares_what_is_declared(self) -> None:
        mixer = self.build()
        block = Block(mixer, None, mixer_name=self.mixer, layer_index=0, d_model=self.d_model, norm_eps=1e-5)
        model = LanguageModel(
            [block],
            vocab_size=8,
            d_model=self.d_model,
            norm_eps=1e-5,
            tie_embeddings=False,
            no_decay={self.mixer: self.spec.no_decay},
        )
        decayed, _ = model.parameter_groups(0.1)
        held = dict(mixer.named_parameters())
        for name in self.spec.no_decay:
            parameter = held.get(name)  # of another layer, if not of this
            assert all(parameter is not other for other in decayed["params"]), f"{name} is decayed"


def decoded_in_place(mixer: DecodesInPlace, carry: Carry, x: Tensor, where: str) -> tuple[Tensor, Carry]:
    """The outputs of tokens that are decoded with room for them, and the ordinary carry behind them.

    Asserts that the carry with room is of tensors which keep their shapes, and that the one it was made from stays as
    it is.  Shapes:  x: b t d  ->  b t d
    """
    before, outputs = snapshot(carry), []
    roomy = mixer.with_room(carry, x.shape[1])
    assert all(isinstance(leaf, Tensor) for leaf in tree_leaves(roomy)), f"{where}: the carry with room holds numbers"
    shapes = [leaf.shape for leaf in tree_leaves(roomy)]
    for x_t in x.unbind(1):
        y_t, roomy = mixer.decode_in_place(x_t, roomy)
        outputs.append(y_t)
        found = [leaf.shape for leaf in tree_leaves(roomy)]
        assert found == shapes, f"{where}: the carry with room has shapes {found} after a token, and had {shapes}"
    assert same(carry, before), f"{where}: decoding in place writes into the carry from which it began"
    return torch.stack(outputs, 1), mixer.without_room(roomy)


def assert_same_carry(carry: Carry, wanted: Carry, where: str) -> None:
    """Equal to rounding, and integers exactly."""
    for found, expected in zip(tree_leaves(carry), tree_leaves(wanted), strict=True):
        if isinstance(found, Tensor):
            assert_close(found, expected, f"carry, {where}")
        else:
            assert found == expected, f"{where}: the carry holds {found} instead of {expected}"


def assert_close(found: Tensor, expected: Tensor, what: str = "values", tolerance: float = TOLERANCE) -> None:
    """max |found - expected| <= tolerance * max(|expected|, 1e-3), of equal shapes."""
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    # What is zero but for rounding has no largest value to be relative to.
    scale = max(float(expected.detach().abs().max()), 1e-3)
    error = float((found - expected).detach().abs().max()) / scale
    assert error <= tolerance, f"{what}: off by {error:.1e} of the largest value"


def assert_slope(gradient: Tensor, value: Tensor, loss: Callable[[], Tensor], what: str, seed: int = 0) -> None:
    """(8 (L(e) - L(-e)) - L(2e) + L(-2e)) / 12e = grad . d  with L(e) the loss at value + e d, d a random direction.

    Of fourth order: the second order's error, curvature times e^2, is 1e-5 of the slope in steep mixers.
    """
    step = 1e-5
    generator = torch.Generator().manual_seed(seed + 7)
    direction = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
    before, losses = value.clone(), []
    for steps in (1, -1, 2, -2):
        value.copy_(before + steps * step * direction)
        losses.append(float(loss()))
    value.copy_(before)
    slope = (8 * (losses[0] - losses[1]) - (losses[2] - losses[3])) / (12 * step)
    claimed = float((gradient * direction).sum())
    scale = max(float((gradient * direction).abs().sum()), 1e-3)
    off = abs(slope - claimed) / scale
    assert off < 1e-6, f"the gradient of {what} is {claimed:.6g} where the slope is {slope:.6g}"


def gradients(y: Tensor, pull: Tensor, x: Tensor, mixer: nn.Module) -> dict[str, Tensor]:
    """Gradients of sum(y * pull) with respect to the input (`x`) and to every parameter, by name."""
    names, parameters = zip(*mixer.named_parameters())
    found = torch.autograd.grad((y * pull).sum(), [x, *parameters])
    return dict(zip(("x", *names), found))


def snapshot(values: Any) -> Any:
    """The same tree with tensors copied."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), values)


def same(found: object, expected: object) -> bool:
    """Whether two trees hold the same bits and the same numbers."""
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


class _BytesWritten(TorchDispatchMode):
    """Counts the bytes of every result that is not a view; an operator is one call, whatever it does inside."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += carry_bytes(results)
        return results


def carry_bytes(carry: object) -> int:
    """What a carry occupies; integers count as none."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(carry) if isinstance(leaf, Tensor))
