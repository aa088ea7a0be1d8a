"""Plugins are found by entry point, and what is wrong with one is said by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from subquad.errors import NotFoundError, PluginError
from subquad.registry import ENTRY_POINT_GROUP, Registry, build_registry, load_registry

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


class Site:
    """A folder on sys.path where distributions are installed by writing their metadata."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(self, distribution: str, source: str, *, entry: str | None = None) -> None:
        """A distribution of one module, `NAME_module`, behind one entry point."""
        module = distribution.replace("-", "_") + "_module"
        (self.path / f"{module}.py").write_text(source)
        metadata = self.path / f"{distribution.replace('-', '_')}-1.5.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (metadata / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{entry or distribution} = {module}\n")

    def registry(self) -> Registry:
        return build_registry(entry_points(group=ENTRY_POINT_GROUP))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(path)
    yield Site(path)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(path)):
            del sys.modules[name]


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
        "    return [ComponentSpec(kind='data', name='mqar', summary='s', config=Config, build='x:y')]\n",
    )
    with pytest.raises(PluginError, match="two data components are called 'mqar'") as caught:
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
    ],
    ids=["misspelt hook", "unmarked hook", "wrong record"],
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
