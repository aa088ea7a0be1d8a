"""What the built-in mixers promise, and which checkpoints load into them; imports no torch."""

from __future__ import annotations

from subquad.contracts import Growth, ImportSpec, MixerSpec
from subquad.mixers.configs import SoftmaxAttentionConfig, WindowConfig, share_keys

MIXERS = (
    MixerSpec(
        name="softmax_attention",
        summary="every token sees all tokens before it",
        paper="Vaswani et al. 2017",
        config=SoftmaxAttentionConfig,
        build="subquad.mixers.attention:build_softmax_attention",
        work_growth=Growth.QUADRATIC,
        carry_growth=Growth.LINEAR,
        operators=("rotary", "softmax_attention"),
        bidirectional=True,
        shares=share_keys,
    ),
    MixerSpec(
        name="window",
        summary="every token sees the last `window` tokens",
        paper="Beltagy et al. 2020",
        config=WindowConfig,
        build="subquad.mixers.attention:build_window",
        work_growth=Growth.LINEAR,
        carry_growth=Growth.CONSTANT,
        operators=("rotary", "softmax_attention"),
        bidirectional=True,
        shares=share_keys,
    ),
)

IMPORTS = (
    ImportSpec(
        model_type="llama",
        summary="softmax_attention and SwiGLU; without biases and scaled rotary positions",
        build="subquad.mixers.llama_import:llama",
        mixer="softmax_attention",
        export="subquad.mixers.llama_import:llama_config",
    ),
    ImportSpec(
        model_type="mistral",
        summary="window, or softmax_attention where no sliding window is set, and SwiGLU",
        build="subquad.mixers.llama_import:mistral",
        mixer="window",
        export="subquad.mixers.llama_import:mistral_config",
    ),
)
