"""The gated norm: how a linear mixer leaves its heads, normalised group by group and gated by the input.

    v = x + D skip                                        (D a number per head; without skip: v = x)
    gate first:   y = N( v act(z) ) weight + bias         Mamba-2
    gate last:    y = ( N( v ) weight + bias ) act(z)     RetNet, GLA, Gated DeltaNet, Lightning attention, RWKV, mLSTM
    no gate:      y = N( v ) weight + bias                the heads of DeltaNet; vectors of length one (weight n^-1/2)
    N(s) = s / sqrt( mean s^2 + eps )                     over each of g groups of c / g channels by itself;
                                                          with `centre` of s - mean s, the group norm;
                                                          with norm=False s itself: Mamba-3

With r = 1 / sqrt(mean s^2 + eps), n = r s, e = dy (times act(z) where the gate comes last) and m = e weight, the
backward is

    ds = r ( m - n mean(m n) )  less r mean(m) where centred, or m      dweight, dbias = sums over tokens of e n, of e

and the chain rule on either side. Nothing is kept from the forward: x, z and skip say it all again.

Shapes:  x, z, skip: b t c    weight, bias: c, or c / g (shared by the groups)    skip_weight: h, with c / h channels
         each  ->  y: b t c
Units:   everything inside is fp32 or wider; squares of |v act(z)| beyond 1e19 overflow fp32.

Source: Zhang and Sennrich 2019 (RMSNorm); Wu and He 2018 (group norm); Dao and Gu 2024 (Mamba-2), section 7.3; Sun et
al. 2023 (RetNet), equation 8.
"""
