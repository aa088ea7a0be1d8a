"""The log-linear delta rule: a memory that replaces what it holds under a key, kept in log t states read by weight.

The tokens before t lie in the buckets of `log_linear_attention`: token j <= t is on level(t, j) = bits of (t xor j).

    M_t = exp(g_t) (I - beta_t k_t k_t^T)                            what a token does to all states; beta = write_gate
    y_t = scale sum over j <= t of  lambda_t[level(t, j)] (q_t^T M_t M_{t-1} .. M_{j+1} k_j) beta_j v_j

lambda = level_scales, g = log_decay (<= 0, absent: 0); beta is 1 where absent. Levels beyond the last scale are read
with the last one. With equal scales it is the `delta_rule`, with orthogonal keys `log_linear_attention`. Heads of v
come in groups that share the q and k of one head. States stay bounded where beta |k|^2 <= 2: normalise keys.
The state before token t has a slot for each bit of t: what its bucket's tokens wrote, as all tokens since have left
it; a slot whose bit is 0 is zero. A token's M acts on every slot; then the slots below the lowest 0 of t and the
token's own write, beta k v^T, become one: a binary counter.
Packed documents (cu_seqlens) have a state each, and positions count from each one's beginning.

Shapes:  q, k: b t h_k n    v: b t h p    level_scales: b t h l    log_decay: b t h, or h    write_gate: b t h
         initial_state: states m h n p    final_state: states m' h n p, with states = b, or the number of documents when
         packed (then b = 1); m and m' are the bits of `position`, the tokens before the call, and of position + t
         y: b t h p; states are fp32 (fp64 for fp64 inputs), y has the type of v

Source: Guo et al. 2025 (Log-linear attention), section 3.4; Yang, Kautz and Hatamizadeh 2024 (Gated delta networks).
"""
