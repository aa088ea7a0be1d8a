"""One query a sequence, as in a decode: query heads that share a key head are the rows of one product.

It sees every key, so that no mask tells them apart, and no key is copied for the heads that read it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def attended(
    q: Tensor, k: Tensor, v: Tensor, attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """out and lse, by a kernel that takes heads first: q, k, v  ->  b h_kv g v, b h_kv g (or longer rows).

    Shapes:  q: b 1 h k    k: b s h_kv k    v: b s h_kv v  ->  b 1 h v, b h 1      g = h / h_kv
    """
    b, _, h, _ = q.shape
    h_kv = k.shape[2]
    out, lse = attend(q.reshape(b, h_kv, h // h_kv, -1), k.transpose(1, 2), v.transpose(1, 2))
    return out.reshape(b, 1, h, -1), lse[:, :, : h // h_kv].reshape(b, h, 1)
