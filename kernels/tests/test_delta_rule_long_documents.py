"""Documents that lie side by side and end in different chunks: each is what it is alone, gradients included."""

from __future__ import annotations

import torch

from subquad_kernels.builtin import CATALOGUE
from subquad_kernels.workload import Workload


def test_documents_of_three_and_four_chunks_are_what_they_are_alone() -> None:
    operator = CATALOGUE.operator("delta_rule")
    half = CATALOGUE.kernel("delta_rule", "chunked").torch_half
    example = next(one for one in operator.examples if "documents" in one.shape and one.dtype == "float32")
    bounds = (0, 130, 380)
    workload = Workload(
        operator=example.operator, dtype="float32", phase="forward", options=example.options,
        shape={**example.shape, "t": bounds[-1], "documents": 2},
    )  # fmt: skip
    packed = operator.torch_half.sample_inputs(workload, seed=3, device="cpu")
    packed["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    with torch.no_grad():
        outputs = half.forward(**packed)
        dy = torch.randn_like(outputs[0])
        found = half.backward(packed, outputs, (dy, None))
        for start, stop in ((0, 130), (130, 380)):
            alone = {
                name: value[:, start:stop] if isinstance(value, torch.Tensor) and value.dim() >= 3 else value
                for name, value in packed.items()
            } | {"cu_seqlens": None}
            y = half.forward(**alone)
            torch.testing.assert_close(outputs[0][:, start:stop], y[0], rtol=1e-4, atol=1e-5)
            gradients = half.backward(alone, y, (dy[:, start:stop], None))
            compared = [name for name, one in gradients.items() if one is not None and one.dim() >= 3]
            assert {"q", "k", "v", "log_decay"} <= set(compared)
            for name in compared:
                one, other = found[name], gradients[name]
                assert one is not None and other is not None
                torch.testing.assert_close(one[:, start:stop], other, rtol=1e-4, atol=1e-5)
