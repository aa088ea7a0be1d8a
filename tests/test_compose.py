"""YAML of several origins becomes one typed configuration."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from subquad import ConfigError, NotFoundError, PluginError, load_config
from subquad.registry import ENTRY_POINT_GROUP, load_registry
from subquad.schema import AUTO, ChannelMixerConfig, RunConfig

ROOT = Path(__file__).resolve().parent.parent
OWN_PROJECT = ROOT / "examples" / "03_own_project" / "conf"
MODELS = sorted({path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")} - {"imported"})
"""`imported` has no layout of its own: tests/test_import_weights.py."""


def plain(value: object) -> bool:
    """Whether a value holds nothing but dataclasses, dicts, lists and scalars."""
    if is_dataclass(value):
        return all(plain(getattr(value, field.name)) for field in fields(value))
    if type(value) is dict:
        return all(plain(key) and plain(entry) for key, entry in value.items())
    if type(value) is list:
        return all(plain(entry) for entry in value)
    return value is None or type(value) in (bool, int, float, str)


@pytest.mark.parametrize("model", MODELS)
def test_every_recipe_composes_into_plain_typed_objects(model: str) -> None:
    config = load_config([f"model={model}"])
    assert type(config) is RunConfig
    assert config.model.name == model
    assert plain(config)
    open_layers = AUTO in config.model.schedule
    assert open_layers == bool(config.model.candidates)
    for key in {*config.model.schedule, *config.model.candidates} - {AUTO}:
        entry = config.model.mixers[key]
        assert entry["mixer"] in load_registry().mixers


@pytest.mark.parametrize(
    ("model", "d_model", "blocks", "d_hidden", "schedule", "tied"),
    [
        ("scout_mamba_430m", 1024, 28, 2816, ["mamba", "segment_attention"], True),
        ("scout_mamba_1_59b", 2048, 26, 5632, ["mamba", "segment_attention"], False),
        ("scout_swa_470m", 1024, 34, 2816, ["window", "segment_attention"], True),
        ("scout_swa_1_57b", 2048, 28, 5632, ["window", "segment_attention"], False),
    ],
)
def test_the_papers_sizes_stand_in_their_recipes(
    model: str, d_model: int, blocks: int, d_hidden: int, schedule: list[str], tied: bool
) -> None:
    config = load_config([f"model={model}"]).model
    assert (config.d_model, config.num_layers, config.schedule) == (d_model, blocks, schedule)
    assert config.channel_mixer == ChannelMixerConfig(d_hidden=d_hidden)
    assert (config.tie_embeddings, config.vocab_size) == (tied, 32000)
    attention = config.mixers["segment_attention"]
    assert (attention["num_heads"], attention["head_dim"], attention["segment_len"]) == (d_model // 64, 64, 10)
    first = config.mixers[schedule[0]]
    assert first["dt_rank"] == 128 if schedule[0] == "mamba" else first["window"] == 1024


def test_overrides_reach_every_part_with_their_types() -> None:
    config = load_config(
        [
            "model=scout_swa",
            "model.mixers.window.window=7",
            "model.mixers.segment_attention.segment_len=sqrt",
            "model.mixers.window.channel_mixer=null",
            "optimizer.lr=1",
            "trainer.max_steps=3",
            "kernel.softmax_attention=reference",
            "deny=[segment_attention/reference]",
            "run_dir=here",
        ]
    )
    assert config.model.mixers["window"]["window"] == 7
    assert config.model.mixers["window"]["channel_mixer"] is None
    assert config.model.mixers["segment_attention"]["segment_len"] == "sqrt"
    assert config.optimizer["lr"] == 1
    assert config.trainer.max_steps == 3
    assert config.kernel == {"softmax_attention": "reference"}
    assert config.deny == ["segment_attention/reference"]
    assert config.run_dir == "here"


def test_a_mixer_joins_a_recipe_under_a_name_of_ones_own() -> None:
    config = load_config(
        ["model=transformer", "+mixer@model.mixers.near=window", "model.schedule=[near,softmax_attention]"]
    )
    assert config.model.mixers["near"]["mixer"] == "window"
    assert config.model.mixers["near"]["window"] == 64


def test_every_data_source_composes_by_its_name_alone() -> None:
    sources = [name for kind, name in load_registry().components if kind == "data"]
    needs = {"text_files": ["data.files=[a.txt]"], "hf": ["data.path=text"]}
    needs["mixture"] = ["+data.sources.std={name: python_source}"]
    for name in sources:
        assert load_config([f"data={name}", *needs.get(name, [])]).data["name"] == name


def test_a_group_choice_leaves_no_key_of_the_default_choice_behind() -> None:
    config = load_config(["data=synthetic"])
    assert "validation_fraction" not in config.data
    assert config.data["task"] == "mqar"


def test_interpolations_are_resolved() -> None:
    assert load_config(["seed=3", "+data.max_bytes=${seed}"]).data["max_bytes"] == 3


def test_a_recipe_is_the_same_every_time_it_is_composed() -> None:
    assert load_config(["model=mamba"]) == load_config(["model=mamba"])


# --- a user's own folder ------------------------------------------------------


def test_the_example_project_composes_its_recipes_with_ours() -> None:
    config = load_config(["experiment=short"], config_dir=OWN_PROJECT)
    assert config.model.name == "my_hybrid"
    assert config.model.schedule == ["mamba", "near", "mamba", "far"]
    assert config.model.mixers["far"]["segment_len"] == 16
    assert config.model.mixers["mamba"]["channel_mixer"] is None
    assert (config.trainer.max_steps, config.trainer.batch_size) == (100, 8)
    assert config.optimizer["weight_decay"] == 0.1


def test_the_command_line_wins_over_an_experiment() -> None:
    config = load_config(["experiment=short", "model=transformer", "trainer.max_steps=1"], config_dir=OWN_PROJECT)
    assert (config.model.name, config.trainer.max_steps) == ("transformer", 1)


def test_a_root_config_of_ones_own_builds_on_ours(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\nseed: 5\n")
    assert load_config(config_name="mine", config_dir=tmp_path).seed == 5


def test_a_file_of_ones_own_that_we_ship_too_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "transformer.yaml").write_text("d_model: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["model=transformer"], config_dir=tmp_path)
    assert "model/transformer.yaml" in caught.value.what
    assert "subquad" in caught.value.what


def test_a_file_that_is_no_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "bad.yaml").write_text("d_model: 8\nschedule: [a, b\nname: x\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["model=bad"], config_dir=tmp_path)
    assert "bad.yaml, line" in caught.value.where


def test_a_wrong_type_inside_a_yaml_file_is_an_error_at_its_key(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "wrong.yaml").write_text("d_model: wide\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["model=wrong"], config_dir=tmp_path)
    assert "wide" in caught.value.what
    assert "d_model" in caught.value.where


# --- plugins' conf packages -----------------------------------------------------


class Site:
    """Installs distributions that ship YAML, by writing their files onto sys.path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(self, name: str, configs: dict[str, str]) -> None:
        package = self.path / name
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "plugin.py").write_text(
            "from subquad import hookimpl\n@hookimpl\ndef subquad_provide_config_packages():\n"
            f"    return ['{name}.conf']\n"
        )
        conf = package / "conf"
        conf.mkdir()
        (conf / "__init__.py").write_text("")
        for path, text in configs.items():
            (conf / path).parent.mkdir(exist_ok=True)
            (conf / path).write_text(text)
        metadata = self.path / f"{name}-2.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
        (metadata / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{name} = {name}.plugin\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(path)
    load_registry.cache_clear()
    yield Site(path)
    load_registry.cache_clear()
    for module in [name for name in sys.modules if name.startswith("acme")]:
        del sys.modules[module]


RECIPE = "defaults: [/mixer@mixers.a: window]\nname: acme\nschedule: [a]\n"


def test_a_plugins_recipes_join_the_search_path(site: Site) -> None:
    site.install("acme_one", {"model/acme.yaml": RECIPE})
    assert load_config(["model=acme"]).model.name == "acme"


def test_two_plugins_that_ship_one_path_are_an_error_that_names_both(site: Site) -> None:
    site.install("acme_one", {"model/acme.yaml": RECIPE})
    site.install("acme_two", {"model/acme.yaml": RECIPE})
    with pytest.raises(PluginError) as caught:
        load_config(["model=transformer"])
    assert "model/acme.yaml" in caught.value.what
    assert caught.value.where == "acme_one 2.0 and acme_two 2.0"


def test_a_plugin_cannot_replace_our_recipe(site: Site) -> None:
    site.install("acme_one", {"model/scout_mamba.yaml": RECIPE})
    with pytest.raises(PluginError) as caught:
        load_config(["model=transformer"])
    assert "acme_one 2.0" in caught.value.where


def test_a_config_package_that_is_missing_names_its_plugin(site: Site) -> None:
    site.install("acme_one", {})
    source = site.path / "acme_one" / "plugin.py"
    source.write_text(source.read_text().replace("acme_one.conf", "acme_one.gone"))
    with pytest.raises(PluginError) as caught:
        load_config(["model=transformer"])
    assert "acme_one.gone" in caught.value.what
    assert "acme_one" in caught.value.where


@pytest.mark.parametrize(
    "config",
    [
        "class Config:\n    width: int = 4",
        "@dataclass\nclass Config:\n    activation: Callable[[float], float] = abs",
    ],
    ids=["no dataclass", "a function"],
)
def test_a_mixer_whose_config_cannot_be_yaml_is_named_and_stops_nobody_else(site: Site, config: str) -> None:
    site.install("acme_one", {})
    (site.path / "acme_one" / "plugin.py").write_text(
        "from collections.abc import Callable\nfrom dataclasses import dataclass\n"
        f"from subquad import Growth, MixerSpec, hookimpl\n{config}\n"
        "@hookimpl\ndef subquad_provide_mixers():\n"
        "    return [MixerSpec(name='acme', summary='s', paper='p', config=Config, build='x:y',"
        " work_growth=Growth.LINEAR, carry_growth=Growth.LINEAR)]\n"
    )
    with pytest.warns(UserWarning, match=r"the config of mixer 'acme' \(acme_one 2\.0\) is left out"):
        assert load_config(["model=transformer"]).model.name == "transformer"


def test_a_mixers_yaml_in_a_folder_of_ones_own_wins_over_the_defaults_of_the_dataclass(tmp_path: Path) -> None:
    (tmp_path / "mixer").mkdir()
    (tmp_path / "mixer" / "window.yaml").write_text("mixer: window\nwindow: 98\n")
    config = load_config(["model=transformer", "+mixer@model.mixers.w=window"], config_dir=tmp_path)
    assert config.model.mixers["w"]["window"] == 98


def test_a_packages_yaml_wins_over_the_defaults_of_the_dataclass(site: Site) -> None:
    site.install("acme_one", {"mixer/window.yaml": "mixer: window\nwindow: 99\n"})
    assert load_config(["model=transformer", "+mixer@model.mixers.w=window"]).model.mixers["w"]["window"] == 99


# --- safety ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("+data._target_=os.system", "data._target_"),
        ("+model.mixers.mamba.deep={list:[{_target_:os.system}]}", "model.mixers.mamba.deep.list[0]._target_"),
        ("+optimizer._target_=torch.optim.SGD", "optimizer._target_"),
        ("callbacks=[{_target_:os.system}]", "callbacks[0]._target_"),
        ("callbacks=[{_target_:lightningx.evil}]", "callbacks[0]._target_"),
        ("callbacks=[{_target_:lightning.pytorch.callbacks.Timer,a:{_target_:os.system}}]", "callbacks[0].a._target_"),
        ("callbacks=[{_target_:7}]", "callbacks[0]._target_"),
    ],
)
def test_code_may_be_named_only_below_callbacks_and_there_only_lightnings(override: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([override])
    assert caught.value.where == where


def test_a_lightning_callback_may_be_named() -> None:
    target = "lightning.pytorch.callbacks.Timer"
    assert load_config([f"callbacks=[{{_target_:{target}}}]"]).callbacks == [{"_target_": target}]


# --- errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "kind", "where", "mend"),
    [
        (["model=scout_mmba"], NotFoundError, "model=scout_mmba", "did you mean 'scout_mamba'?"),
        (["trainer.max_stps=3"], ConfigError, "trainer.max_stps", "did you mean 'max_steps'?"),
        (["trainr.max_steps=3"], ConfigError, "trainr", "did you mean 'trainer'?"),
        (["+nonsense=1"], ConfigError, "nonsense", "a run has the keys"),
        (["batch_size=2"], ConfigError, "batch_size", "did you mean 'trainer.batch_size' or 'budget.batch_size'?"),
        (["lr=1e-3"], ConfigError, "lr", "did you mean 'optimizer.lr'?"),
        (["scout_swa"], ConfigError, "the command line", "did you mean model=scout_swa?"),
        (["nonsense"], ConfigError, "the command line", "such as model=scout_mamba"),
        (["trainer.max_steps=many"], ConfigError, "trainer.max_steps", "type"),
        (["model.mixers.mamba.expnd=3"], ConfigError, "model.mixers.mamba.expnd", "did you mean 'expand'?"),
        (["model.mixers.mamba.expand=wide"], ConfigError, "model.mixers.mamba.expand", "type"),
        (["model.mixers.mamba.mixer=mmba"], NotFoundError, "model.mixers.mamba.mixer", "did you mean 'mamba'?"),
        (["mixer@model.mixers.mamba=mmba"], NotFoundError, "model/scout_mamba.yaml", "did you mean 'mamba'?"),
        (["~model.mixers.mamba.mixer"], ConfigError, "model.mixers.mamba", "+mixer@model.mixers.mamba=NAME"),
        (["model.mixers.mamba.channel_mixer=3"], ConfigError, "model.mixers.mamba.channel_mixer", "d_hidden"),
        (["model.schedule=[mamba,gone]"], ConfigError, "model.schedule", "model.mixers.gone"),
        (["model.num_layers=0"], ConfigError, "model.num_layers", "1 or more"),
        (["data=synthetc"], NotFoundError, "data=synthetc", "did you mean 'synthetic'?"),
        (["data.name=synthetc"], NotFoundError, "data.name", "did you mean 'synthetic'?"),
        (["data.fils=[a]"], ConfigError, "data.fils", "the keys are"),
        (["data=hf"], ConfigError, "data.path", "data.path=VALUE"),
        (["data=text_files"], ConfigError, "data.files", "data.files="),
        (["~data"], ConfigError, "data", "python_source"),
        (["optimizer=adam"], NotFoundError, "optimizer=adam", "did you mean 'adamw'?"),
        (["optimizer.lr=fast"], ConfigError, "optimizer.lr", "type"),
        (["kernel.softmax_atention=x"], NotFoundError, "kernel.softmax_atention", "did you mean 'softmax_attention'?"),
        (["kernel.softmax_attention=referenc"], NotFoundError, "kernel.softmax_attention", "did you mean 'reference'?"),
        (["deny=[nothing]"], NotFoundError, "deny[0]", "softmax_attention/reference"),
        (["run_dir=${nowhere}"], ConfigError, "run_dir", ""),
        (["seed=[1"], ConfigError, "command line", "key=value"),
        (["just_words"], ConfigError, "command line", "key=value"),
    ],
    ids=str,
)
def test_a_wrong_configuration_says_where_and_how_to_mend_it(
    overrides: list[str], kind: type[Exception], where: str, mend: str
) -> None:
    with pytest.raises(kind) as caught:
        load_config(overrides)
    error = caught.value
    assert isinstance(error, ConfigError | NotFoundError)
    assert where in error.where
    assert mend in error.mend
    assert len(str(error).splitlines()) == 3


