"""timm's vision transformers of random weights run chosen kernels and stay what they were."""

from __future__ import annotations

import pytest
import torch
from foreign_models import assert_same, calls_in, compiled
from torch import nn

timm = pytest.importorskip("timm", reason="needs timm")


def vit(**options: float) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    return timm.models.VisionTransformer(**sizes | options)  # type: ignore[no-any-return]


def test_a_vision_transformer_runs_kernels_and_says_the_same() -> None:
    images = torch.randn(2, 3, 32, 32)
    before, after, plan = compiled(vit().eval(), images)
    assert not plan.uncaptured
    assert [note.rpartition("rewritten by ")[2] for note in plan.notes] == ["timm"]
    assert calls_in(lambda: after(images)) == [(False, 0)] * 2
    assert list(after.state_dict()) == list(before.state_dict())
    assert_same(before, after, lambda model: model(images.to(next(model.parameters()).dtype)))


def test_dropout_stays_while_training() -> None:
    images = torch.randn(2, 3, 32, 32)
    before, after, _ = compiled(vit(attn_drop_rate=0.3).train(), images)
    assert calls_in(lambda: after(images)) == []
    found = []
    for model in (before, after):
        torch.manual_seed(5)
        found.append(model(images))
    assert torch.equal(*found)
    assert len(calls_in(lambda: after.eval()(images))) == 2


def test_attention_that_is_not_fused_is_declined_with_the_way_to_fuse_it() -> None:
    model, images = vit().eval(), torch.randn(2, 3, 32, 32)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False
    before, after, plan = compiled(model, images)
    assert len(plan.uncaptured) == 2
    assert all("set_fused_attn" in entry.reason for entry in plan.uncaptured)
    assert torch.equal(before(images), after(images))
