"""Tasks of EleutherAI's lm-eval, asked of a run; the package is the extra `eval`.

Tasks are named as lm-eval names them, or are paths of YAML files of one's own. Most of lm-eval's are downloaded by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from subquad.errors import ConfigError, DataError, NotFoundError, suggestion
from subquad.schema import EvaluateConfig
from subquad.training.evaluation.likelihood import Likelihood
from subquad.training.evaluation.loaded_run import LoadedRun
from subquad.training.evaluation.synthetic import trained_on
from subquad.training.evaluation.text import Record
from subquad.training.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.model import LM

MAX_NEW_TOKENS = 256
"""lm-eval's own default where a task does not say."""


def evaluate_lm_eval(run: LoadedRun, request: EvaluateConfig) -> Record:
    """Run tasks on the run's model, zero-shot unless the task says otherwise.

    Raises: ConfigError without lm-eval, or for a run whose tokens are no text; NotFoundError; DataError.
    """
    try:
        from lm_eval import __version__
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ConfigError(
            what=f"{error.name} is not installed", where="evaluate.suite=lm_eval", mend="pip install 'subquad[eval]'"
        ) from None
    trained = trained_on(run.config)
    if trained is not None:
        raise ConfigError(
            what=f"the run knows the symbols of {trained.task}, and no text",
            where="evaluate.suite=lm_eval",
            mend="name a run that was trained on text",
        )
    manager = TaskManager()
    for name in request.tasks:
        if not name.endswith(".yaml") and not manager.match_tasks([name]):
            raise NotFoundError(
                what=f"lm-eval {__version__} has no task '{name}'",
                where="evaluate.tasks",
                mend=f"{suggestion(name, manager.all_tasks)}see `lm-eval ls tasks`, or name a YAML file by its path",
            )
    max_len = max(request.lengths, default=run.config.model.context_len)
    likelihood = Likelihood(run, load_tokenizer(run.folder.path), max_len)
    try:
        found: Any = simple_evaluate(
            model=language_model(likelihood), tasks=list(request.tasks), limit=request.samples or None,
            task_manager=manager, log_samples=False, bootstrap_iters=1000, random_seed=request.seed,
            numpy_random_seed=request.seed, torch_random_seed=request.seed, fewshot_random_seed=request.seed,
        )  # fmt: skip
    except OSError as error:  # also what a missing network and a missing data set raise
        raise DataError(
            what=f"a task's data cannot be read: {str(error).splitlines()[0]}",
            where="evaluate.tasks",
            mend="check the network, or the paths in the task's YAML",
        ) from None
    return {
        "version": __version__,
        "samples": request.samples,
        "max_len": max_len,
        "seed": request.seed,
        "tasks": {task: metrics_of(values) for task, values in found["results"].items()},
    }


def language_model(likelihood: Likelihood) -> LM:
    """The run as lm-eval wants it."""
    from lm_eval.api.model import LM

    class Run(LM):  # type: ignore[misc]  # lm-eval is not installed where types are checked
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [tuple(scored) for scored in likelihood.of_continuations([r.args for r in requests])]  # type: ignore[misc]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return likelihood.of_texts([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [_generated(likelihood, *request.args) for request in requests]

    return Run()


def metrics_of(values: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Metric to value and standard error; lm-eval's keys are `metric,filter` and `metric_stderr,filter`."""
    found = {}
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float) or not kind:
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric} ({kind})"
        found[name] = (float(value), float(error) if isinstance(error, int | float) else None)
    return found


def _generated(likelihood: Likelihood, context: str, settings: dict[str, Any]) -> str:
    if settings.get("do_sample"):
        raise ConfigError(
            what="the task samples its answers, and this adapter takes the likeliest token each time",
            where="evaluate.tasks",
            mend="set do_sample: false in the task's generation_kwargs",
        )
    stops = settings.get("until") or []
    stops = [stops] if isinstance(stops, str) else list(stops)
    return likelihood.continuation(context, stops, int(settings.get("max_gen_toks", MAX_NEW_TOKENS)))
