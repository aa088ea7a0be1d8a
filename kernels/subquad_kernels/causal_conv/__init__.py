"""Short causal convolution along the sequence, each channel with its own filter, with the activation fused.

    y_t[c] = act( bias[c] + sum_{j=0}^{w-1} weight[c,j] x_{t-w+1+j}[c] )        act: silu or none

weight[c, w-1] meets the token itself. Before the first token of a document stand its initial state (the w-1 inputs
before it, oldest first) or zeros; taps never reach into another document. final_state is the last w-1 inputs, the
initial state among them when a document is shorter.

Shapes:  x, y: b t c    weight: c w    bias: c    initial_state, final_state: q (w-1) c with q = b, or the number of
         documents when packed (then b = 1); states and y have the type of x

Sources: Gu and Dao 2023, figure 3 (the convolution of a Mamba block); Fu et al. 2023 (H3, shift as a convolution).
"""
