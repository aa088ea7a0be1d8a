"""completion: a bash function that completes verbs itself and asks Hydra for the rest."""

from __future__ import annotations

import dataclasses

from subquad.__main__ import VERBS
from subquad.commands.check_plugin import CheckConfig
from subquad.commands.flags import flags
from subquad.commands.new_plugin import NewPluginConfig
from subquad.schema import (
    BenchConfig,
    CalibrateConfig,
    CompareConfig,
    DecodingBenchConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    MeasureConfig,
    ProxyConfig,
)

CONFIGS: dict[str, tuple[type, ...]] = {
    "bench": (BenchConfig, DecodingBenchConfig), "calibrate": (CalibrateConfig,), "compare": (CompareConfig,),
    "evaluate": (EvaluateConfig,), "export": (ExportConfig,), "generate": (GenerateConfig,),
    "measure": (MeasureConfig,), "proxy": (ProxyConfig,),
}  # fmt: skip
"""Verbs that take keys of their own and nothing else."""

HELP = """Print the completion of verbs, groups and keys for bash.

  eval "$(subquad completion)"           # in this shell; in ~/.bashrc for all"""

SCRIPT = """\
# bash completion of subquad:  eval "$(subquad completion)"
_subquad_complete() {
    local line=${COMP_LINE:0:$COMP_POINT} words word=""
    read -ra words <<< "$line"
    if [[ $line != *" " ]]; then word=${words[${#words[@]} - 1]}; fi
    if (( ${#words[@]} == 1 )) || { (( ${#words[@]} == 2 )) && [[ -n $word ]]; }; then
        COMPREPLY=($(compgen -W "VERBS" -- "$word"))
        return
    fi
    local verb=${words[1]} choices
    case $verb in
        train|explain|warmup)
            # Hydra expects a program's name and its arguments: the verb is left out.
            line="subquad ${line#*"${words[0]}"*"$verb"}"
            choices=$(COMP_LINE=$line COMP_POINT=${#line} "${words[0]}" "$verb" -sc query=bash 2>/dev/null)
            COMPREPLY=($(compgen -W "$choices" -- "$word"))
            ;;
CASES        doctor)
            COMPREPLY=($(compgen -W "--no-checks" -- "$word"))
            ;;
        plan)
            if (( ${#words[@]} == 2 )) || { (( ${#words[@]} == 3 )) && [[ -n $word ]]; }; then
                COMPREPLY=($(compgen -W "diff" -- "$word"))
            fi
            ;;
        plugins)
            choices="--json new check"
            if [[ ${words[2]} == check ]]; then choices="CHECK"; fi
            if [[ ${words[2]} == new ]]; then choices="NEW"; fi
            COMPREPLY=($(compgen -W "$choices" -- "$word"))
            ;;
    esac
}
# A value may hold '=' and ':'; bash would split words there.
COMP_WORDBREAKS=${COMP_WORDBREAKS//[=:]}
complete -o nospace -o default -F _subquad_complete subquad
"""
CASE = """\
        {verb})
            COMPREPLY=($(compgen -W "{keys}" -- "$word"))
            ;;
"""


def run(arguments: list[str]) -> int:
    """Print the script.  Raises: ConfigError for another shell."""
    if any(argument in ("--help", "-h") for argument in arguments):
        print(HELP)
        return 0
    flags("completion", arguments, [])
    cases = "".join(CASE.format(verb=verb, keys=_keys(*configs)) for verb, configs in CONFIGS.items())
    words = {"VERBS": " ".join(VERBS), "CASES": cases, "CHECK": _keys(CheckConfig), "NEW": _keys(NewPluginConfig)}
    script = SCRIPT
    for name, text in words.items():
        script = script.replace(name, text)
    print(script, end="")
    return 0


def _keys(*config_classes: type) -> str:
    """What one may type of each key."""
    return " ".join(dict.fromkeys(f"{field.name}=" for one in config_classes for field in dataclasses.fields(one)))
