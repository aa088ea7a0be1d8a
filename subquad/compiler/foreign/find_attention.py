"""Softmax attention in a captured graph: calls of the fused function, and softmax(Q K^T) V written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from subquad.compiler.foreign.capture import Program
from subquad.compiler.foreign.masks import MaskKind, mask_kind
from subquad_kernels.torch_operator import named_arguments

Written = Literal["sdpa", "softmax"]
"""How a model writes its attention: one call of scaled_dot_product_attention, or products and a softmax."""

_aten = torch.ops.aten
_FUSED = _aten.scaled_dot_product_attention.default
_SOFTMAX = {_aten.softmax.int, _aten._softmax.default}
_ADDED_PRODUCT = _aten.baddbmm.default
_PRODUCTS = {_aten.matmul.default, _aten.bmm.default, _ADDED_PRODUCT}
_SAME_VALUES = {
    _aten.to.dtype, _aten.to.dtype_layout, _aten._to_copy.default, _aten.type_as.default, _aten.clone.default,
    _aten.contiguous.default, _aten.view.default, _aten.reshape.default, _aten._unsafe_view.default,
    _aten.expand.default, _aten.alias.default, _aten.detach.default,
}  # fmt: skip
_SCALES = {_aten.mul.Tensor, _aten.div.Tensor, _aten.mul.Scalar, _aten.div.Scalar}
_DROPOUTS = {_aten.dropout.default, _aten.native_dropout.default}


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One softmax attention of a captured model.

    `b, t, s, h, k, v` are as in the operator; `h_kv` are the heads of keys and values as they are handed over, and
    `h_kv_distinct` before a model repeats them for its queries. `depends_on` names the inputs that the mask is
    computed from. `dropout_p` is that of the probabilities in the mode the model was captured in.
    """

    node: str
    owner: str
    written: Written
    b: int
    t: int
    s: int
    h: int
    h_kv: int
    h_kv_distinct: int
    k: int
    v: int
    dtype: str
    dropout_p: float
    mask: MaskKind
    depends_on: tuple[str, ...] = ()


def find_attention(program: Program) -> list[Attention]:
    """Every softmax attention of the graph, in order, its mask read on the example."""
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is _FUSED:
            found.append(_fused(program, node))
        elif node.target in _SOFTMAX:
            attention = _written_out(program, node)
            if attention is not None:
                found.append(attention)
    return found


def _fused(program: Program, node: fx.Node) -> Attention:
    values = named_arguments(node.target, node.args, dict(node.kwargs))
    q, k, v = _shape(values["query"]), _shape(values["key"]), _shape(values["value"])
    t, s = q[-2], k[-2]
    if len(q) != 4:
        mask = _of_axes(q)
    elif values["is_causal"]:
        # The flag counts from the first key, the operator from the last one.
        mask = MaskKind(causal=True) if t == s else MaskKind(other="causal from the first key")
    else:
        mask = _kind(program, [_Mask(values["attn_mask"])] if values["attn_mask"] is not None else [], t, s)
    return _attention(
        program, node, "sdpa", q, k, v, mask, values["key"], float(values["dropout_p"]), [values["attn_mask"]]
    )


def _written_out(program: Program, softmax: fx.Node) -> Attention | None:
    """softmax(scores) V, where scores are a product of two tensors, scaled and masked; None for any other softmax."""
    scores = _scores(softmax.args[0])  # type: ignore[arg-type]
    values, dropout_p = _times_values(softmax)
    if scores is None or values is None:
        return None
    product, masks, other = scores
    queries, keys = product.args[-2:] if product.target is not _ADDED_PRODUCT else product.args[1:3]
    q, k_transposed, v = _shape(queries), _shape(keys), _shape(values)
    k = (*k_transposed[:-2], k_transposed[-1], k_transposed[-2])
    t, s = q[-2], k[-2]
    if other:
        mask = MaskKind(other=other)
    elif len(q) != 4:
        mask = _of_axes(q)
    elif softmax.args[1] not in (-1, len(_shape(softmax)) - 1):
        mask = MaskKind(other="a softmax that is not over the keys")
    else:
        mask = _kind(program, masks, t, s)
    nodes = [part.node for part in masks]
    return _attention(program, softmax, "softmax", q, k, v, mask, keys, dropout_p, nodes)


@dataclass(frozen=True)
class _Mask:
    """A mask as scaled_dot_product_attention takes it, or one that says where `filled` replaces scores.

    Then `fills` is the value of the node where they are replaced.
    """

    node: fx.Node
    filled: Any = None
    fills: bool = True

    def added(self, values: dict[fx.Node, Any]) -> Tensor:
        """What it adds to the scores."""
        tensor: Tensor = values[self.node]
        if self.filled is None and tensor.dtype != torch.bool:
            return tensor
        hidden = tensor if self.filled is not None and self.fills else ~tensor
        filled = values[self.filled] if isinstance(self.filled, fx.Node) else self.filled
        lowest = float("-inf") if filled is None else float(filled)
        return torch.zeros(tensor.shape, device=tensor.device).masked_fill(hidden, lowest)


def _of_axes(q: tuple[int, ...]) -> MaskKind:
    if len(q) == 3:
        return MaskKind(other="is on 3 axes: heads in the batch, as nn.MultiheadAttention does with need_weights")
    return MaskKind(other=f"is on {len(q)} axes")


