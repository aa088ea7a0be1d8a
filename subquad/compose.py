"""Where YAML meets Python: Hydra composes what packages and people wrote, and one function makes it typed.

    plugins' conf packages ─┐
    subquad.conf ───────────┼─ Hydra ─▶ DictConfig ─ to_run_config ─▶ RunConfig
    --config-dir, overrides ┘

Past `to_run_config` nobody sees a DictConfig. Only this module and `subquad.commands` import Hydra.
"""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import ClassVar

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from subquad.component_config import defaults_of, typed_config
from subquad.contracts import ComponentKind, ComponentSpec, MixerSpec
from subquad.errors import ConfigError, NotFoundError, PluginError, SubquadError, suggestion
from subquad.registry import Registry, load_registry
from subquad.schema import AUTO, ChannelMixerConfig, RunConfig
from subquad.sharing import sharing_by_layer

CONFIG_PACKAGE = "subquad.conf"
SCHEMA_NAME = "run_schema"
"""What a root config names first in its defaults list."""
VERSION_BASE = "1.3"
OPEN_KEYS = ("model.mixers", "data", "optimizer", "kernel")
"""Mappings whose keys depend on what is installed: Hydra lets anything in, `to_run_config` checks it."""
TARGET_PREFIXES = ("lightning.pytorch.callbacks.",)
"""Code that a recipe may name below `callbacks`; a recipe is data, which may come from anywhere."""
HYDRA_PREFIXES = ("hydra.", "hydra_plugins.", "logging.", "colorlog.")
"""Code that a recipe may name below `hydra`: launchers, sweepers and callbacks that were installed as such; logging."""
LAUNCHERS = {
    "joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit", "ray": "ray", "ray_aws": "ray",
}  # fmt: skip
"""Hydra's launchers that an extra of the distribution installs."""


def load_config(
    overrides: Sequence[str] = (), *, config_name: str = "train", config_dir: str | Path | None = None
) -> RunConfig:
    """Compose a run as the command line does: `load_config(["model=scout_mamba", "trainer.max_steps=20"])`.

    `config_dir` is a folder of one's own recipes, which joins the search path. Hydra's global state is left as found,
    so that this may be called inside another Hydra program. Raises: SubquadError.
    """
    registry = load_registry()
    with composition_errors(registry), hydra_for(registry, config_dir) as own:
        if own is not None:
            InstalledConfigs.sources += (("config_dir", f"file://{own}"),)
        GlobalHydra.instance().clear()
        with initialize_config_module(CONFIG_PACKAGE, job_name="subquad", version_base=VERSION_BASE):
            composed = compose(config_name, list(overrides))
        return to_run_config(composed, registry)


def to_run_config(composed: DictConfig, registry: Registry | None = None) -> RunConfig:
    """Turn a composed configuration into dataclasses, and check whatever only the registry can.

    Raises: ConfigError for a wrong key, type or relation, and for code named where it may not be; NotFoundError for a
    mixer, component, operator or kernel that is not installed.
    """
    registry = registry or load_registry()
    with composition_errors(registry):
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    assert isinstance(values, dict)
    _refuse_missing(values)
    _refuse_odd_text(values)
    refuse_targets({key: value for key, value in values.items() if key != "callbacks"}, allowed=())
    refuse_targets(values.get("callbacks"), path="callbacks", allowed=TARGET_PREFIXES)
    with composition_errors(registry):
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), values))
    assert isinstance(config, RunConfig)
    if config.model.init_from is not None:
        from subquad.model.import_layout import with_layout  # loads torch, which few compositions need

        config.model = with_layout(config.model)
    _check_mixers(config, registry)
    _check_sharing(config, registry)
    _check_candidates(config, registry)
    _check_component("data", config.data, registry)
    _check_component("optimizer", config.optimizer, registry)
    _check_kernels(config, registry)
    return config


