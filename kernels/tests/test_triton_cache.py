"""What Triton compiles goes to its own folder, whatever torch.compile would have it do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from subquad_kernels.triton_cache import keep_triton_cache


def test_tritons_own_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    own = knobs.cache.dir
    keep_triton_cache()
    assert os.path.normpath(own) == os.path.normpath(os.environ["TRITON_CACHE_DIR"])


def test_tritons_home_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    keep_triton_cache()
    named = os.environ["TRITON_CACHE_DIR"]
    monkeypatch.delenv("TRITON_CACHE_DIR")
    assert os.path.normpath(knobs.cache.dir) == os.path.normpath(named)


def test_a_folder_that_the_user_named_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    keep_triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"
