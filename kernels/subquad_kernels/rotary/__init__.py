"""Rotary position embedding: a rotation of pairs of features by an angle that grows with the position.

    angle(p, i) = p theta^(-2 i / k)
    (x_i, x_{i + k/2}) -> (x_i cos - x_{i + k/2} sin,  x_{i + k/2} cos + x_i sin)        i = 0 .. k/2 - 1

Token j stands at p = start + position + j, or at its place in its document when packed; `position` is read on the
device, so that a step of a decode which is taken down once turns by another angle every time. Scores of rotated queries
and keys depend on the distance of their positions alone. The gradient is the rotation by the opposite angle.

Angles may also be given, a token's own for all heads or for each: what a token turns by is then data, with a gradient.
They turn neighbours, and features beyond them stay:

    (x_2i, x_2i+1) -> (x_2i cos - x_2i+1 sin,  x_2i+1 cos + x_2i sin)                    i = 0 .. s - 1
    d angle_i = sum over the heads of q and k that it turns of  dx_2i+1 x_2i - dx_2i x_2i+1

Shapes:  q: b t h k    k: b t h_kv k    cu_seqlens: documents + 1 (then b = 1)    position: 1 (int64)
         angles: b t a s, a = 1 or a = h = h_kv, 2 s <= k  ->  as q and k
         Angles are taken in fp64 and reduced to one turn before they are rounded: p theta^(..) in fp32 loses whole
         turns beyond a million tokens.

Source: Su et al. 2021, section 3.4.2; half-split pairs as in GPT-NeoX. Given angles: Lahoti et al. 2026 (Mamba-3),
section 3.2.
"""
