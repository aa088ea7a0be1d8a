"""Whether foreign models gain by compile_model and stay the same: python tools/check_foreign.py OUT.json [t=1024 ...].

Sizes are b, t and width. Models of Hugging Face (where transformers is installed), of timm (where it is) and of
torch's own modules, random weights, at sizes that a GPU feels; on a CPU smaller ones. For each: the plan's choices,
what was declined, seconds of compiling, and milliseconds of a step as written and rewritten, interleaved, the median
of seven: eval without gradients and, in training mode without dropout, forward and backward. `difference` is the
largest of outputs and of gradients, relative to the largest value. One model that fails does not stop the others.
Record the hardware beside whatever is quoted.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from command_line import words_of
from torch import Tensor, nn

from subquad import compile_model
from subquad.compiler.foreign.compile_foreign import attention_calls
from subquad.compiler.options import CompileOptions

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
B, T, WIDTH, HEADS, LAYERS = (4, 2048, 1024, 16, 4) if CUDA else (1, 128, 64, 4, 2)
ROUNDS = 7
MEASURE_S = 6.0  # that choosing may time, for each plan
Built = tuple[nn.Module, dict[str, Any]]


def main(out: Path) -> None:
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else "cpu", "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "shape": {"b": B, "t": T, "width": WIDTH, "layers": LAYERS},
    }  # fmt: skip
    for name, build in CASES.items():
        for training in (False, True):
            key = f"{name}, {'training' if training else 'inference'}"
            try:
                results[key] = checked(build, training)
            except Exception as error:  # one that fails does not stop the others
                results[key] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            print(key, json.dumps(results[key]), flush=True)
            if CUDA:
                torch.cuda.empty_cache()
            out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def checked(build: Callable[[], Built], training: bool) -> dict[str, Any]:
    """Figures of one model in one mode."""
    torch.manual_seed(0)
    model, inputs = build()
    model = model.to(DEVICE, DTYPE).train(training)
    inputs = {
        name: value.to(DEVICE, DTYPE if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }

    def step() -> list[Tensor]:
        if not training:
            with torch.no_grad():
                return [_output(model(**inputs))]
        model.zero_grad()
        output = _output(model(**inputs))
        output.float().square().mean().backward()
        return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    before = [tensor.clone() for tensor in step()]
    started = time.perf_counter()
    _, plan = compile_model(model, inputs, options=CompileOptions(measure_budget_s=MEASURE_S))
    undone = [entry.reason for entry in plan.uncaptured if "undone" in entry.reason]
    compiled_s = time.perf_counter() - started
    calls = list(attention_calls(model).values())
    for call in calls:
        call.enabled = True  # whether its rewrite was undone or not
    after = [tensor.clone() for tensor in step()]

    def switched(enabled: bool) -> float:
        for call in calls:
            call.enabled = enabled
        return _milliseconds(step)

    for enabled in (False, True):
        switched(enabled)
    rounds = [(switched(False), switched(True)) for _ in range(ROUNDS)]
    written, rewritten = (statistics.median(times) for times in zip(*rounds))
    return {
        "kernels": sorted({choice.kernel for choice in plan.choices}),
        "declined": sorted({entry.reason for entry in plan.uncaptured}), "undone": bool(undone),
        "notes": list(plan.notes), "compiled_s": round(compiled_s, 2), "as_written_ms": round(written, 3),
        "rewritten_ms": round(rewritten, 3), "ratio": round(rewritten / written, 3),
        "spread_ms": [round(max(times) - min(times), 3) for times in zip(*rounds)],
        "difference_output": _difference(before[:1], after[:1]),
        "difference_gradients": _difference(before[1:], after[1:]),
    }  # fmt: skip


def _output(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.logits if "logits" in output else output.last_hidden_state  # type: ignore[no-any-return]


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    return max(
        (
            float((new.double() - old.double()).abs().max()) / max(float(old.abs().max()), 1e-6)
            for old, new in zip(before, after)
        ),
        default=0.0,
    )


def _milliseconds(run: Callable[[], object]) -> float:
    if CUDA:
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def _text(kind: str, written: str, **options: Any) -> Built:
    import transformers

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": 1000,
             "intermediate_size": 2 * WIDTH, "max_position_embeddings": T, "attn_implementation": written,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes | options)
    model = getattr(transformers, f"{kind}Model" if kind == "Bert" else f"{kind}ForCausalLM")(config)
    inputs = {"input_ids": torch.randint(3, 1000, (B, T))}
    return model, inputs if kind == "Bert" else inputs | {"use_cache": False}


def _gpt2() -> Built:
    import transformers

    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=T, vocab_size=1000, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, attn_implementation="eager", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(3, 1000, (B, T)), "use_cache": False}


def _encoder(masked: bool) -> Built:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)
    inputs: dict[str, Any] = {"src": torch.randn(B, T, WIDTH)}
    if masked:
        inputs["mask"] = nn.Transformer.generate_square_subsequent_mask(T)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False), inputs


def _timm() -> Built:
    import timm

    model = timm.models.VisionTransformer(
        img_size=512 if CUDA else 32, patch_size=16, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS, num_classes=10
    )
    size = 512 if CUDA else 32
    return model, {"x": torch.randn(B, 3, size, size)}


CASES: dict[str, Callable[[], Built]] = {
    "llama sdpa": lambda: _text("Llama", "sdpa", num_key_value_heads=HEADS // 4),
    "llama eager": lambda: _text("Llama", "eager", num_key_value_heads=HEADS // 4),
    "mistral window 256": lambda: _text(
        "Mistral", "sdpa", num_key_value_heads=HEADS // 4, sliding_window=256 if CUDA else 32
    ),
    "gpt2 eager": _gpt2,
    "bert sdpa": lambda: _text("Bert", "sdpa", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "encoder, full": lambda: _encoder(False),
    "encoder, causal": lambda: _encoder(True),
    "timm vit": _timm,
}


if __name__ == "__main__":
    (place,), words = words_of(__doc__, sys.argv[1:], "OUT.json", keys=("b", "t", "width"))
    sizes = {"b": B, "t": T, "width": WIDTH} | {
        key: int(value) for key, _, value in (word.partition("=") for word in words)
    }
    B, T, WIDTH = sizes["b"], sizes["t"], sizes["width"]
    main(Path(place))
