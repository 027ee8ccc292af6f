"""What pip gets: an archive of the sources, and a wheel made from it that needs no repository."""
import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import urllib.request
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from test_app import free_port
from test_cli import TINY

ROOT = Path(__file__).resolve().parents[1]
FILES = {p.relative_to(ROOT).as_posix() for p in [*(ROOT / "nanomoe").glob("*.py"), *(ROOT / "nanomoe" / "storybook").iterdir(), *(ROOT / "nanomoe" / ".streamlit").iterdir()]}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The wheel and the archive, built from a copy, with nothing downloaded."
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("nanomoe", "tests"): shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "settings.ini", "MANIFEST.in", "README.md", "LICENSE"): shutil.copy(ROOT / name, source)
    made = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(source)], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return next(target.glob("*.whl")), next(target.glob("*.tar.gz"))


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel: names = set(wheel.namelist())
    inside = {n for n in names if ".dist-info/" not in n}
    assert inside == FILES, inside ^ FILES
    assert {"nanomoe/app.py", "nanomoe/cli.py", "nanomoe/storybook/words.txt"} <= inside
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_the_archive_can_make_the_wheel_and_brings_no_tests(built):
    with tarfile.open(built[1]) as archive: names = {n.partition("/")[2] for n in archive.getnames()}
    assert FILES | {"setup.py", "settings.ini", "README.md", "LICENSE"} <= names
    assert not [n for n in names if n.startswith(("tests", "nbs"))]


def test_the_wheel_says_what_it_needs_and_what_it_starts(built):
    with zipfile.ZipFile(built[0]) as wheel:
        def read(end): return wheel.read(next(n for n in wheel.namelist() if n.endswith(end))).decode()
        about, starts = Parser().parsestr(read(".dist-info/METADATA")), read(".dist-info/entry_points.txt")
    entries = configparser.ConfigParser(delimiters=["="])
    entries.read_string(starts)
    assert entries["console_scripts"]["nanomoe"] == "nanomoe.cli:main"
    needs = about.get_all("Requires-Dist")
    assert any(n.startswith("torch") and "<" in n for n in needs) and about["Requires-Python"] == ">=3.10"
    assert set(about.get_all("Provides-Extra")) >= {"dev", "export", "local-llm"}
    bare = [n for n in needs if not re.search(r"==\d|>=.*<|<.*>=", n.partition(";")[0])]
    assert not bare, f"without a range: {bare}"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "A virtual environment that has the wheel, and borrows the packages that it needs from this one; but not an editable nanomoe, whose path is no package."
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "venv", with_pip=False, symlinks=sys.platform != "win32")
    programs = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    env = {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, "PYTHONUTF8": "1"}
    made = subprocess.run([sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", "--no-deps", "--no-index", built[0]], cwd=folder, env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    place = subprocess.run([programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True).stdout.strip()
    (Path(place) / "borrowed.pth").write_text("\n".join(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))), encoding="utf-8")
    return programs, env


def test_the_wheel_makes_a_model_without_the_repository(installed, tmp_path):
    programs, env = installed
    def nanomoe(*words): return subprocess.run([programs / "nanomoe", *words], cwd=tmp_path, env=env, capture_output=True, text=True, encoding="utf-8")
    where = subprocess.run([programs / "python", "-c", "import nanomoe; print(nanomoe.__file__)"], cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    assert Path(where.strip()).is_relative_to(programs.parent)
    done = nanomoe("run", *TINY, "--set", "tokens=2048", "--set", "vocab_size=1200", "--set", "max_seq_len=512")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "reports" / "scorecard.json").is_file()
    told = nanomoe("generate", "Once upon a time", "--max-new-tokens", "5")
    assert told.returncode == 0 and told.stdout.startswith("Once upon a time") and "comes with the course" not in told.stderr, told.stderr


def test_the_wheel_serves_the_app_without_the_repository(installed, tmp_path):
    programs, env = installed
    port = free_port()
    with open(tmp_path / "log", "w") as log, subprocess.Popen([programs / "nanomoe", "app", "--port", str(port)], cwd=tmp_path, env=env, stdout=log, stderr=log) as app:
        try:
            deadline, said = time.monotonic() + 120, ""
            while not said:
                assert app.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
                try: said = urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=10).read().decode()
                except OSError: time.sleep(0.2)
            assert said == "ok"
        finally:
            app.terminate()
            app.wait(60)
