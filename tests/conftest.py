"""What every test starts from."""
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")     # tiny tensors are slower in parallel
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A busy machine is no failure, and the same commit gives the same verdict twice.
settings.register_profile("nanomoe", deadline=None, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nanomoe")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root():
    "The root of the repository."
    return ROOT
