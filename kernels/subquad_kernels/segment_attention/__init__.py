"""Segment attention (SCOUT): every token attends to itself and to the summaries of the segments before it.

The sequence is cut into segments of `segment_len` tokens; the last token of a complete segment is its summary. With
global positions g (the call's first token stands at `start`), summary j stands at p_j = (j + 1) segment_len - 1 and

    V(g) = { g } u { p_j : p_j < g }          strictly before: the token itself is counted once
    o_g  = sum_{i in V(g)} softmax_i( scale q_g . k_i ) v_i,     lse_g = log sum_{i in V(g)} exp( scale q_g . k_i )

so that token g sees 1 + floor(g / segment_len) keys, o_g = v_g for g < segment_len, segment_len = 1 is causal softmax
attention, and a sequence of t tokens costs t^2 / (2 segment_len) pairs: quadratic, with that constant.

Shapes:  q: b t h k    k: b t h_kv k    v: b t h_kv v    summary_k: b m h_kv k    summary_v: b m h_kv v
         cu_seqlens: documents + 1 (int32; then b = 1, start = 0)    out: b t h v    residual lse: b h t (>= fp32)
with m = floor(start / segment_len) summaries of the tokens before the call. In a packed sequence segments restart at
every document. Query head n reads key/value head n // (h / h_kv).

Source: SCOUT, 2025 (arXiv 2509.00935), equations as in the authors' released code.
"""
