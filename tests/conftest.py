"""What every test starts from: no network, seeded generators, and the real models and data where they are present."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# conftest is imported before any test module, so before the libraries that read these, which they do once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see lowrank_align/__init__.py

# Same examples in every run, and no deadline: a slow machine is no defect.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data: `LOWRANK_ALIGN_SHARED`, or `../shared` beside the checkout."""
    folder = Path(os.environ.get("LOWRANK_ALIGN_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no real models and data: {folder} is not there (LOWRANK_ALIGN_SHARED names another folder)")
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same state of the global generators."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):  # a test that needs no torch does not wait for it
        torch.manual_seed(0)
