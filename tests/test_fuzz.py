"""What reads from outside meets inputs that were made to reach new branches. `python tests/fuzz.py TARGET` looks for longer."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

MINUTES = float(os.environ.get("NANOMOE_FUZZ") or 0)     # with any seed; libFuzzer prints which, and an input that went wrong
LIMITS = [f"-max_total_time={MINUTES * 60:.0f}"] if MINUTES else ["-runs=1000", "-max_total_time=60", "-seed=1"]

pytest.importorskip("atheris", reason="needs atheris, where it installs: pip install atheris")


@pytest.mark.parametrize("target", ["rows", "log", "card", "prompt", "text", "tokenizer", "setting"])
def test_no_input_reaches_an_exception(target, tmp_path):
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("fuzz.py")), target, *LIMITS, f"-artifact_prefix={tmp_path}/"],
                          capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=300 + MINUTES * 60, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(re.search(r"Done (\d+) runs", done.stderr)[1]) > 100
