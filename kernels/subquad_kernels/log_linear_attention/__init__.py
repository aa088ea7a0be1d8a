"""Log-linear attention: linear attention whose past is kept in log t states, each read with a weight of its own.

The tokens before t lie in buckets of 1, 2, 4, .. tokens, one for each bit of t (a Fenwick tree): token j <= t is on

    level(t, j) = number of bits of (t xor j)            0 for the token itself, 1 + log_2 of its bucket's size before

    y_t = scale sum over j <= t of  lambda_t[level(t, j)] exp(g_{j+1} + .. + g_t) w_j (q_t . k_j) v_j

lambda = level_scales, g = log_decay (<= 0, absent: 0), w = write_gate (absent: 1). Levels beyond the last scale are
read with the last one; with equal scales it is linear attention. Heads of v come in groups that share the q and k of
one head. The state before token t has a slot for each bit of t, the sum of the bucket's writes; a slot whose bit is 0
is zero. After a token, the slots below the lowest 0 of t and the token's write become one: a binary counter.
Packed documents (cu_seqlens) have a state each, and positions count from each one's beginning.

Shapes:  q, k: b t h_k n    v: b t h p    level_scales: b t h l    log_decay: b t h, or h    write_gate: b t h
         initial_state: states m h n p    final_state: states m' h n p, with states = b, or the number of documents when
         packed (then b = 1); m and m' are the bits of `position`, the tokens before the call, and of position + t
         y: b t h p; states are fp32 (fp64 for fp64 inputs), y has the type of v

Source: Guo et al. 2025 (Log-linear attention), sections 3.1 to 3.3.
"""
