"""The command line: the main job end to end, and every mistake as one sentence with nothing lost."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from nanomoe.config import Preset, override, preset
from nanomoe.files import UserError

ROOT = Path(__file__).resolve().parents[1]
TINYSTORIES = ROOT.parent / "shared" / "tinystories"
TINY = ["--preset", "smoke", "--device", "cpu", "--set", "d_model=16", "--set", "n_heads=2", "--set", "n_kv_heads=1", "--set", "d_ff=16", "--set", "vocab_size=400",
        "--set", "stories=150", "--set", "val_stories=20", "--set", "tokens=20480"]


def nanomoe(*words, **more):
    return subprocess.run([sys.executable, "-m", "nanomoe.cli", *map(str, words)], capture_output=True, text=True, encoding="utf-8",
                          env={**os.environ, "PYTHONUTF8": "1", "COLUMNS": "200"}, **more)


def refused(*words):
    "The sentence on standard error."
    done = nanomoe(*words)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A home in which a tiny run has finished."
    folder = tmp_path_factory.mktemp("cli") / "home"
    done = nanomoe("run", "--home", folder, *TINY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Story ") == 3 and "bits per byte" in done.stdout and "Next: " in done.stdout
    return folder


def test_a_run_leaves_what_it_should(home):
    names = "tokenizer.json data/shards/train.bin data/shards/val.bin data/shards/meta.json reports/figs/pretrain_training_summary.png".split()
    for name in (*names, *(f"artifacts/pretraining/{n}" for n in "ckpt_best.pt ckpt_last.pt train_log.jsonl val_log.jsonl config.json".split())):
        assert (home / name).stat().st_size > 0, name
    assert not list(home.rglob("*.tmp"))


def test_a_second_run_does_nothing_again(home):
    before = (home / "artifacts/pretraining/ckpt_last.pt").stat().st_mtime_ns
    done = nanomoe("run", "--home", home, *TINY)
    assert done.returncode == 0 and "there already" in done.stdout
    assert (home / "artifacts/pretraining/ckpt_last.pt").stat().st_mtime_ns == before


def test_another_run_in_the_same_home_replaces_nothing(home):
    before = {path: path.read_bytes() for path in (home / "tokenizer.json", home / "data/shards/meta.json")}
    assert "--fresh" in refused("run", "--home", home, *TINY, "--set", "stories=140")
    assert before == {path: path.read_bytes() for path in before}


def test_generate(home):
    first, second = (nanomoe("generate", "Once upon a time", "--home", home, "--max-new-tokens", 20, "--seed", 5, *more) for more in ((), ("--no-cache",)))
    assert first.returncode == 0 and first.stdout.startswith("Once upon a time") and first.stdout == second.stdout


def test_real_stories(tmp_path):
    if not TINYSTORIES.is_dir(): pytest.skip("the slice of TinyStories is not beside the repository")
    done = nanomoe("run", "--stories", TINYSTORIES, "--home", tmp_path / "real", *TINY)
    assert done.returncode == 0 and "150 stories" in done.stdout, done.stderr


@pytest.mark.parametrize("words, says", [
    (["--preset", "lptop"], 'did you mean "laptop"'), (["--device", "tpu"], "choose from auto"), (["--stories", "nowhere"], "nowhere"),
    (["--set", "d_modle=3"], 'did you mean "d_model"'), (["--set", "d_model"], "NAME=VALUE"), (["--set", "d_model=wide"], "whole number"),
    (["--set", "n_heads=7"], "n_heads"), (["--set", "top_k=9"], "top_k"), (["--set", "vocab_size=70000"], "65,535"), (["--set", "lr=nan"], "finite")])
def test_mistakes(tmp_path, words, says):
    assert says in refused("run", "--home", tmp_path / "new", *words)
    assert not list(tmp_path.rglob("*.*"))


def test_a_home_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "--home" in refused("run", "--home", tmp_path / "file" / "home", *TINY)
    assert (tmp_path / "file").read_text() == "in the way"


def test_what_generate_refuses(home, tmp_path):
    assert "nanomoe run" in refused("generate", "--home", tmp_path)
    assert "context" in refused("generate", "word " * 600, "--home", home)
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"PK no checkpoint")
    assert "damaged" in refused("generate", "--checkpoint", broken, "--home", home)


def test_another_tokenizer_is_refused(home, tmp_path):
    import shutil
    shutil.copytree(home, tmp_path / "copy")
    assert nanomoe("tokenizer", "--home", tmp_path / "copy", "--seed", 9, *TINY[:2], *TINY[4:]).returncode == 0
    assert "prepare-data" in refused("pretrain", "--home", tmp_path / "copy", *TINY)


@pytest.mark.parametrize("seconds", [1.5, 3, 4.5])
def test_a_killed_run_goes_on(tmp_path, home, seconds):
    command = [sys.executable, "-m", "nanomoe.cli", "run", "--home", str(tmp_path), *TINY]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    process.kill()
    process.wait()
    done = nanomoe("run", "--home", tmp_path, *TINY)
    assert done.returncode == 0, done.stderr
    same = "artifacts/pretraining/val_log.jsonl"
    assert (tmp_path / same).read_text() == (home / same).read_text()


@given(st.lists(st.text(max_size=30) | st.builds("{}={}".format, st.sampled_from(["d_model", "lr", "compile", "optimizer", "seed", "tokens"]), st.text(max_size=8)), max_size=3))
def test_settings_are_taken_or_refused(settings):
    try: assert isinstance(override(preset("smoke"), settings), Preset)
    except UserError as error: assert str(error).endswith(".")


def test_help_is_quick_and_says_what_to_start_with():
    code = "import sys, nanomoe, nanomoe.cli; sys.argv = ['nanomoe', '--help']\ntry: nanomoe.cli.main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "nanomoe run" in done.stdout, done.stderr
    for command in ("run", "tokenizer", "prepare-data", "pretrain", "generate", "settings", "bench train", "bench data"):
        assert "--help" in nanomoe(*command.split(), "--help").stdout


def test_benchmarks_print_ratios():
    done = nanomoe("bench", "train", "--preset", "smoke", "--steps", 2, "--batch-size", 1)
    assert done.returncode == 0 and "transformers eager" in done.stdout and "x" in done.stdout, done.stderr
