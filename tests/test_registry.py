"""Plugins are found by entry point, and what is wrong with one is said by name."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points

import pytest
from plugin_site import Site

from subquad.commands import plugins
from subquad.contracts import CONTRACT_VERSION
from subquad.errors import NotFoundError, PluginError
from subquad.registry import ENTRY_POINT_GROUP, KNOWN_PLUGINS, SLOW_IMPORT_S, build_registry, load_registry

MIXER = """
from dataclasses import dataclass
from subquad import Growth, MixerSpec, hookimpl

@dataclass(kw_only=True)
class Config:
    width: int = 4

@hookimpl
def subquad_provide_mixers():
    return [MixerSpec(name="{mixer}", summary="s", paper="p", config=Config, build="nowhere:Nothing",
                      work_growth=Growth.LINEAR, carry_growth=Growth.CONSTANT)]
"""


def test_first_party_plugins_come_through_the_same_entry_point_as_anyones() -> None:
    found = {plugin.name: plugin.distribution for plugin in load_registry().plugins}
    assert found["builtin"] == "subquad"
    assert found["scout"] == "subquad-scout"
    assert found["ssm"] == "subquad-ssm"
    assert found["linear"] == "subquad-linear"
    assert load_registry().origin(load_registry().mixers["segment_attention"]).startswith("subquad-scout ")


def test_a_strangers_mixer_is_found_with_its_distribution_and_version(site: Site) -> None:
    site.install("acme-mixers", MIXER.format(mixer="acme"))
    registry = site.registry()
    assert registry.origin(registry.mixer("acme")) == "acme-mixers 1.5"


def test_a_plugin_that_cannot_be_imported_is_named_and_the_others_work(site: Site) -> None:
    site.install("broken-plugin", "import a_module_that_nobody_has")
    site.install("acme-mixers", MIXER.format(mixer="acme"))
    registry = site.registry()
    (problem,) = registry.problems
    assert (problem.name, problem.distribution) == ("broken-plugin", "broken-plugin")
    assert "a_module_that_nobody_has" in problem.reason
    assert "pip uninstall broken-plugin" in problem.mend
    assert {"acme", "softmax_attention"} <= set(registry.mixers)


def test_a_broken_plugin_is_mentioned_where_a_recipe_misses_a_mixer(site: Site) -> None:
    site.install("broken-plugin", "raise RuntimeError('out of order')")
    with pytest.raises(NotFoundError) as caught:
        site.registry().mixer("acme")
    assert "out of order" in caught.value.mend


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError"),
        ("from subquad import a_name_that_was_removed", "AttributeError|ImportError"),
    ],
    ids=["exits", "syntax", "older contract"],
)
def test_whatever_an_import_raises_is_a_problem_of_that_plugin_alone(site: Site, source: str, reason: str) -> None:
    site.install("broken-plugin", source)
    registry = site.registry()
    (problem,) = registry.problems
    assert re.search(reason, problem.reason)
    assert "softmax_attention" in registry.mixers


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('lost')", "KeyError: 'lost'"),
        ("return None", "TypeError"),
        ("yield 1; raise ValueError('half way')", "half way"),
    ],
    ids=["raises", "returns nothing", "raises half way"],
)
def test_a_hook_that_raises_costs_its_plugin_and_nobody_else(site: Site, body: str, reason: str) -> None:
    hook = f"\n@hookimpl\ndef subquad_provide_passes():\n    {body}\n"
    site.install("broken-plugin", MIXER.format(mixer="broken") + hook)
    site.install("acme-mixers", MIXER.format(mixer="acme"))
    registry = site.registry()
    (problem,) = registry.problems
    assert problem.distribution == "broken-plugin"
    assert reason in problem.reason
    assert "acme" in registry.mixers
    assert "broken" not in registry.mixers, "a plugin is taken whole or not at all"
    assert "broken-plugin" not in {plugin.name for plugin in registry.plugins}


@pytest.mark.parametrize(("contract", "older"), [(2, "subquad"), (0, "other-plugin")])
def test_a_plugin_of_another_contract_is_named_with_the_reason_and_none_of_its_code_runs(
    site: Site, contract: int, older: str
) -> None:
    site.install("other-plugin", "raise SystemExit('its code ran')", groups=[f"{ENTRY_POINT_GROUP}.{contract}"])
    site.install("acme-mixers", MIXER.format(mixer="acme"))
    registry = site.registry()
    (problem,) = registry.problems
    assert (problem.name, problem.distribution) == ("other-plugin", "other-plugin")
    assert problem.reason == f"it is written against contract {contract}, this subquad has contract {CONTRACT_VERSION}"
    assert f"pip install -U {older}" in problem.mend
    assert "acme" in registry.mixers
    assert "its code ran" not in plugins.as_tables(plugins.inventory(registry))
    assert f"contract {contract}" in plugins.as_tables(plugins.inventory(registry))


def test_a_plugin_may_stand_in_the_groups_of_two_contracts(site: Site) -> None:
    site.install("acme-mixers", MIXER.format(mixer="acme"), groups=[ENTRY_POINT_GROUP, f"{ENTRY_POINT_GROUP}.2"])
    registry = site.registry()
    assert registry.problems == ()
    assert "acme" in registry.mixers


def test_a_slow_import_is_named_with_its_seconds(site: Site) -> None:
    site.install("slow-plugin", f"import time; time.sleep({SLOW_IMPORT_S})\n" + MIXER.format(mixer="slow"))
    registry = site.registry()
    (record,) = [plugin for plugin in registry.plugins if plugin.name == "slow-plugin"]
    assert record.is_slow
    assert SLOW_IMPORT_S <= record.import_s < SLOW_IMPORT_S + 30
    printed = plugins.as_tables(plugins.inventory(registry))
    assert re.search(rf"Slow to import.*slow-plugin +slow-plugin +{record.import_s:.1f}", printed, flags=re.S)


def test_loading_warns_once_and_on_one_line_about_a_broken_plugin(site: Site) -> None:
    site.install("broken-plugin", "raise RuntimeError('first line\\nsecond line')")
    load_registry.cache_clear()
    try:
        with pytest.warns(UserWarning, match="broken-plugin") as caught:
            assert load_registry() is load_registry()
        assert len(caught) == 1
        assert "\n" not in str(caught[0].message)
    finally:
        load_registry.cache_clear()


def test_two_mixers_of_one_name_are_an_error_that_names_both_distributions(site: Site) -> None:
    site.install("acme-mixers", MIXER.format(mixer="acme"))
    site.install("other-mixers", MIXER.format(mixer="acme"))
    with pytest.raises(PluginError) as caught:
        site.registry()
    assert "acme" in caught.value.what
    assert caught.value.where == "acme-mixers 1.5 and other-mixers 1.5"


def test_a_stranger_cannot_replace_a_builtin_mixer(site: Site) -> None:
    site.install("acme-mixers", MIXER.format(mixer="window"))
    with pytest.raises(PluginError) as caught:
        site.registry()
    assert "subquad" in caught.value.where
    assert "acme-mixers" in caught.value.where


def test_a_stranger_cannot_call_itself_builtin(site: Site) -> None:
    site.install("acme-mixers", MIXER.format(mixer="acme"), entry="builtin")
    with pytest.raises(PluginError, match="two plugins are called 'builtin'") as caught:
        site.registry()
    assert set(caught.value.where.split(" and ")) == {"subquad", "acme-mixers"}


def test_a_stranger_cannot_replace_a_builtin_kernel(site: Site) -> None:
    site.install(
        "acme-kernels",
        "from dataclasses import replace\nfrom subquad import hookimpl\nfrom subquad_kernels.builtin import KERNELS\n"
        "@hookimpl\ndef subquad_provide_kernels():\n    return [replace(KERNELS[0])]\n",
    )
    with pytest.raises(PluginError, match="two kernels are called") as caught:
        site.registry()
    assert caught.value.where.startswith("subquad ")
    assert caught.value.where.endswith("acme-kernels 1.5")


def test_two_plugins_of_one_name_are_an_error_that_names_both_distributions(site: Site) -> None:
    site.install("acme-mixers", MIXER.format(mixer="acme"), entry="same")
    site.install("other-mixers", MIXER.format(mixer="other"), entry="same")
    with pytest.raises(PluginError) as caught:
        site.registry()
    assert "acme-mixers" in caught.value.where
    assert "other-mixers" in caught.value.where


def test_two_data_sources_of_one_name_are_an_error(site: Site) -> None:
    site.install(
        "acme-data",
        "from dataclasses import dataclass\nfrom subquad import ComponentSpec, hookimpl\n"
        "@dataclass\nclass Config:\n    n: int = 1\n"
        "@hookimpl\ndef subquad_provide_components():\n"
        "    return [ComponentSpec(kind='data', name='synthetic', summary='s', config=Config, build='x:y')]\n",
    )
    with pytest.raises(PluginError, match="two data components are called 'synthetic'") as caught:
        site.registry()
    assert "acme-data 1.5" in caught.value.where


@pytest.mark.parametrize(
    ("source", "what", "mend"),
    [
        (MIXER.format(mixer="acme").replace("provide_mixers", "provide_mixer"), "provide_mixer'", "did you mean"),
        (MIXER.format(mixer="acme").replace("@hookimpl", ""), "not marked as a hook", "@subquad.hookimpl"),
        (
            "from subquad import hookimpl\n@hookimpl\ndef subquad_provide_mixers():\n    return ['acme']",
            "returned str, not MixerSpec",
            "MixerSpec",
        ),
        (
            "from subquad import hookimpl\n@hookimpl\ndef subquad_provide_components():\n    return ['acme']",
            "returned str, not ComponentSpec",
            "ComponentSpec",
        ),
        (
            MIXER.format(mixer="acme").replace("carry_growth", "operators=['rotary'], carry_growth"),
            "'acme' of subquad_provide_mixers holds a list",
            "tuples",
        ),
    ],
    ids=["misspelt hook", "unmarked hook", "wrong record", "wrong component", "a list"],
)
def test_a_wrong_declaration_is_an_error_that_names_the_plugin(site: Site, source: str, what: str, mend: str) -> None:
    site.install("acme-mixers", source)
    with pytest.raises(PluginError) as caught:
        site.registry()
    assert what in caught.value.what
    assert "acme-mixers" in caught.value.where
    assert mend in caught.value.mend


def test_a_misspelt_mixer_gets_a_suggestion() -> None:
    with pytest.raises(NotFoundError) as caught:
        load_registry().mixer("softmx_attention")
    assert "did you mean 'softmax_attention'?" in caught.value.mend


@pytest.mark.parametrize(
    ("mixer", "distribution"),
    [("mamba", "subquad-ssm"), ("segment_attention", "subquad-scout"), ("retnet", "subquad-linear")],
)
def test_a_mixer_of_a_published_plugin_that_is_not_installed_gets_the_pip_command(
    mixer: str, distribution: str
) -> None:
    installed: list[EntryPoint] = [
        entry for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.dist and entry.dist.name != distribution
    ]
    with pytest.raises(NotFoundError) as caught:
        build_registry(installed).mixer(mixer)
    assert caught.value.mend == f"pip install {distribution}"


def test_importing_subquad_loads_no_torch_and_runs_no_plugin() -> None:
    code = (
        "import sys, subquad; subquad.MixerSpec; subquad.hookimpl\n"
        "heavy = {'torch', 'hydra', 'lightning', 'subquad_ssm', 'subquad_scout', 'subquad_linear'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plugins_are_declared_without_loading_torch() -> None:
    code = (
        "import sys; from subquad.registry import load_registry; load_registry()\n"
        "loaded = {'torch', 'hydra', 'lightning'} & set(sys.modules)\n"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_published_mixer_is_known_by_its_distribution() -> None:
    """A recipe that asks for one without its plugin is told what to install."""
    published = {
        name: spec.build.partition(".")[0].replace("_", "-")
        for name, spec in load_registry().mixers.items()
        if spec.build.startswith("subquad_")
    }
    assert published == KNOWN_PLUGINS
