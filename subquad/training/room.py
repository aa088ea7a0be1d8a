"""Whether a run can fit at all: a lower bound of its memory, asked before anything is allocated."""

from __future__ import annotations

import os

import torch

from subquad.compiler.run_shapes import local_tokens
from subquad.errors import ConfigError
from subquad.model.build import build_model
from subquad.schema import CHUNKED, RunConfig

BYTES_PER_PARAMETER = 8
"""A float32 weight and its gradient; what the optimizer keeps comes on top."""


def check_room(config: RunConfig, device: torch.device) -> None:
    """Refuse a model, or a batch, that is larger than all of the device's memory.  Raises: ConfigError.

    Bounds:  8 parameters  for weights and gradients, over the devices that share them out (fsdp);
             4 batch_size seq_len vocab_size  for the logits of a device, unless they come in chunks.
    """
    room = _memory_of(device)
    trainer, vocab_size = config.trainer, config.model.vocab_size
    rows, tokens = local_tokens(config)
    logits = 0 if trainer.loss == CHUNKED else 4 * rows * tokens * vocab_size
    if logits > room:
        raise _too_large(
            f"the logits of {rows} x {tokens} tokens", logits, room, "trainer.batch_size",
            "use trainer.loss=chunked, or a smaller trainer.batch_size with trainer.accumulate in its place",
        )  # fmt: skip
    # The embedding and the widest matrix, before torch is asked to count what overflows.
    widest = config.model.d_model * max(config.model.d_model, vocab_size)
    if 4 * widest > room:
        raise _too_large("a matrix of the model", 4 * widest, room, "model.d_model", "use a smaller model")
    try:
        parameters = sum(parameter.numel() for parameter in build_model(config.model, device="meta").parameters())
    except RuntimeError as error:  # what torch says of sizes that are negative, or overflow
        raise ConfigError(
            what=f"the model cannot be built: {str(error).splitlines()[0]}",
            where="model",
            mend="look for a size in it that is negative or far too large",
        ) from error
    ranks = trainer.devices if trainer.strategy == "fsdp" or trainer.tensor_parallel > 1 else 1
    need = parameters * BYTES_PER_PARAMETER // ranks
    if need > room:
        shared = f", over {ranks} devices," if ranks > 1 else ""
        raise _too_large(
            f"a model of {parameters:,} parameters and its gradients{shared}",
            need, room, "model", "use a smaller model, or trainer.strategy=fsdp with more trainer.devices",
        )  # fmt: skip


def _too_large(what: str, need: int, room: int, where: str, mend: str) -> ConfigError:
    return ConfigError(
        what=f"{what} take {need / 2**30:,.1f} GiB at least, and the device has {room / 2**30:,.1f}",
        where=where,
        mend=mend,
    )


def _memory_of(device: torch.device) -> int:
    """All bytes of the device's memory, used or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
