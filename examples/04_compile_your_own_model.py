"""A model that subquad did not build runs the kernels chosen for this machine, and stays an ordinary module.

    python examples/04_compile_your_own_model.py

`python -m subquad explain module=package.module:factory` shows the same plan for any model that a function builds.
"""

import torch
from torch import nn

from subquad import compile_model
from subquad.compiler.report import format_plan

# Any module will do: a Hugging Face model takes its inputs as a dictionary, {"input_ids": ...}.
layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
model = nn.TransformerEncoder(layer, 2)
tokens, mask = torch.randn(2, 128, 64), nn.Transformer.generate_square_subsequent_mask(128)
expected = model(tokens, mask)

# The plan is for the mode that the model is in: training, with gradients. Where the model as it was written turns out
# to be faster, it is left so, and the plan says it.
model, plan = compile_model(model, (tokens, mask))
print(format_plan(plan))

# The same function, the same parameters: it trains, saves and loads as before.
difference = (model(tokens, mask) - expected).abs().max().item()
model(tokens, mask).square().mean().backward()
print(f"outputs differ by {difference:.1e}")
assert difference < 1e-5
assert all(parameter.grad is not None for parameter in model.parameters())

# A mask that hides something else is never taken for a causal one: torch computes it as before.
mask[3, 90] = 0.0
model(tokens, mask)
