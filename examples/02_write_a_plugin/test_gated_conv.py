"""The whole test file of a plugin: inherit the suite, name the mixer."""

from __future__ import annotations

from typing import ClassVar

from subquad.testing.mixer_suite import MixerSuite


class TestGatedConv(MixerSuite):
    mixer = "gated_conv"
    config: ClassVar = {"conv_width": 3}