def _scores(node: fx.Node) -> tuple[fx.Node, list[_Mask], str] | None:
    """From what enters a softmax up to the product: the product, what masks it, and a name for any other step."""
    masks: list[_Mask] = []
    other = ""
    while node.op == "call_function":
        target: Any = node.target
        if target is _ADDED_PRODUCT:
            return node, [*masks, _Mask(node.args[0])], other  # type: ignore[arg-type]
        if target in _PRODUCTS:
            return node, masks, other
        inputs = [part for part in node.args if isinstance(part, fx.Node)]
        if not inputs:
            return None
        following = next((part for part in inputs if _has_product(part)), None)
        if following is None:
            return None
        rest = [part for part in inputs if part is not following]
        if target in (_aten.add.Tensor, _aten.add_.Tensor):
            masks += [_Mask(part) for part in rest]
        elif target is _aten.masked_fill.Scalar:
            masks.append(_Mask(rest[0], node.args[2]))
        elif target is _aten.where.self and node.args[1] is following:
            masks.append(_Mask(node.args[0], node.args[2], fills=False))  # type: ignore[arg-type]
            rest = []
        elif target in _SAME_VALUES or (target in _SCALES and all(_is_number(part) for part in rest)):
            pass
        else:
            other = other or f"{target.name().removeprefix('aten::')} on the scores"
        node = following
    return None


def _times_values(softmax: fx.Node) -> tuple[fx.Node | None, float]:
    """From a softmax down to its product with the values: the values, and the dropout on the way."""
    node, dropout_p = softmax, 0.0
    while True:
        users = [user for user in node.users if user.op == "call_function"]
        following = next((user for user in users if user.target in _PRODUCTS and user.args[0] is node), None)
        if following is not None:
            return following.args[1], dropout_p  # type: ignore[return-value]
        user = next((user for user in users if user.target in _SAME_VALUES | _DROPOUTS), None)
        if user is None:
            return None, dropout_p
        if user.target in _DROPOUTS and user.args[2]:
            dropout_p = float(user.args[1])  # type: ignore[arg-type]
        node = user


def _has_product(node: fx.Node) -> bool:
    """Whether a product lies above a node, with nothing but steps on scores between."""
    for _ in range(16):
        if node.op != "call_function":
            return False
        if node.target in _PRODUCTS:
            return True
        inputs = [part for part in node.args if isinstance(part, fx.Node)]
        if not inputs:
            return False
        # The scores are the widest of a step's inputs.
        node = max(inputs, key=lambda part: _size(part))
    return False


def _kind(program: Program, masks: list[_Mask], t: int, s: int) -> MaskKind:
    if not masks:
        return MaskKind()
    nodes = [part for mask in masks for part in (mask.node, mask.filled) if isinstance(part, fx.Node)]
    if {node.name for node in program.ancestors(nodes)} & program.trained:
        return MaskKind(other="is learned")
    try:
        values = program.evaluate(nodes)
        if len(masks) == 1 and masks[0].filled is None:
            return mask_kind(values[masks[0].node], t, s)
        return mask_kind(torch.stack(torch.broadcast_tensors(*(mask.added(values) for mask in masks))).sum(0), t, s)
    except Exception as error:  # a stranger's operators; whatever they raise, the mask is not known
        return MaskKind(other=f"cannot be computed: {type(error).__name__}")


def _attention(
    program: Program,
    node: fx.Node,
    written: Written,
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    mask: MaskKind,
    keys: Any,
    dropout_p: float,
    masks: list[Any],
) -> Attention:
    above = program.ancestors(part for part in masks if isinstance(part, fx.Node))
    heads = q[-3] if len(q) > 2 else 1
    h_kv = k[-3] if len(k) > 2 else 1
    return Attention(
        node=node.name,
        owner=program.owners[node],
        written=written,
        b=q[0] if len(q) == 4 else 1,
        t=q[-2],
        s=k[-2],
        h=heads,
        h_kv=h_kv,
        h_kv_distinct=_distinct_heads(keys, h_kv),
        k=q[-1],
        v=v[-1],
        dtype=str(_meta(node).dtype if written == "sdpa" else _meta(keys).dtype).removeprefix("torch."),
        dropout_p=dropout_p,
        mask=mask,
        depends_on=tuple(program.inputs[part.name] for part in above if part.name in program.inputs),
    )


def _distinct_heads(keys: fx.Node, heads: int) -> int:
    """How many heads keys had before each was repeated: `b h_kv 1 s k` expanded to `b h_kv g s k`."""
    for node in _upwards(keys):
        if node.target is _aten.expand.default:
            before, after = _shape(node.args[0]), _shape(node)
            if len(before) == 5 and before[2] == 1 and after[1] * after[2] == heads:
                return before[1]
        if node.target is _aten.repeat_interleave.self_int and len(_shape(node)) == 4:
            return _shape(node.args[0])[1]
    return heads


def _upwards(node: fx.Node) -> Iterator[fx.Node]:
    steps = _SAME_VALUES | {_aten.transpose.int, _aten.permute.default, _aten.repeat_interleave.self_int}
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in steps | {_aten.slice.Tensor}:
        yield node
        node = node.args[0]  # type: ignore[assignment]


def _meta(node: Any) -> Tensor:
    return node.meta["val"]  # type: ignore[no-any-return]


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in _meta(node).shape)


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


def _is_number(node: fx.Node) -> bool:
    return _size(node) == 1
