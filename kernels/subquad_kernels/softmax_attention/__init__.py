"""Softmax attention:  o_i = sum_j softmax_j( scale q_i . k_j + mask_ij ) v_j,   lse_i = log sum_j exp(...).

Token i of t queries stands at position p = s - t + i among s keys, so that one definition serves training (s = t),
prefill and decode (s > t). Key j is visible when j <= p (causal), |p - j| < window (window > 0), and both are in one
document (packed). Query head n reads key/value head n // (h / h_kv) (grouped queries).

Shapes:  q: b t h k    k: b s h_kv k    v: b s h_kv v    cu_seqlens: documents + 1 (int32; then b = 1, s = t)
         out: b t h v    residual lse: b h t (fp32, fp64 for fp64 inputs)

Sources: Vaswani et al. 2017, 3.2; Shazeer 2019 and Ainslie et al. 2023 (shared heads); Dao 2023 (lse as residual).
"""