def refuse_targets(
    values: object, *, allowed: tuple[str, ...], path: str = "", keys: tuple[str, ...] = ("_target_",)
) -> None:
    """Refuse code that is named by one of `keys`, unless it starts with an allowed prefix.

    Raises: ConfigError with the key's path.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            here = f"{path}.{key}" if path else str(key)
            if key in keys and not (isinstance(value, str) and value.startswith(allowed)):
                raise ConfigError(
                    what=f"a recipe may not name the code '{value}' here",
                    where=here,
                    mend=f"name something below {' or '.join(allowed)}" if allowed
                    else "remove it: mixers, kernels, data and optimizers are named by their registry key",
                )  # fmt: skip
            refuse_targets(value, allowed=allowed, path=here, keys=keys)
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            refuse_targets(value, allowed=allowed, path=f"{path}[{index}]", keys=keys)


def _refuse_missing(values: object, path: str = "") -> None:
    """Refuse a value that a recipe left to the user and the user did not give."""
    if values == "???":
        raise ConfigError(what=f"{path} has no value", where=path, mend=f"give it one: {path}=VALUE")
    if isinstance(values, Mapping):
        for key, value in values.items():
            _refuse_missing(value, f"{path}.{key}" if path else str(key))


def _refuse_odd_text(values: object, path: str = "") -> None:
    """Refuse text that no file can hold and no path may have: half a character (a surrogate), or a zero byte."""
    if isinstance(values, str) and ("\0" in values or any("\ud800" <= letter <= "\udfff" for letter in values)):
        shown = values.encode("unicode_escape").decode()
        raise ConfigError(what=f"the text '{shown}' is no UTF-8 without zeros", where=path, mend="write it in UTF-8")
    if isinstance(values, Mapping):
        for key, value in values.items():
            _refuse_odd_text(key, path or "the configuration")
            _refuse_odd_text(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            _refuse_odd_text(value, f"{path}[{index}]")


def refuse_hydra_targets(composed: DictConfig) -> None:
    """Hydra builds callbacks, launchers and log handlers before a job begins: look at their names before it does."""
    values = OmegaConf.to_container(composed.hydra, resolve=False)
    refuse_targets(values, allowed=HYDRA_PREFIXES, path="hydra", keys=("_target_", "()", "class"))


def register_configs(registry: Registry, own: Path | None = None) -> None:
    """Tell Hydra what is installed: the schema of a run, the defaults of every mixer and component, the conf packages.

    Defaults that a package ships as YAML, or a person keeps in a folder of their own, are taken from there.
    Raises: PluginError when two packages ship the same path.
    """
    written = set(configs_by_path(registry)) | (set() if own is None else own_paths(own))
    schema = OmegaConf.structured(RunConfig)
    for key in OPEN_KEYS:
        OmegaConf.set_struct(OmegaConf.select(schema, key), False)
    store = ConfigStore.instance()
    store.store(name=SCHEMA_NAME, node=schema, provider="subquad")
    declared: list[tuple[str, str, str, MixerSpec | ComponentSpec]] = [
        *(("mixer", mixer.name, "mixer", mixer) for mixer in registry.mixers.values()),
        *((kind, name, "name", component) for (kind, name), component in registry.components.items()),
    ]
    for group, name, key, spec in declared:
        if f"{group}/{name}.yaml" not in written:
            try:
                node = {key: name, **defaults_of(spec.config)}
            except (OmegaConfBaseException, AssertionError, TypeError) as error:
                # Of one plugin; recipes that do not name it go on.
                reason = str(error).splitlines()[0]
                warnings.warn(
                    f"the config of {group} '{name}' ({registry.origin(spec)}) is left out of recipes: {reason}",
                    stacklevel=2,
                )
                continue
            store.store(group=group, name=name, node=node, provider=registry.origin(spec))
    InstalledConfigs.sources = tuple(
        (record.origin, f"pkg://{package}")
        for package, record in registry.config_packages.items()
        if package != CONFIG_PACKAGE
    )
    Plugins.instance().register(InstalledConfigs)


class InstalledConfigs(SearchPathPlugin):
    """Appends the conf packages of plugins, and a folder of the caller's own, to Hydra's search path."""

    sources: ClassVar[tuple[tuple[str, str], ...]] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra; packages come after subquad's own."""
        for provider, path in self.sources:
            search_path.append(provider, path)


