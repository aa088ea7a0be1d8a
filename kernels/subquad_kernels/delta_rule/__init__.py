"""The delta rule: a linear memory that replaces what it holds under a key (DeltaNet, Gated DeltaNet, RWKV-7).

    S~_t = Diag(exp g_t) S_{t-1}                                 the decayed state; g = log_decay, 0 if absent
    u_t  = beta_t (v_t - S~_t^T k_t)                             what is new about v_t; beta = write_gate, 1 if absent
    S_t  = S~_t + k_t u_t^T
    y_t  = scale S_t^T q_t

With `remove` and `insert` the transition is any diagonal plus rank one; `remove` reads the state before it decays:

    r_t = S_{t-1}^T remove_t
    S_t = Diag(exp g_t) S_{t-1} + insert_t r_t^T + beta_t k_t v_t^T

The first is the second with remove = -exp(g) k and insert = beta k. log_decay <= 0 is one number per head or one per
key channel. The delta rule contracts where beta |k|^2 <= 2: normalise keys, keep beta in [0, 2].
Packed documents (cu_seqlens) have a state each; S before a document's first token is its initial state, else zero.

Shapes:  q, k: b t h_k n (h_k divides h: head i reads key head i // (h / h_k))    v, y: b t h p    write_gate: b t h
         log_decay: b t h, or b t h n    remove, insert: b t h n    initial_state, final_state: states h n p with
         states = b, or the number of documents when packed (then b = 1)
         residuals  writes: b t h p, u_t or r_t;  boundaries: chunks h p n, transposed states that enter the chunks of
         64 tokens (chunks = b ceil(t / 64); packed at most t // 64 + documents, the rest is not defined; 0 if t = 1)
         States are fp32 (fp64 for fp64 inputs); y and the residuals have the type of v.

Sources: Yang et al. 2024 (Parallelizing linear transformers with the delta rule), section 3; Yang, Kautz and
Hatamizadeh 2024 (Gated delta networks), section 3; Peng et al. 2025 (RWKV-7), section 4.
"""
