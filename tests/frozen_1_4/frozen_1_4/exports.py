from subquad import ImportMap, ModelConfig


def layout(config):
    return ImportMap(
        model=ModelConfig(
            name="frozen_1_4_arch",
            d_model=16,
            num_layers=1,
            schedule=["frozen_drift"],
            mixers={"frozen_drift": {"mixer": "frozen_drift"}},
            channel_mixer=None,
        ),
        outer={"embedding.weight": "embed", "norm.weight": "norm", "lm_head.weight": "head"},
        block_prefix="layers.{}.",
        blocks={"frozen_drift": {"mixer_norm.weight": "norm", "mixer.qkv.weight": "qkv", "mixer.log_decay": "decay"}},
        copies={},
    )


def config(model, mixer, channel_mixer):
    return {"width": model.d_model}