@contextmanager
def hydra_for(registry: Registry, config_dir: str | Path | None = None) -> Iterator[Path | None]:
    """Lend Hydra our configs; on leaving, its singletons are what they were.

    Yields the absolute path of `config_dir`, which is checked but not yet on the search path: Hydra's own
    `--config-dir` puts it there.
    """
    # Hydra's own plugins store their configs when they are first imported, which happens once per process: before the
    # state is copied, or it would be lost with the copy.
    Plugins.instance()
    singletons, sources = Singleton._instances, InstalledConfigs.sources
    Singleton._instances = copy.deepcopy(singletons)
    try:
        own = None if config_dir is None else own_folder(config_dir, registry)
        register_configs(registry, own)
        yield own
    finally:
        Singleton._instances = singletons
        InstalledConfigs.sources = sources


def own_folder(config_dir: str | Path, registry: Registry) -> Path:
    """The absolute path of a folder of recipes.

    Raises: ConfigError when it does not exist, or holds a name that a package ships: the package's would be taken.
    """
    folder = Path(config_dir).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(
            what=f"there is no folder {folder}", where=f"--config-dir {config_dir}", mend="name a folder of YAML files"
        )
    shipped = configs_by_path(registry)
    for path in sorted(own_paths(folder) & set(shipped)):
        raise ConfigError(
            what=f"{path} is shipped by {shipped[path]} as well, which would be taken",
            where=str(folder / path),
            mend="give the file a name of its own",
        )
    return folder


def own_paths(folder: Path) -> set[str]:
    """The configs in a folder, as Hydra names them."""
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*.yaml")}


def configs_by_path(registry: Registry) -> dict[str, str]:
    """Which plugin ships a config, by its path (`model/scout_mamba.yaml`).

    Raises: PluginError when two do, or a package cannot be read.
    """
    owners: dict[str, str] = {}
    for package, record in registry.config_packages.items():
        try:
            paths = list(_yaml_paths(files(package)))
        except (ImportError, OSError) as error:
            raise PluginError(
                what=f"the config package '{package}' cannot be read: {error}",
                where=f"plugin '{record.name}' ({record.origin})",
                mend=f"repair or uninstall it (pip uninstall {record.distribution})",
            ) from None
        for path in paths:
            if path in owners:
                raise PluginError(
                    what=f"two plugins ship the config {path}",
                    where=f"{owners[path]} and {record.origin}",
                    mend="uninstall one of the two, or ask an author to rename",
                )
            owners[path] = record.origin
    return owners


