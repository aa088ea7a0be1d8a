"""Linear attention with a scalar decay: a matrix-valued state, written by keys and values, read by queries.

    S_t = exp(g_t) S_{t-1} + w_t k_t v_t^T                                    g = log_decay, w = write_gate
    y_t = scale ( exp(g_t) S_{t-1}^T q_t + d_t (q_t . k_t) v_t )              d = diagonal

g <= 0 per token, per head, or absent (no decay); w is 1 where absent; d is w where absent, which reads S_t itself:
y_t = scale S_t^T q_t. Heads of v come in groups that share the q and k of one head: head i reads head i // (h / h_k).
Packed documents (cu_seqlens) have a state each; S before a document's first token is its initial state, else zero.

One operator for RetNet and Lightning attention (g constant per head), simple GLA, SSD of Mamba-2 (w = dt, h_k the
number of groups), Mamba-3 (w = s, d = gamma: selected on the diagonal, never subtracted) and mLSTM (w = input gate).
d = 0 reads the state before the token. The sum that normalises is the same recurrence on v = 1:
`linear_attention_normalizer`.

Shapes:  q, k: b t h_k n    v: b t h p    log_decay: b t h, or h    write_gate, diagonal: b t h
         initial_state, final_state: states h n p with states = b, or the number of documents when packed (then b = 1)
         y: b t h p    residual  boundaries: segments-1 b h n p, the states between the segments of time of a forward
         States are fp32 (fp64 for fp64 inputs); y has the type of v.

Sources: Katharopoulos et al. 2020, section 3.2; Sun et al. 2023 (RetNet), section 2; Dao and Gu 2024 (SSD), sections 5
and 6; Yang et al. 2024 (GLA), section 4 (chunks, the decay's gradient).
"""
