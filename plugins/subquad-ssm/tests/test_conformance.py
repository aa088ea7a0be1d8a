"""Mamba keeps the promises of every mixer."""

from __future__ import annotations

from typing import ClassVar

from subquad.testing.mixer_suite import MixerSuite


class TestMamba(MixerSuite):
    mixer = "mamba"


class TestMambaOfOddSizes(MixerSuite):
    mixer = "mamba"
    config: ClassVar = {"expand": 3, "state_dim": 5, "conv_width": 2, "dt_rank": 7}
