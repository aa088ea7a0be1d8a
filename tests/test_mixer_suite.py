"""The conformance suite finds every planted fault, and none where there is none."""

from __future__ import annotations

import dataclasses
import math

import mutant_mixers
import mutant_sharers
import pytest
from mutant_mixers import NoConfig, Sound
from mutant_sharers import SoundSharer

from subquad.contracts import Growth, MixerSpec
from subquad.testing.mixer_suite import MixerSuite
from subquad.testing.verdict import Outcome, judge, promises

SPEC = MixerSpec(
    name="mutant",
    summary="linear attention with a learned decay per head, or nearly so",
    paper="none",
    config=NoConfig,
    build="mutant_mixers:Sound",
    work_growth=Growth.LINEAR,
    carry_growth=Growth.CONSTANT,
    no_decay=("rate",),
    float32_parameters=("rate",),
    operators=("linear_attention",),
)
MUTANTS = {
    "LeaksOneFutureToken": "no_output_depends_on_later_tokens",
    "LeaksAcrossTheBatch": "sequences_of_a_batch_do_not_mix",
    "ForgetsToResetAtABoundary": "packed_documents_equal_separate_ones",
    "DecaysTwiceWhenDecoding": "prefill_and_decode_equal_forward_at_every_split",
    "DropsTheGradientOfTheInitialState": "gradients_flow_through_a_carry_as_through_a_sequence",
    "DropsTheGradientOfTheDecay": "gradients_are_those_of_finite_differences",
    "DeclaresLessWorkThanItDoes": "work_grows_no_faster_than_declared",
    "WritesAsManyNumbersAsThereArePairs": "work_grows_no_faster_than_declared",
    "DeclaresASmallerCarryThanItHas": "carry_grows_no_faster_than_declared",
    "DecodesOtherwiseInPlace": "prefill_and_decode_equal_forward_at_every_split",
    "DecodesInPlaceInTheCarryItIsGiven": "prefill_and_decode_equal_forward_at_every_split",
    "DecodesInPlaceInACarryThatGrows": "prefill_and_decode_equal_forward_at_every_split",
    "DecodesTheTokenBefore": "prefill_and_decode_equal_forward_at_every_split",
    "MutatesItsInput": "arguments_are_left_as_they_were",
    "MutatesTheCarryItIsGiven": "arguments_are_left_as_they_were",
    "HandsOutItsInputAsCarry": "results_share_no_memory_with_what_the_caller_may_overwrite",
    "HandsOutOneEmptyCarry": "results_share_no_memory_with_what_the_caller_may_overwrite",
    "IsNotDeterministic": "two_calls_give_the_same_bits",
    "LosesTheTypeOfItsInput": "keeps_the_type_of_its_input",
    "LosesTheTypeOfItsCarry": "keeps_the_type_of_its_input",
    "RoundsWhatIsPinned": "float32_parameters_keep_their_bits_under_bfloat16",
    "KeepsATensorOutOfItsStateDict": "state_dict_holds_all_that_was_drawn",
    "ComputesABufferOnlyWhenBuilt": "is_built_on_the_meta_device_and_filled_later",
    "SharesItsWeightsWithItsCopies": "a_deep_copy_is_equal_and_independent",
    "BreaksTheGraph": "compiles_without_graph_breaks",
    "LooksAtValues": "captures_as_one_node_per_operator",
    "CallsAnOperatorItDoesNotDeclare": "captures_as_one_node_per_operator",
    "ChoosesItsKernel": "calls_operators_and_leaves_the_kernel_to_the_compiler",
    "IgnoresAParameter": "gradient_reaches_every_parameter",
    "DrawsFromARandomnessOfItsOwn": "one_seed_gives_one_mixer",
    "MakesTensorsOnTheCpu": "is_built_on_the_meta_device_and_filled_later",
    "ForgetsTheLastTokenOfLongSequences": "prefill_in_two_parts_equals_one",
    "MixesWithAnUnusedGate": "every_output_depends_on_its_own_token",
}
"""Each fault, and the promise that is about it; others may break with it."""
SHARERS = {
    "IgnoresWhatItReads": "what_it_shares_is_as_declared_and_has_gradients",
    "DropsTheGradientOfWhatItReads": "what_it_shares_is_as_declared_and_has_gradients",
    "ReadsALaterToken": "no_output_depends_on_later_tokens",
    "PublishesAcrossDocuments": "packed_documents_equal_separate_ones",
    "PublishesAnotherWidth": "what_it_shares_is_as_declared_and_has_gradients",
    "PublishesAnotherType": "what_it_shares_is_as_declared_and_has_gradients",
    "PublishesNothingWhenDecoding": "prefill_and_decode_equal_forward_at_every_split",
}
"""The same of mixers that share tensors with other layers."""
DISCOVERY = "is_discovered_under_its_name"
"""The one promise that a mixer without a distribution cannot keep."""


class SoundSuite(MixerSuite):
    mixer = "mutant"
    declared = SPEC

    @property
    def spec(self) -> MixerSpec:
        return self.declared


