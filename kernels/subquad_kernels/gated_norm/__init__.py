"""The gated norm: how a linear mixer leaves its heads, normalised group by group and gated by the input.

    v = x + D skip                                          (D a number per head; without skip: v = x)
    gate first:   y = RMS( v act(z) ) weight                 Mamba-2
    gate last:    y = RMS( v ) weight act(z)                 RetNet, GLA, Gated DeltaNet, Lightning attention
    RMS(s) = s / sqrt( mean s^2 + eps )                      over each of g groups of c / g channels by itself

With r = 1 / sqrt(mean s^2 + eps), n = r s and m = dy weight (times act(z) where the gate comes last), the backward is

    ds = r ( m - n mean(m n) )        dweight = sum over tokens of dy n (times act(z) where the gate comes last)

and the chain rule on either side. Nothing is kept from the forward: x, z and skip say it all again.

Shapes:  x, z, skip: b t c    weight: c, or c / g (shared by the groups)    skip_weight: h, with c / h channels each
         ->  y: b t c
Units:   everything inside is fp32 or wider; squares of |v act(z)| beyond 1e19 overflow fp32.

Source: Zhang and Sennrich 2019 (RMSNorm); Dao and Gu 2024 (Mamba-2), section 7.3; Sun et al. 2023 (RetNet), equation 8.
"""
