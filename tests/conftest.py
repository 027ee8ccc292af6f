"""What every test starts from."""
import os
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")     # tiny tensors are slower in parallel
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell ignores Ctrl-C for what it starts in the background, and whatever that starts inherits it: here, commands are to be stopped.
if threading.current_thread() is threading.main_thread(): signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no failure, and the same commit gives the same verdict twice.
settings.register_profile("nanomoe", deadline=None, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.too_slow])
# Somebody has to look further, once a week: NANOMOE_FUZZ=10 tries new examples each time, and gives each target of tests/fuzz.py ten minutes.
settings.register_profile("fuzz", settings.get_profile("nanomoe"), derandomize=False, max_examples=500, print_blob=True)
settings.load_profile("fuzz" if os.environ.get("NANOMOE_FUZZ") else "nanomoe")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root():
    "The root of the repository."
    return ROOT


def pytest_terminal_summary(terminalreporter):
    "What a test has measured, for a person to read, whichever process it ran in."
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties: terminalreporter.line(f"{name}: {value}")