def test_an_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(NotFoundError) as caught:
        load_config(["model=gpt"])
    assert all(model in caught.value.mend for model in MODELS)


# --- Hydra's own state -----------------------------------------------------------


def stored(repo: dict[str, object], prefix: str = "") -> Iterator[str]:
    """The paths of everything in Hydra's ConfigStore."""
    for name, entry in repo.items():
        yield prefix + name
        if isinstance(entry, dict):
            yield from stored(entry, f"{prefix}{name}/")


def test_composing_leaves_hydras_global_state_as_it_was() -> None:
    store, instance = ConfigStore.instance(), GlobalHydra.instance()
    before = sorted(stored(store.repo))
    load_config(["model=transformer"])
    assert ConfigStore.instance() is store
    assert GlobalHydra.instance() is instance
    assert not instance.is_initialized()
    assert sorted(stored(store.repo)) == before


def test_composing_works_inside_another_hydra_program(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("own: 1\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "theirs.yaml").write_text("depth: 2\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        ours = load_config(["model=transformer"])
        theirs = compose("theirs", ["+model=theirs"])
    assert ours.model.name == "transformer"
    assert OmegaConf.to_container(theirs) == {"own": 1, "model": {"depth": 2}}


def test_state_is_restored_after_an_error() -> None:
    store = ConfigStore.instance()
    with pytest.raises(NotFoundError):
        load_config(["model=gpt"])
    assert ConfigStore.instance() is store
    assert not GlobalHydra.instance().is_initialized()
