"""Where the time of a training step goes, by kind of work: python tools/profile_step.py OUT.json [key=value ...].

The arguments are those of `subquad train`; the model, its plan, precision and optimizer are the run's own, the tokens
are random. Times are device time of kernels (torch.profiler) over three steps after two warm-up steps, in ms a step;
`step_ms` is wall time. CUDA only. Record the hardware and the versions beside whatever is quoted.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from command_line import OF_TRAIN, told, words_of
from torch.profiler import ProfilerActivity, profile

from subquad import load_config
from subquad.model.build import build_model
from subquad.training.compilation import compiled, uses_bfloat16
from subquad.training.module import summed_cross_entropy
from subquad.training.optimizers import build_optimizer

GROUPS = (
    ("optimizer", ("adam", "multi_tensor", "lpnorm")),
    ("matrix products", ("gemm", "cutlass", "cublas", "nvjet", "splitk", "xmma")),
    ("selective scan", ("_scan", "_differentiate", "_summarise")),
    ("convolution", ("_convolve",)),
    ("segment attention", ("_forward_kernel", "_query_gradients", "_summary_gradients", "_add_to_tokens")),
    ("rotary", ("_rotate",)),
    ("loss", ("softmax", "nll", "cross_entropy", "log_softmax")),
    ("norms", ("norm", "layer_norm", "rms")),
    ("embedding", ("embedding", "indexselect", "index_select")),
    ("compiled pointwise", ("triton_",)),
    ("pointwise and copies", ("elementwise", "copy", "cat", "fill", "reduce", "memcpy", "memset")),
)


def group_of(kernel: str) -> str:
    """The first group one of whose words is in the kernel's name."""
    name = kernel.lower()
    return next((group for group, words in GROUPS if any(word in name for word in words)), "other")


def main(out: Path, overrides: list[str]) -> None:
    config = load_config(overrides)
    trainer = config.trainer
    config.model.vocab_size = config.model.vocab_size or 256
    config.model.context_len = config.model.context_len or trainer.seq_len
    torch.manual_seed(config.seed)
    model = build_model(config.model).cuda()
    model.activation_checkpointing = trainer.activation_checkpointing
    started = time.perf_counter()
    model, plan = compiled(model, config, None, packed=False)
    plan_s = time.perf_counter() - started
    if config.compile:
        model.compile()
    optimizer = build_optimizer(config.optimizer, model.parameter_groups)
    shape = (trainer.batch_size, trainer.seq_len)
    tokens, targets = (torch.randint(config.model.vocab_size, shape, device="cuda") for _ in range(2))

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=uses_bfloat16(config)):
            nats, count = summed_cross_entropy(model(tokens), targets)
        (nats / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    started = time.perf_counter()
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    first_steps_s = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    step_s = (time.perf_counter() - started) / 5
    peak_bytes = torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    groups: dict[str, float] = defaultdict(float)
    kernels: dict[str, list[float]] = {}
    for event in recorded.key_averages():
        milliseconds = event.self_device_time_total / 3000
        if milliseconds > 0:
            groups[group_of(event.key)] += milliseconds
            kernels[event.key[:120]] = [milliseconds, event.count / 3]
    ordered = dict(sorted(groups.items(), key=lambda item: -item[1]))
    record = {
        "overrides": overrides,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "plan_s": plan_s,
        "first_steps_s": first_steps_s,
        "step_ms": 1e3 * step_s,
        "tokens_per_s": shape[0] * shape[1] / step_s,
        "peak_gib": peak_bytes / 2**30,
        "groups_ms": ordered,
        "kernels_ms_calls": dict(sorted(kernels.items(), key=lambda item: -item[1][0])[:60]),
        "kernels_chosen": sorted({f"{choice.operator}/{choice.chosen}" for choice in plan.choices if choice.used}),
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['tokens_per_s']:,.0f} tokens/s, {record['step_ms']:.1f} ms a step, {record['peak_gib']:.1f} GiB")
    for group, milliseconds in ordered.items():
        print(f"{milliseconds:9.2f} ms  {group}")


if __name__ == "__main__":
    (place,), words = words_of(__doc__, sys.argv[1:], "OUT.json", keys=OF_TRAIN)
    with told():
        main(Path(place), words)