def suite_of(name: str, **declared: object) -> type[MixerSuite]:
    """The suite on one class of `mutant_mixers`."""
    spec = dataclasses.replace(SPEC, build=f"mutant_mixers:{name}", **declared)  # type: ignore[arg-type]
    return type(f"Suite{name}", (SoundSuite,), {"declared": spec})


def broken(suite: type[MixerSuite], only: str | None = None) -> dict[str, Outcome]:
    found = judge(suite, only=only)
    return {outcome.promise: outcome for outcome in found if outcome.broken is not None}


def test_the_mixer_without_a_fault_keeps_every_promise_but_to_be_installed() -> None:
    assert list(broken(suite_of("Sound"))) == [DISCOVERY]


def test_every_fault_is_listed_and_every_listed_promise_exists() -> None:
    faults = {
        name for name, value in vars(mutant_mixers).items()
        if isinstance(value, type) and issubclass(value, Sound) and value is not Sound
    }  # fmt: skip
    assert faults == set(MUTANTS)
    assert len(faults) >= 12
    assert set(MUTANTS.values()) <= set(promises(MixerSuite))


@pytest.mark.parametrize("name", MUTANTS)
def test_the_suite_finds(name: str) -> None:
    found = broken(suite_of(name), only=MUTANTS[name])
    assert set(found) == {MUTANTS[name]}, f"{name} survives"
    assert "Error:" not in str(found[MUTANTS[name]].broken).split(" ")[0], "found by accident: the mutant raises"


def sharers(name: str) -> type[MixerSuite]:
    spec = dataclasses.replace(SPEC, build=f"mutant_sharers:{name}", shares=mutant_sharers.share)
    return type(f"Suite{name}", (SoundSuite,), {"declared": spec})


def test_a_mixer_that_shares_keeps_every_promise_and_each_of_its_faults_is_found() -> None:
    faults = {
        name for name, value in vars(mutant_sharers).items()
        if isinstance(value, type) and issubclass(value, SoundSharer) and value is not SoundSharer
    }  # fmt: skip
    assert faults == set(SHARERS)
    assert list(broken(sharers("SoundSharer"))) == [DISCOVERY]
    for name, promise in SHARERS.items():
        found = broken(sharers(name), only=promise)
        assert set(found) == {promise}, f"{name} survives"
        assert "Error:" not in str(found[promise].broken).split(" ")[0], "found by accident: the mutant raises"


@dataclasses.dataclass(kw_only=True)
class BothSidesConfig:
    bidirectional: bool = False


@pytest.mark.parametrize(
    ("build", "said"),
    [("mutant_mixers:Sound", "output 0 ignores tokens [1, 2,"), ("mutant_sharers:HasACarryAllTheSame", "has a carry")],
)
def test_a_bidirectional_form_that_is_none_is_found(build: str, said: str) -> None:
    promise = "its_bidirectional_form_sees_both_sides"
    spec = dataclasses.replace(SPEC, build=build, config=BothSidesConfig, bidirectional=True)
    found = broken(type("Suite", (SoundSuite,), {"declared": spec}), only=promise)
    assert said in str(found[promise].broken)


@pytest.mark.parametrize(
    ("declared", "promise"),
    [
        ({"no_decay": ("rates",)}, "names_only_parameters_that_exist"),
        ({"float32_parameters": ("in_proj.weight",)}, "float32_parameters_keep_their_bits_under_bfloat16"),
        ({"operators": ()}, "captures_as_one_node_per_operator"),
        ({"operators": ("linear_attention", "rotary")}, "captures_as_one_node_per_operator"),
        ({"work_growth": Growth.SQRT}, "work_grows_no_faster_than_declared"),
    ],
    ids=str,
)
def test_the_suite_finds_a_wrong_declaration_of_a_sound_mixer(declared: dict[str, object], promise: str) -> None:
    assert set(broken(suite_of("Sound", **declared), only=promise)) == {promise}


def test_the_sound_mixer_keeps_its_promises_for_other_seeds() -> None:
    for seed in (1, 2):
        suite = type("Seeded", (suite_of("Sound"),), {"seed": seed})
        assert list(broken(suite)) == [DISCOVERY]


def test_logarithms_are_measured_between_two_lengths() -> None:
    assert [growth.exponent(2048, 4096) for growth in (Growth.CONSTANT, Growth.SQRT, Growth.LINEAR)] == [0, 0.5, 1]
    assert Growth.LOGARITHMIC.exponent(2048, 4096) == pytest.approx(math.log2(12 / 11))
    assert Growth.LOG_LINEAR.exponent(256, 512) == pytest.approx(1 + math.log2(9 / 8))


def test_a_cache_that_grows_with_t_is_found_where_a_logarithm_is_declared() -> None:
    promise = "carry_grows_no_faster_than_declared"
    suite = suite_of("DeclaresASmallerCarryThanItHas", carry_growth=Growth.LOGARITHMIC)
    assert "t^0.17 is declared" in str(broken(suite, only=promise)[promise].broken)
