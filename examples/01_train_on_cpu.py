"""Describe a model, let kernels be chosen for this machine, train it: all from Python, in seconds on a CPU.

    python examples/01_train_on_cpu.py

`python -m subquad train` takes the same overrides.
"""

import torch

from subquad import Example, build_model, compile_model, load_config, train

# Recipes are the ones of the command line; overrides make this one small.
config = load_config(
    [
        "model=transformer",
        "model.d_model=64",
        "model.num_layers=2",
        "data.max_bytes=1000000",
        "trainer.accelerator=cpu",
        "trainer.batch_size=4",
        "trainer.seq_len=64",
        "trainer.max_steps=40",
        "trainer.learning_rate_warmup_steps=5",
        "trainer.validate_every_n_steps=20",
        "trainer.validation_batches=4",
        "compiler.measure=false",
    ]
)


def look_at_one_model() -> None:
    """The steps of which `train` consists: build, compile for the shapes to come, run."""
    config.model.vocab_size, config.model.context_len = 256, config.trainer.seq_len
    model = build_model(config.model)
    model, plan = compile_model(model, Example(tokens_shape=(1, 64), training=False), target="cpu")
    logits = model(torch.randint(0, 256, (1, 64)))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, logits {tuple(logits.shape)}")
    for choice in plan.choices:
        if choice.used:
            print(f"layer {choice.layer}: {choice.operator} runs {choice.chosen} because {choice.reason}")


if __name__ == "__main__":
    look_at_one_model()
    result = train(config)
    assert result.validation_loss < 5, "better than guessing among 256 bytes (5.5 nats)"
