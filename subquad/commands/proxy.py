"""proxy: measure on a trained run what other mixers would lose in each layer."""

from __future__ import annotations

import yaml

from subquad.commands.key_help import keys_in_help
from subquad.commands.key_values import key_values
from subquad.commands.table import table
from subquad.component_config import typed_config
from subquad.errors import ConfigError
from subquad.schema import ProxyConfig

HELP = """Measure what each layer of a trained run loses with other mixers, and write a file for budget.quality.

  python -m subquad proxy run=RUN_DIR candidates=[window,mamba] out=quality.json
  python -m subquad train model=auto_hybrid budget.quality=quality.json budget.carry_bytes=2e6

{keys}

Every candidate is built anew in every layer, distilled there against the trained mixer, and judged on held-out text.
replace_one_kl  nats per token by which the predictions of the whole model move
gauss_newton    half the squared change of the loss to first order, in nats^2: no second pass over the model
local_error     share of the layer's output that is missed"""


def run(arguments: list[str]) -> int:
    """Measure what `key=value` arguments say."""
    if any(argument in ("--help", "-h") for argument in arguments):
        print(HELP.format(keys=keys_in_help(ProxyConfig)))
        return 0
    request = proxy_config(arguments)
    from subquad.training.proxy import measure_proxy

    found = measure_proxy(request)
    keys = list(found.mixers)
    rows = [(str(layer), *(f"{row[key]:.5g}" for key in keys)) for layer, row in enumerate(found.loss)]
    print(table(f"{found.proxy}: {found.origin}", ("layer", *keys), rows))
    print(f"written: {request.out}")
    return 0


def proxy_config(arguments: list[str]) -> ProxyConfig:
    """Read `key=value` arguments; all but paths are YAML.  Raises: ConfigError."""
    values: dict[str, object] = dict(key_values("proxy", ProxyConfig, arguments))
    for key, text in values.items():
        if key in ("run", "out"):
            continue
        try:
            values[key] = yaml.safe_load(str(text))
        except yaml.YAMLError as error:
            raise ConfigError(
                what=f"'{text}' is not YAML: {str(error).splitlines()[0]}",
                where=f"proxy.{key}",
                mend="write lists as [a, b], in quotes",
            ) from None
    if isinstance(values.get("candidates"), str):
        values["candidates"] = [values["candidates"]]
    if not values.get("run"):
        raise ConfigError(what="no run folder is named", where="proxy.run", mend="name one: proxy run=RUN_DIR")
    return typed_config(ProxyConfig, values, where="proxy")
