"""Attention of one token to itself and to a cache of fixed size, whose length is on the device alone.

A step of a decode that is taken down once (a CUDA graph) does the same to the same memory every time. So the cache is a
ring of m places (`subquad_kernels.ring`), and what tells one step from the next is the number of tokens before it, p
(`position`). Of every `segment_len` tokens the last is kept (1: all): n = floor(p / segment_len) entries were written,
entry i to place i mod m, and

    V = { own } u { places j < min(n, m) :  j != n mod m }        the place that this token is due to take is not seen
    o = sum_{i in V} softmax_i( scale q . k_i ) v_i

With m > n that is causal softmax attention (segment_len 1), or segment attention, with room behind the cache; with
segment_len 1 and m = window it is attention in a window, in whatever order the places lie: keys are rotated before they
are kept. What stands in places that are not seen, NaN included, does not matter.

Shapes:  q: b 1 h k    k: b 1 h_kv k    v: b 1 h_kv v    keys: b m h_kv k    values: b m h_kv v    position: 1 (int64)
         out: b 1 h v
Query head n reads key/value head n // (h / h_kv).

Sources: Vaswani et al. 2017, 3.2; SCOUT 2025 (arXiv 2509.00935); Jiang et al. 2023 (Mistral 7B), 2 (the ring).
"""
