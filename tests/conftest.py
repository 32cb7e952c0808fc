"""What every test runs under: one thread per process, no network, no tracking service, no GPU tests without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before a test module imports torch, transformers or wandb: they read these once.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

# Examples are the same in every run, and a busy machine is no failure.
settings.register_profile("r1", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("r1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked ``gpu`` where there is no NVIDIA GPU."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of benchmark data that R1_DATA names; skips where it is not set."""
    folder = os.environ.get("R1_DATA")
    if not folder:
        pytest.skip("R1_DATA does not name a folder of benchmark data")
    return Path(folder)
