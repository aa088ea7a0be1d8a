"""Gated linear attention: a matrix state whose rows decay at rates of their own, different for every token.

    S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T                                       g = log_decay <= 0
    y_t = scale S_t^T q_t                                          read="after"   (GLA, HGRN2)
    y_t = scale ( S_{t-1}^T q_t + (q_t . (u * k_t)) v_t )          read="before"  (RWKV-6; u = bonus, 0 if absent)

Packed documents (cu_seqlens) have a state each; S before a document's first token is its initial state, else zero.

Shapes:  q, k, log_decay: b t h n    v, y: b t h p    bonus: h n    initial_state, final_state: states h n p with
         states = b, or the number of documents when packed (then b = 1)
         residual  boundaries: cuts h n p, the states that cross from one stretch of `stretch_len(n, p)` tokens to the
         next; a sequence of l tokens has ceil(l / stretch) - 1 of them, and when packed those of the documents
         follow each other in t // stretch rows, of which the last ones may be unused
         States are fp32 (fp64 for fp64 inputs); y has the type of q. log_decay may be of another type than q.

Sources: Yang et al. 2023 (GLA), sections 3 and 4; Peng et al. 2024 (RWKV-6), section 4; Qin et al. 2024 (HGRN2).
"""
