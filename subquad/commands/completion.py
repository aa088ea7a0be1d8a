"""completion: a bash function that completes verbs itself and asks Hydra for the rest."""

from __future__ import annotations

from subquad.__main__ import VERBS
from subquad.commands.flags import flags

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
        generate)
            choices="run= prompt= prompts= out= batch_size= max_tokens= temperature= top_k= top_p= min_p="
            COMPREPLY=($(compgen -W "$choices repetition_penalty= stop= stop_ids= seed= dtype= cuda_graph=" -- "$word"))
            ;;
        export)
            COMPREPLY=($(compgen -W "run= format= out=" -- "$word"))
            ;;
        calibrate)
            COMPREPLY=($(compgen -W "budget_s= target= fit= operators= seed=" -- "$word"))
            ;;
        measure)
            choices="out= budget_s= target= operators= kernels= layouts= shapes= seed="
            COMPREPLY=($(compgen -W "$choices" -- "$word"))
            ;;
        doctor)
            COMPREPLY=($(compgen -W "--no-checks" -- "$word"))
            ;;
        compare)
            COMPREPLY=($(compgen -W "runs= html=" -- "$word"))
            ;;
        bench)
            choices="operator= target= kernels= dtype= shapes= options= plot= models= contexts= batch_sizes="
            COMPREPLY=($(compgen -W "$choices tokens= cuda_graph= overrides= budget_s= out=" -- "$word"))
            ;;
        evaluate)
            choices="run= suite= lengths= sizes= samples= batch_size= tasks= seed="
            COMPREPLY=($(compgen -W "$choices" -- "$word"))
            ;;
        proxy)
            COMPREPLY=($(compgen -W "run= candidates= proxy= steps= learning_rate= batches= out= seed=" -- "$word"))
            ;;
        plan)
            if (( ${#words[@]} == 2 )) || { (( ${#words[@]} == 3 )) && [[ -n $word ]]; }; then
                COMPREPLY=($(compgen -W "diff" -- "$word"))
            fi
            ;;
        plugins)
            choices="--json new check"
            if [[ ${words[2]} == check ]]; then choices="target= config= d_model= seed= only= json="; fi
            if [[ ${words[2]} == new ]]; then choices="into="; fi
            COMPREPLY=($(compgen -W "$choices" -- "$word"))
            ;;
    esac
}
# A value may hold '=' and ':'; bash would split words there.
COMP_WORDBREAKS=${COMP_WORDBREAKS//[=:]}
complete -o nospace -o default -F _subquad_complete subquad
"""


def run(arguments: list[str]) -> int:
    """Print the script.  Raises: ConfigError for another shell."""
    if any(argument in ("--help", "-h") for argument in arguments):
        print(HELP)
        return 0
    flags("completion", arguments, [])
    print(SCRIPT.replace("VERBS", " ".join(VERBS)), end="")
    return 0
