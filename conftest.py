"""What every test may rely on: no network, no account, a cache of its own, a core to itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch counts the cores: each worker has one, and so has what it starts.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from oracle_record import OracleRecord

if not torch.cuda.is_available():
    # Before anybody imports triton: its kernels then run in Python, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-oracles", metavar="FILE", help="write which mixers agreed with their oracles")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record-oracles", None)
    if path is not None:
        config.pluginmanager.register(OracleRecord(Path(path).absolute()))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache is neither read nor written; subprocesses inherit the setting."""
    folder: Path = tmp_path_factory.mktemp("subquad-cache")
    before = os.environ.get("SUBQUAD_CACHE")
    os.environ["SUBQUAD_CACHE"] = str(folder)
    yield
    if before is None:
        del os.environ["SUBQUAD_CACHE"]
    else:
        os.environ["SUBQUAD_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """A shell ignores SIGINT for what it starts in the background, and processes inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that forgets run_dir writes into its own folder, not into the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """An output that is not written shows, and so does scratch memory that is read before it is written."""
    if torch.cuda.is_available():  # there cuBLAS would have to be told too; kernel_errors leaves NaN in the memory
        yield
        return
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip GPU tests where no CUDA device is found, and say so; what downloads gigabytes runs where it is asked for."""
    if "release" not in config.getoption("markexpr"):
        for item in items:
            if item.get_closest_marker("release"):
                item.add_marker(pytest.mark.skip(reason="downloads gigabytes: make test-release"))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
