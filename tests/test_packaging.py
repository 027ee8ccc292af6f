"""What pip gets: an archive of the sources, and a wheel made from it that needs no repository."""
import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

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
    bare = [n for n in needs if "extra ==" not in n and not ("<" in n and ">=" in n)]
    assert not bare, f"without a range: {bare}"


def test_the_wheel_works_without_the_repository(built, tmp_path):
    "Unpacked, in a folder of its own: the commands, and a story out of the files inside."
    with zipfile.ZipFile(built[0]) as wheel: wheel.extractall(tmp_path / "there")
    code = ("import sys; sys.path.insert(0, 'there'); import nanomoe, nanomoe.cli, nanomoe.stories as s; "
            "assert nanomoe.__file__.endswith('there/nanomoe/__init__.py'.replace('/', __import__('os').sep)), nanomoe.__file__; "
            "print(next(iter(s.open_stories('storybook', 'train', 1))).text)")
    told = subprocess.run([sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert told.returncode == 0, told.stderr[-2000:]
    assert len(told.stdout) > 200
