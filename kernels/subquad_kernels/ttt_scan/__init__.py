"""Test-time training: a state that is a small model, trained on the tokens it meets by mini-batch gradient descent.

    f(x; W) = LN( x~ W )                          `linear`, x~ = [x, 1]: the last row of W is the bias
    f(x; W) = LN( [gelu(x~ W_1), 1] W_2 )         `mlp`, four times as wide inside; gelu by its tanh form

    loss_j = 1/2 | f(k_j; W) - (v_j - k_j) |^2    so that x + f(x) learns to turn keys into values
    A_i = A_{i-1} + r_i d loss_i / dW             at the W that entered the mini-batch, the same for all its tokens
    y_i = q_i + f(q_i; W - s_i A_i)               and after the mini-batch's last token W - s_i A_i enters the next

i counts the places of a mini-batch, s = token_scales (c of them, one a place), r = rates, a learning rate a token. LN
is over a head, with weight and bias of its own and eps 1e-6. A call may begin (`position` tokens came before) and end
within a mini-batch: the state holds W and A. Packed documents (cu_seqlens) have a state each, and their mini-batches
begin with them, `position` tokens further.

Shapes:  q, k, v: b t h k    rates: b t h    token_scales: c    norm_weight, norm_bias: h k
         initial_state, final_state: states 2 h s, W and A of a head in one row: k + 1 rows of k (`linear`), or
         k + 1 rows of 4 k and then 4 k + 1 rows of k (`mlp`); states = b, or the documents when packed (then b = 1)
         y: b t h k; states are fp32 (fp64 for fp64 inputs), y has the type of v

Source: Sun et al. 2024 (Learning to (learn at test time)), sections 2.3 to 2.7 and appendix A (the dual form).
"""
