"""Linear maps in float8: torchao's, in place of those whose shapes allow it.

Weights stay float32 and keep their names, so that checkpoints are those of any run; each product casts its operands to
float8 with scales of the moment. Not yet run on a GPU.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import torch
from torch import nn

from subquad.errors import ConfigError
from subquad.model.language_model import LanguageModel
from subquad.schema import RunConfig

OFF = "none"
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
"""torchao's names: one scale a tensor; one a row; one a row, with the weights' gradients in bfloat16."""
MULTIPLE = 16
"""Of every size of a float8 product (cuBLAS)."""
CAPABILITY = (8, 9)
"""The first CUDA devices with float8 products: Ada; Hopper is 9.0."""
INSTALL = "pip install 'subquad[fp8]'"


def check_fp8(config: RunConfig, device: torch.device) -> None:
    """Refuse what cannot compute in float8.  Raises: ConfigError."""
    trainer = config.trainer
    if trainer.fp8 == OFF:
        return
    where = f"trainer.fp8={trainer.fp8}"
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(what="torchao is not installed", where=where, mend=f"{INSTALL}, or trainer.fp8=none")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        have = "the CPU" if device.type != "cuda" else torch.cuda.get_device_name(device)
        raise ConfigError(
            what=f"{have} has no float8 products",
            where=where,
            mend="use an Ada, Hopper or later GPU, or trainer.fp8=none",
        )
    if trainer.precision == "float32":
        raise ConfigError(
            what="float8 products are those of a bfloat16 run", where=where, mend="leave trainer.precision out"
        )
    if trainer.tensor_parallel > 1:
        raise ConfigError(
            what="float8 maps that ranks share were never tried", where=where, mend="use trainer.tensor_parallel=1"
        )
    tokens = trainer.batch_size * trainer.seq_len // trainer.context_parallel
    if tokens % MULTIPLE:
        raise ConfigError(
            what=f"a device has {tokens} tokens at a time, no multiple of {MULTIPLE}",
            where=where,
            mend="choose another trainer.batch_size or trainer.seq_len",
        )


def convert_to_fp8(model: LanguageModel, recipe: str, *, emulate: bool = False) -> list[str]:
    """Exchange the linear maps of blocks whose widths are multiples of 16, in place; their names.

    The lm_head stays, and so do maps that a mixer computes without calling the module. With `emulate` float8 is only
    rounded to, on any device.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    converted: list[str] = []

    def is_eligible(linear: nn.Module, name: str) -> bool:
        assert isinstance(linear, nn.Linear)
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            return False
        converted.append(name)
        return True

    convert_to_float8_training(model.blocks, config=config, module_filter_fn=is_eligible)
    return converted
