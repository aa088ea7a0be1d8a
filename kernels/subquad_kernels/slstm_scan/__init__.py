"""The scan of the scalar LSTM (sLSTM): a recurrent network with exponential gates, whose heads mix their memory.

    i_t, f_t, z_t, o_t = inputs_t + bias + R h_{t-1}                               the gates, R within each head
    c_t = sigmoid(f_t) c_{t-1} + exp(i_t) tanh(z_t)
    n_t = sigmoid(f_t) n_{t-1} + exp(i_t)
    h_t = sigmoid(o_t) c_t / n_t

c / n is a weighted mean, a_t, of tanh(z_1) .. tanh(z_t). With l_t = log n_t it is carried without overflow and without
a division,

    w_t = sigmoid( i_t - log sigmoid(f_t) - l_{t-1} ),    a_t = (1 - w_t) a_{t-1} + w_t tanh(z_t)
    l_t = log( sigmoid(f_t) exp(l_{t-1}) + exp(i_t) ) = i_t - log w_t

where the paper carries c exp(-m), n exp(-m) and a stabiliser m = max(log sigmoid(f) + m, i): the same quotient. A
state is (h, a, l); that of no token is (0, 0, -inf). Every step waits for the one before it: the scan is serial in t.
Packed documents (cu_seqlens) have a state each, which before a document's first token is its initial state, else that
of no token.

Shapes:  inputs: b t h 4 p (i, f, z, o)    recurrent: h p 4 p, from the hidden p of a head to its gates    bias: h 4 p
         initial_state, final_state: states 3 h p (h, a, l), with states = b, or the number of documents when packed
         (then b = 1)    y: b t h p    residual  trajectory: 3 h (b t) p, the states after every token, in the order
         of the kernel's steps.  States are fp32 (fp64 for fp64 inputs); y has the type of the inputs.

Source: Beck et al. 2024 (xLSTM), section 2.2, equations 8 to 18; forget gates are sigmoids, as in the authors' code.
"""