def _yaml_paths(folder: Traversable, prefix: str = "") -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _yaml_paths(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name


def _check_mixers(config: RunConfig, registry: Registry) -> None:
    for key, entry in config.model.mixers.items():
        where = f"model.mixers.{key}"
        if not isinstance(entry, dict) or not isinstance(entry.get("mixer"), str):
            raise ConfigError(
                what=f"'{key}' does not say which mixer it is",
                where=where,
                mend=f"choose one with +mixer@{where}=NAME; there are {', '.join(sorted(registry.mixers))}",
            )
        spec = registry.mixer(entry["mixer"], where=f"{where}.mixer")
        fields = {name: value for name, value in entry.items() if name not in ("mixer", "channel_mixer")}
        if getattr(typed_config(spec.config, fields, where), "bidirectional", False) and spec.bidirectional:
            raise ConfigError(
                what=f"'{key}' sees later tokens, and runs learn to predict the next one",
                where=f"{where}.bidirectional",
                mend="leave it out; build_model(ModelConfig(...)) makes encoders, which you train yourself",
            )
        channel_mixer = entry.get("channel_mixer")
        if channel_mixer is not None:
            if not isinstance(channel_mixer, dict):
                raise ConfigError(
                    what=f"channel_mixer is {channel_mixer!r}",
                    where=f"{where}.channel_mixer",
                    mend="use null, or {d_hidden: N}",
                )
            typed_config(ChannelMixerConfig, channel_mixer, f"{where}.channel_mixer")


def _check_sharing(config: RunConfig, registry: Registry) -> None:
    """Whatever a layer reads, an earlier one publishes; behind an `auto` layer only the built model can tell."""
    model, typed, layers = config.model, dict[str, tuple[MixerSpec, object]](), []
    for index in range(model.num_layers if model.schedule else 0):
        key = model.schedule[index % len(model.schedule)]
        if key not in model.mixers:
            break
        if key not in typed:
            entry = model.mixers[key]
            fields = {name: value for name, value in entry.items() if name not in ("mixer", "channel_mixer")}
            spec = registry.mixer(entry["mixer"])
            typed[key] = spec, typed_config(spec.config, fields, f"model.mixers.{key}")
        layers.append((key, *typed[key]))
    sharing_by_layer(layers, d_model=model.d_model, context_len=model.context_len or config.trainer.seq_len)


def _check_candidates(config: RunConfig, registry: Registry) -> None:
    if AUTO in config.model.mixers:
        raise ConfigError(
            what=f"'{AUTO}' stands for a layer that is chosen, and cannot name an entry",
            where=f"model.mixers.{AUTO}",
            mend="give the entry another key",
        )
    for index, key in enumerate(config.model.candidates):
        if key not in config.model.mixers:
            registry.mixer(key, where=f"model.candidates[{index}]")


def _check_component(kind: ComponentKind, values: Mapping[str, object], registry: Registry) -> None:
    name = values.get("name")
    if not isinstance(name, str):
        known = sorted(name for known_kind, name in registry.components if known_kind == kind)
        raise ConfigError(what=f"no {kind} is named", where=kind, mend=f"choose {kind}=NAME: {', '.join(known)}")
    spec = registry.component(kind, name, where=f"{kind}.name")
    typed_config(spec.config, {key: value for key, value in values.items() if key != "name"}, where=kind)


def _check_kernels(config: RunConfig, registry: Registry) -> None:
    for operator, kernel in config.kernel.items():
        if operator not in registry.operators:
            raise NotFoundError(
                what=f"no operator is called '{operator}'",
                where=f"kernel.{operator}",
                mend=f"{suggestion(operator, registry.operators)}there are {', '.join(sorted(registry.operators))}",
            )
        known = [known.name for known in registry.kernels.values() if known.operator == operator]
        if kernel not in known:
            raise NotFoundError(
                what=f"{operator} has no kernel called '{kernel}'",
                where=f"kernel.{operator}",
                mend=f"{suggestion(kernel, known)}there are {', '.join(known)}",
            )
    names = {*registry.kernels, *(kernel.name for kernel in registry.kernels.values())}
    for index, denied in enumerate(config.deny):
        if denied not in names:
            raise NotFoundError(
                what=f"no kernel is called '{denied}'",
                where=f"deny[{index}]",
                mend=f"{suggestion(denied, names)}there are {', '.join(sorted(registry.kernels))}",
            )


@contextmanager
def composition_errors(registry: Registry) -> Iterator[None]:
    """Raise what goes wrong inside as a SubquadError; Hydra's own error stays its cause."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise _explained(error, registry) from error


def _explained(error: Exception, registry: Registry) -> SubquadError:
    """The error as what, where and how to mend."""
    if isinstance(error, MissingConfigException):
        return _missing_config(error, registry)
    if isinstance(error, OverrideParseException):
        if error.override and "=" not in error.override:
            return _no_assignment(error.override, registry)
        reason = next((line for line in error.message.splitlines() if not line.startswith("Error parsing")), "")
        return ConfigError(
            what=f"'{error.override}' cannot be read: {reason}",
            where="the command line",
            mend="write key=value; values with special characters need quotes: 'key=\"a, b\"'",
        )
    if isinstance(error, yaml.YAMLError):
        return _bad_yaml(error)
    detail = error.__cause__ or error.__context__ if isinstance(error, ConfigCompositionException) else error
    if isinstance(detail, OmegaConfBaseException):
        return _bad_key(error, detail, registry)
    return _in_hydras_words(error)


def _no_assignment(word: str, registry: Registry) -> ConfigError:
    """`train scout_mamba`: the name of a recipe without its group, or anything else without `=`."""
    meant = [path.removesuffix(f"/{word}.yaml") for path in configs_by_path(registry) if path.endswith(f"/{word}.yaml")]
    return ConfigError(
        what=f"'{word}' is not of the form key=value",
        where="the command line",
        mend=f"did you mean {' or '.join(f'{group}={word}' for group in meant)}?" if meant
        else "write key=value, such as model=scout_mamba",
    )  # fmt: skip


def _missing_config(error: MissingConfigException, registry: Registry) -> SubquadError:
    wanted = error.missing_cfg_file or ""
    group, _, name = wanted.rpartition("/")
    parent = re.match(r"In '([^']*)'", str(error))
    where = f"the defaults list of {parent[1]}.yaml" if parent and "/" in parent[1] else f"{group}={name}"
    if group == "mixer" and name not in registry.mixers:
        try:
            registry.mixer(name, where=where)
        except NotFoundError as not_found:
            return not_found
    options = [option.rpartition("/")[2] for option in error.options or ()]
    if not group:
        mend = "name a YAML file of the folder given by --config-dir, or leave --config-name out"
        return NotFoundError(what=f"no root config is called '{name}'", where=f"--config-name {name}", mend=mend)
    if group == "hydra/launcher" and name in LAUNCHERS:
        return NotFoundError(
            what=f"the launcher {name} is not installed", where=f"{group}={name}",
            mend=f"pip install 'subquad[{LAUNCHERS[name]}]'",
        )  # fmt: skip
    have = f"there are {', '.join(sorted(options))}" if options else "there are none"
    return NotFoundError(
        what=f"no {group} is called '{name}'",
        where=where,
        mend=f"{suggestion(name, options)}{have} (--config-dir adds a folder of your own)",
    )


def _bad_yaml(error: yaml.YAMLError) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    return ConfigError(
        what=f"a file is no YAML: {getattr(error, 'problem', None) or _first_line(str(error))}",
        where=f"{mark.name}, line {mark.line + 1}" if mark else "unknown",
        mend="correct the file",
    )


def _bad_key(error: Exception, detail: OmegaConfBaseException, registry: Registry) -> ConfigError:
    key = detail.full_key or "the configuration"
    what = _first_line(str(detail))
    if isinstance(detail, ConfigKeyError | ConfigAttributeError):
        parent, _, name = str(key).rpartition(".")
        known = _known_keys(parent)
        have = f"{parent or 'a run'} has the keys {', '.join(known)}" if known else _rest(str(error))
        meant = suggestion(name, known) or _suggestion_elsewhere(name, registry)
        return ConfigError(what=f"there is no key '{name}'", where=str(key), mend=f"{meant}{have or 'remove it'}")
    if isinstance(detail, ValidationError):
        # Inside a YAML file, only Hydra's message says which file it is.
        file = re.match(r"In '([^']*)'", str(error))
        where = f"{key} in {file[1]}.yaml" if file else str(key)
        return ConfigError(what=what, where=where, mend="give a value of the stated type")
    return ConfigError(what=what, where=str(key), mend=_rest(str(error)) or "correct the value")


def _suggestion_elsewhere(name: str, registry: Registry) -> str:
    """`did you mean 'trainer.batch_size'? ` when sections of a run have a key of that name, or one that is close."""
    sections = [(section, _known_keys(section)) for section in _known_keys("")]
    sections += [(kind, list(defaults_of(spec.config))) for (kind, _), spec in registry.components.items()]
    homes: dict[str, dict[str, None]] = {}
    for section, keys in sections:
        for key in keys:
            homes.setdefault(key, {})[f"'{section}.{key}'"] = None
    close = difflib.get_close_matches(name, homes, n=1, cutoff=0.8)
    return f"did you mean {' or '.join(homes[close[0]])}? " if close else ""


def _known_keys(parent: str) -> list[str]:
    """The keys that the schema of a run has at a dotted path; none where it does not say."""
    schema = OmegaConf.structured(RunConfig)
    try:
        node = OmegaConf.select(schema, parent) if parent else schema
    except OmegaConfBaseException:
        return []
    return [str(key) for key in node] if isinstance(node, Mapping) or OmegaConf.is_dict(node) else []


def _in_hydras_words(error: Exception) -> ConfigError:
    text = str(error)
    if text.startswith("Ambiguous value"):
        return ConfigError(
            what=_first_line(text),
            where="the command line",
            mend="add --multirun to sweep; a list is key=[a,b], a string is 'key=\"a,b\"'",
        )
    return ConfigError(what=_first_line(text), where="the configuration", mend=_rest(text) or "see --hydra-help")


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].strip() if text.strip() else "it cannot be composed"


def _rest(text: str) -> str:
    """Everything after the first line, on one line: Hydra's advice."""
    return "; ".join(line.strip() for line in text.strip().splitlines()[1:] if line.strip())
