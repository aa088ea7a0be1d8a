"""Selective scan (S6), the recurrence of Mamba: a diagonal linear system whose step and maps depend on the token.

    dt_t = softplus(dt_t + dt_bias)                              (or dt as given)
    h_t[c,n] = exp(dt_t[c] A[c,n]) h_{t-1}[c,n] + dt_t[c] B_t[n] x_t[c]
    y_t[c] = ( sum_n C_t[n] h_t[c,n] + D[c] x_t[c] ) silu(z_t[c])

A is negative, so that every decay lies in (0, 1]. B and C are shared by all channels. D, z, dt_bias may be absent.
`reversed` scans from the last token to the first, h_{t+1} in place of h_{t-1}: the other half of a bidirectional mixer.
Packed documents (cu_seqlens) have a state each; h before a document's first token (the
last, reversed) is its initial state, else zero.

Shapes:  x, dt, z: b t c    A: c n    B, C: b t n    D, dt_bias: c    initial_state, final_state: q c n with q = b,
         or the number of documents when packed (then b = 1)    y: b t c
         residuals  boundaries: (t-1)//16 b n c, the states that tokens 16, 32, ... continue, counted in the
         order of the scan (zero where a document starts);  ungated: b t c, y before the gate (of length 0 without z)
         States and step sizes are fp32 (fp64 for fp64 inputs); y has the type of x.

Sources: Gu and Dao 2023, section 3 and algorithm 2; Gu, Goel and Re 2022 (S4, the limit of constant dt, B, C).
"""
