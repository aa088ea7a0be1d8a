from subquad import ChannelMixerConfig, Computed, ImportMap, ModelConfig


def layout(config):
    return ImportMap(
        model=ModelConfig(
            name="frozen_arch",
            d_model=16,
            num_layers=1,
            schedule=["frozen_mix"],
            mixers={"frozen_mix": {"mixer": "frozen_mix"}},
            channel_mixer=ChannelMixerConfig(d_hidden=16),
        ),
        outer={"embedding.weight": "embed"},
        block_prefix="layers.{}.",
        blocks={"frozen_mix": {"mixer.gain": Computed(names=("gain",), transform=lambda gain: 1 + gain)}},
        copies={},
        ignored=(r".*\.constant",),
    )
