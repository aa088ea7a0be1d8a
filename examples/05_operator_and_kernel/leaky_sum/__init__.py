"""The leaky sum: each channel adds up what it sees, and forgets at a rate of its own.

    y_t[c] = exp(log_decay[c]) y_{t-1}[c] + x_t[c]              y_{-1} = initial_state, or zeros

Each document of a packed sequence begins with its own initial state. final_state is the last y, before it is rounded
to the type of x; for an empty document the initial state.

Shapes:  x, y: b t c    log_decay: c (<= 0)    initial_state, final_state: q c with q = b, or the number of documents
         when packed (then b = 1); final_state is float32, or float64 as x

Source: the exponential moving average; S4D (Gu et al. 2022) with one real state per channel.
"""
