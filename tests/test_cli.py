"""The command line: the main job end to end, and every mistake as one sentence with nothing lost."""
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

import forks
from nanomoe import cli
from nanomoe.checkpoint import load_model
from nanomoe.config import ModelConfig, Preset, override, preset
from nanomoe.files import UserError
from nanomoe.generate import generate
from nanomoe.sft import prompt_ids
from nanomoe.tokenizer import EOS, load_tokenizer
from nanomoe.train import read_log

ROOT = Path(__file__).resolve().parents[1]
TINYSTORIES = ROOT.parent / "shared" / "tinystories"
TINY = ["--preset", "smoke", "--device", "cpu", "--set", "d_model=16", "--set", "n_heads=2", "--set", "n_kv_heads=1", "--set", "d_ff=16", "--set", "vocab_size=400",
        "--set", "stories=150", "--set", "val_stories=20", "--set", "tokens=20480", "--set", "tokenizer_stories=150", "--set", "max_seq_len=1100",
        "--set", "sft.examples=16", "--set", "sft.val_examples=4", "--set", "dpo.examples=16"]


def process(*words, input="", env={}):
    return subprocess.run([sys.executable, "-m", "nanomoe.cli", *map(str, words)], capture_output=True, text=True, encoding="utf-8", input=input,
                          env={**os.environ, "PYTHONUTF8": "1", "COLUMNS": "200", **env})


def nanomoe(*words, **more):
    "A command, as in a process of its own. Where processes can fork, it does not wait for imports each time."
    return subprocess.CompletedProcess(words, *forks.nanomoe(*words, **more)) if hasattr(os, "fork") else process(*words, **more)


def as_installed(*words):
    "The command line of a wheel, which brings no checkpoints."
    code = "import nanomoe.files\nfrom pathlib import Path\nnanomoe.files.SHIPPED = Path('nowhere')\nimport nanomoe.cli\nnanomoe.cli.main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, encoding="utf-8", env={**os.environ, "PYTHONUTF8": "1", "COLUMNS": "200"})


def refused(*words):
    "The sentence on standard error."
    done = nanomoe(*words)
    assert done.returncode == 1 and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A home in which a tiny run has finished."
    folder = tmp_path_factory.mktemp("cli") / "home"
    done = process("run", "--home", folder, *TINY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Tell a story about") >= 2 and "unseen protagonists, sampled" in done.stdout and "bits per byte" in done.stdout and "Next: " in done.stdout
    return folder


def test_a_run_leaves_what_it_should(home):
    names = "tokenizer.json data/shards/train.bin data/shards/val.bin data/shards/meta.json reports/figs/pretrain_training_summary.png reports/figs/dpo_training_summary.png reports/scorecard.json reports/figs/scorecard.png".split()
    names += [f"data/synthetic/{name}.jsonl" for name in ("prompt_seeds", "sft_train", "sft_val", "dpo_train", "dpo_val")]
    for name in (*names, *(f"artifacts/{stage}/{n}" for stage in ("pretraining", "sft", "dpo") for n in "ckpt_best.pt ckpt_last.pt train_log.jsonl val_log.jsonl config.json".split())):
        assert (home / name).stat().st_size > 0, name
    assert not list(home.rglob("*.tmp"))
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}      # in a clone, Git does not ask about any of it
    assert {path.name for path in home.iterdir()} <= ignored


def test_a_second_run_does_nothing_again(home):
    files = [home / name for name in ("artifacts/pretraining/ckpt_last.pt", "reports/scorecard.json")]
    before = [path.stat().st_mtime_ns for path in files]
    done = nanomoe("run", "--home", home, *TINY)
    assert done.returncode == 0 and done.stdout.count("there already") == 3 and "unseen protagonists, sampled" in done.stdout
    assert [path.stat().st_mtime_ns for path in files] == before


def without(scores, *path):
    "A scorecard from which somebody took something out."
    scores = inner = json.loads(json.dumps(scores))
    for name in path[:-1]: inner = inner[name]
    del inner[path[-1]]
    return scores


@pytest.mark.parametrize("change", [lambda scores: {}, lambda scores: [scores], lambda scores: {**scores, "dpo": {**scores["dpo"], "sha256": "0" * 64}},
                                    lambda scores: {name: score for name, score in scores.items() if name != "dpo"},
                                    lambda scores: without(scores, "dpo", "bpb"), lambda scores: without(scores, "sft", "seen", "greedy", "protagonist"),
                                    lambda scores: without(scores, "base", "unseen", "sampled", "protagonist", "mean")])
def test_a_scorecard_of_something_else_is_made_again(home, tmp_path, change):
    scores = json.loads((home / "reports/scorecard.json").read_text())
    shutil.copytree(home / "artifacts", tmp_path / "artifacts")
    (tmp_path / "reports").mkdir()
    for content, there in ((scores, True), (change(scores), False)):
        (tmp_path / "reports/scorecard.json").write_text(json.dumps(content))
        assert cli._scores_there(tmp_path, 4) == (scores if there else None)
    assert cli._scores_there(tmp_path, 6) is None


def test_another_run_in_the_same_home_replaces_nothing(home):
    before = {path: path.read_bytes() for path in (home / "tokenizer.json", home / "data/shards/meta.json")}
    assert "--fresh" in refused("run", "--home", home, *TINY, "--set", "stories=140")
    assert before == {path: path.read_bytes() for path in before}


def test_a_model_that_was_not_trained_here_is_not_replaced(home, tmp_path):
    shutil.copytree(home / "data", tmp_path / "data")
    for name in ("tokenizer.json", "artifacts/pretraining/ckpt_best.pt"):       # what `nanomoe import hf` leaves
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(home / name, tmp_path / name)
    assert "was not trained here" in refused("pretrain", "--home", tmp_path, *TINY)
    shutil.rmtree(tmp_path / "data")
    assert "--fresh" in refused("run", "--home", tmp_path, *TINY)
    for name in ("tokenizer.json", "artifacts/pretraining/ckpt_best.pt"): assert (tmp_path / name).read_bytes() == (home / name).read_bytes()


def test_a_tokenizer_that_a_model_was_trained_with_is_not_replaced(home):
    before, same = (home / "tokenizer.json").read_bytes(), ["tokenizer", "--home", home, *TINY[:2], *TINY[4:]]
    assert "another tokenizer" in refused(*same, "--seed", 9)
    assert nanomoe(*same).returncode == 0 and (home / "tokenizer.json").read_bytes() == before      # the same once more does no harm


def test_stories_that_cannot_be_read_replace_nothing(home, tmp_path):
    "The tokenizer reads the first file only; what is wrong with the second one is found when the shards are written."
    shutil.copytree(home, tmp_path / "copy")
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "a.txt").write_text("<|endoftext|>".join(f"Once there was a fox. It had {i} friends. They ran." for i in range(200)))
    (tmp_path / "stories" / "b.txt").write_bytes(b"Once \xff")
    kept = {path: path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    few = ["--set", "stories=250", "--set", "tokenizer_stories=100"]
    assert "b.txt is not UTF-8 text" in refused("run", "--fresh", "--stories", tmp_path / "stories", "--home", tmp_path / "copy", *TINY, *few)
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_home_inside_its_stories(tmp_path, monkeypatch, capsys):
    "What a run writes there is not read as stories, and changes nothing about them."
    from nanomoe.stories import storybook
    for name, first in (("my-train.txt", 0), ("my-val.txt", 400)):
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(story.text for story in storybook(n=400, start=first)))
    monkeypatch.chdir(tmp_path)
    for name in ("_judge", "_tell_some"): monkeypatch.setattr(cli, name, lambda *_, **__: None)       # they take the longest
    settings = [*TINY[5::2], "max_seq_len=600", "sft.val_examples=20"]      # heroes enough to stand in for each other
    def run(): return cli.run(preset="smoke", stories=".", home=Path("."), device="cpu", set=settings) or capsys.readouterr().out
    assert "Shard train" in run()
    again = run()
    assert "Tokenizer and shards: there already, and right" in again and "Instructions and pairs: there already, and right" in again
    (tmp_path / "my-val.txt").write_text("Once there was a fox.")
    with pytest.raises(UserError, match="other stories"): run()


def test_a_card_names_the_stories_until_others_are_written(home, tmp_path):
    shutil.copytree(home, tmp_path / "copy")
    def card():
        assert nanomoe("export", "hf", tmp_path / "hf", "--home", tmp_path / "copy").returncode == 0
        return (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "| Data | storybook" in card()
    assert nanomoe("prepare-data", "--home", tmp_path / "copy", *TINY[:2], *TINY[4:], "--seed", 9).returncode == 0
    assert "| Data |" not in card()


def test_a_finished_home_without_its_log_or_the_source_of_its_stories(home, tmp_path):
    "Without the log there is no figure; without the source the shards are made again, or refused, in a sentence."
    shutil.copytree(home, tmp_path / "copy")
    (tmp_path / "copy/artifacts/pretraining/train_log.jsonl").unlink()
    assert nanomoe("pretrain", "--home", tmp_path / "copy", *TINY).returncode == 0
    meta = json.loads((home / "data/shards/meta.json").read_text())
    del meta["source"]
    (tmp_path / "copy/data/shards/meta.json").write_text(json.dumps(meta))
    assert "meta.json is damaged" in refused("run", "--home", tmp_path / "copy", *TINY)


@pytest.mark.parametrize("limit, counts", [(1, [1, 1, 1]), (4, [2, 1, 1]), (10, [5, 4, 1]), (99, [6, 4, 1])])
def test_a_limit_is_shared_out_and_kept(limit, counts):
    seeds = [type("Seed", (), {"split": split})() for split, n in (("train", 6), ("val_seen", 4), ("val", 1)) for _ in range(n)]
    some = cli._some_of(seeds, limit)
    assert [sum(seed.split == split for seed in some) for split in ("train", "val_seen", "val")] == counts
    assert some == [seed for seed in seeds if seed in some] and some[0] is seeds[0]


def test_instructions_of_another_command_are_kept(home, tmp_path):
    shutil.copytree(home, tmp_path / "copy")
    assert nanomoe("make-sft-data", "--home", tmp_path / "copy", "--limit", 8, *TINY[:2], *TINY[4:]).returncode == 0
    few = (tmp_path / "copy/data/synthetic/sft_train.jsonl").read_bytes()
    assert "nanomoe train-sft --home" in refused("run", "--home", tmp_path / "copy", *TINY)
    assert (tmp_path / "copy/data/synthetic/sft_train.jsonl").read_bytes() == few


def test_instructions_of_other_stories(home, tmp_path):
    shutil.copytree(home, tmp_path / "copy")
    (tmp_path / "my.txt").write_text("<|endoftext|>".join(f"Once there was a fox. It had {i} friends. They ran." for i in range(200)))
    for command in ("make-sft-data", "make-dpo-data"):
        assert "--stories" in refused(command, "--home", tmp_path / "copy", "--stories", tmp_path / "my.txt", *TINY[:2], *TINY[4:])


def test_seed_as_a_setting(tmp_path):
    for name, seed, more in (("none", 0, []), ("option", 7, []), ("setting", 0, ["seed=7"])):
        for command in (cli.tokenizer, cli.prepare_data): command(preset="smoke", home=tmp_path / name, seed=seed, set=[*TINY[5::2], *more])
    none, option, setting = ((tmp_path / name / "data/shards/meta.json").read_text() for name in ("none", "option", "setting"))
    assert option == setting != none
    option, setting = cli._choose("smoke", [], seed=7), cli._choose("smoke", ["seed=7"])
    assert option == setting and option.train.seed == option.sft.seed == option.dpo.seed == 7
    assert cli._choose("smoke", ["sft.seed=1", "seed=7"]).sft.seed == 1


def test_a_gpu_takes_bfloat16_unless_told_otherwise():
    for device, dtype in (("cuda", "bfloat16"), ("cpu", "float32"), ("mps", "float32")):
        chosen = cli._choose("laptop", [], device=device)
        assert chosen.train.dtype == chosen.sft.dtype == chosen.dpo.dtype == dtype
    assert cli._choose("laptop", ["dtype=float32"], device="cuda").train.dtype == "float32"


def test_names_print_as_they_are(home, tmp_path):
    odd = tmp_path / "a[b]c :smile:"
    done = nanomoe("tokenizer", "--home", odd, *TINY[:2], *TINY[4:])
    assert done.returncode == 0 and str(odd) in done.stdout, done.stdout
    assert f"nanomoe run --home '{odd}'" in as_installed("generate", "--home", odd).stderr


def test_an_edited_story_file_is_noticed(tmp_path):
    chosen, file = preset("smoke"), tmp_path / "my.txt"
    file.write_text("Once there was a fox.")
    for source in (file, tmp_path):
        before = cli._describe(str(source), chosen)
        assert cli._describe(str(source), chosen) == before and str(source) in before
        file.write_text(file.read_text() + " It had a friend.")
        longer = cli._describe(str(source), chosen)
        os.utime(file, (0, 0))
        assert len({before, longer, cli._describe(str(source), chosen)}) == 3


def test_torchrun_is_for_pretrain(tmp_path):
    done = nanomoe("run", "--home", tmp_path / "new", *TINY, env={"WORLD_SIZE": "2", "RANK": "0"})
    assert done.returncode == 1 and done.stderr.startswith("Error: ") and "`pretrain`" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("setting", [f"d_model={10**9}", f"d_model={10**30}", f"n_layers={10**30}", f"max_seq_len={10**12}", f"d_ff={10**18}"])
def test_absurd_sizes(tmp_path, setting):
    assert "choose smaller sizes" in refused("run", "--home", tmp_path / "new", "--preset", "smoke", "--set", setting)
    assert not (tmp_path / "new").exists()


def test_parameters_are_counted_right(monkeypatch):
    for parameters, fits in ((11_300_000, False), (11_400_000, True)):     # 11,327,424 and a few tables
        monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 16 * parameters, "SC_PAGE_SIZE": 1}.get, raising=False)
        with nullcontext() if fits else pytest.raises(UserError, match=re.escape("1.1e+07")): cli._check_memory(ModelConfig())


FAILING = """
import sys
from nanomoe import cli
def fail(): raise {error}
cli.app = fail
cli.main()
"""


@pytest.mark.parametrize("error, says", [
    (f"OSError({errno.ENOSPC}, 'No space left on device')", "disk is full"), ("MemoryError()", "memory"),
    ("RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')", "memory"), ("RuntimeError(\"DefaultCPUAllocator: can't allocate memory\")", "memory")])
def test_a_machine_that_is_too_small(error, says):
    done = subprocess.run([sys.executable, "-c", FAILING.format(error=error)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Error: ") and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_bug_is_no_mistake_of_the_user():
    done = subprocess.run([sys.executable, "-c", FAILING.format(error="RuntimeError('shapes differ')")], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize("words, at", [(["run", "--preset", "laptop", "--set", "tokenizer_stories=500", "--home", "big"], "Tokenizer: "), (["generate", "--chat"], "Story begins: ")])
def test_a_stop_outside_of_training(home, tmp_path, words, at):
    where = home if "generate" in words else tmp_path
    process = subprocess.Popen([sys.executable, "-m", "nanomoe.cli", *words], cwd=where, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(len(at)) == at       # writing shards, or waiting for a line
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and error == "\nStopped.\n"
    assert not list(tmp_path.rglob("*.bin*"))


def test_usage_mistakes_keep_status_2():
    done = nanomoe("run", "--hom", "x")
    assert done.returncode == 2 and "No such option: --hom" in done.stderr
    for words in (["generate", "--seed", "x"], ["generate", "--seed", "-1"], ["bench", "trian"], ["generate", "--top-p", "2"]): assert nanomoe(*words).returncode == 2


def test_chat(home):
    asked = f"{'word ' * 600}\nOnce upon\n"
    done = nanomoe("generate", "--chat", "--home", home, "--max-new-tokens", 5, input=asked)      # it ends with Ctrl-D
    assert done.returncode == 0 and done.stdout.count("Story begins: ") == 3, done.stderr
    assert "Once upon" in done.stdout and "stopped" not in done.stdout
    assert done.stderr.count("\n") == 2 and "context" in done.stderr and "(stopped: --max-new-tokens reached)" in done.stderr
    assert nanomoe("generate", "--chat", "--home", home, input="\n").returncode == 0


def test_a_model_with_nothing_to_add(monkeypatch, capsys):
    from nanomoe import generate
    monkeypatch.setattr(generate, "stream_text", lambda *_: (yield from ()) or "stop")
    cli._tell(None, None, "The end.", {})
    assert capsys.readouterr() == ("The end.\n", "")


def test_a_prompt_that_is_no_text(home):
    if sys.platform == "win32": pytest.skip("Windows passes arguments as text")
    done = subprocess.run([sys.executable, "-m", "nanomoe.cli", "generate", b"\xff\xfe", "--home", str(home)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Error: The prompt is not UTF-8") and done.stderr.count("\n") == 1


def test_generate_checks_that_tokenizer_and_model_belong_together(home, tmp_path):
    shutil.copytree(home, tmp_path / "copy")
    assert nanomoe("tokenizer", "--home", tmp_path / "copy", *TINY[:2], *TINY[4:], "--set", "vocab_size=300", "--fresh").returncode == 0
    error = refused("generate", "--home", tmp_path / "copy")
    assert "400" in error and "300" in error and "tokenizer.json" in error


def test_generate(home):
    first, second = (nanomoe("generate", "Once upon a time", "--home", home, "--max-new-tokens", 20, "--seed", 5, *more) for more in ((), ("--no-cache",)))
    assert first.returncode == 0 and first.stdout.startswith("Once upon a time") and first.stdout == second.stdout


@pytest.mark.parametrize("asked", ["Tell a story about Lily.", ""])
def test_an_instruction_is_asked_as_in_training(home, asked):
    model, tok = load_model(home / "artifacts/dpo/ckpt_best.pt"), load_tokenizer(home / "tokenizer.json")
    ids = torch.tensor([prompt_ids(tok, asked)])
    told = nanomoe("generate", asked, "--instruct", "--home", home, "--temperature", 0, "--max-new-tokens", 12)
    between = "\n\n" if asked else ""
    assert told.stdout.rstrip("\n") == f"{asked}{between}{tok.decode(generate(model, ids, 12, temperature=0, eos_id=EOS)[0, ids.shape[1]:].tolist())}".rstrip("\n"), told.stderr


@pytest.mark.parametrize("end, says", [("stop", ""), ("length", "--max-new-tokens reached"), ("context", "the context is full")])
def test_a_story_is_printed_as_it_comes_and_says_why_it_ends(monkeypatch, capsys, end, says):
    flushed = []

    class Terminal(io.StringIO):
        def flush(self): flushed.append(self.getvalue())

    def stream_text(*_, **__):
        for piece in (" upon", " a time"):
            yield piece
            assert flushed[-1].endswith(piece), "it is shown before the next one is asked for"
        return end

    monkeypatch.setattr("nanomoe.generate.stream_text", stream_text)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    cli._tell(None, None, "Once", {})
    assert terminal.getvalue() == "Once upon a time\n" and says in (told := capsys.readouterr().err) and bool(says) == bool(told)


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
    assert not [path for path in tmp_path.rglob("*.*") if path.name != ".lock"]


def test_a_home_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for name in ("file", "file/home"): assert "--home" in refused("run", "--home", tmp_path / name, *TINY)
    for command in ("prepare-data", "pretrain"): assert "There is no tokenizer" in refused(command, "--home", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


def test_what_generate_refuses(home, tmp_path):
    alone = as_installed("generate", "--home", tmp_path)
    assert alone.returncode == 1 and alone.stderr.startswith("Error: ") and alone.stderr.count("\n") == 1 and "nanomoe run" in alone.stderr
    assert "context" in refused("generate", "word " * 600, "--home", home)
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"PK no checkpoint")
    assert "damaged" in refused("generate", "--checkpoint", broken, "--home", home)
    assert "latest, pretrain" in refused("generate", "--checkpoint", "pertrain", "--home", home)
    assert "--temperature" in refused("generate", "--temperature", "1e-30", "--home", home)


def test_a_checkpoint_of_another_home_brings_its_tokenizer(home, tmp_path):
    told = nanomoe("generate", "Once", "--checkpoint", home / "artifacts/sft/ckpt_best.pt", "--home", tmp_path, "--max-new-tokens", 5)
    assert told.returncode == 0 and told.stdout.startswith("Once"), told.stderr


def test_a_name_that_no_file_can_have(home):
    assert "too long" in refused("generate", "--checkpoint", "x" * 300, "--home", home)


def test_another_tokenizer_is_refused(home, tmp_path):
    shutil.copytree(home, tmp_path / "copy")
    assert nanomoe("tokenizer", "--home", tmp_path / "copy", "--seed", 9, "--fresh", *TINY[:2], *TINY[4:]).returncode == 0
    assert "prepare-data" in refused("pretrain", "--home", tmp_path / "copy", *TINY)


def test_a_killed_run_goes_on(tmp_path, home):
    "A real process at some moment; tests/test_faults.py kills a fork of one in every stage."
    command = [sys.executable, "-m", "nanomoe.cli", "run", "--home", str(tmp_path), *TINY]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(5)
    process.kill()
    process.wait()
    done = nanomoe("run", "--home", tmp_path, *TINY)
    assert done.returncode == 0, done.stderr
    once, twice = ([{**row, "sample": ""} for row in read_log(folder / "artifacts/pretraining/val_log.jsonl")] for folder in (home, tmp_path))
    assert once == twice    # but for the stories told, which are short in a fork


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
    done = nanomoe("bench", "train", "--preset", "smoke", "--steps", 2, "--batch-size", 1, "--set", "vocab_size=3", "--set", "max_seq_len=32", "--set", "seq_len=32")
    assert done.returncode == 0 and "transformers eager" in done.stdout and "x" in done.stdout, done.stderr
    assert "do not fit" in refused("bench", "decode", "--preset", "smoke", "--prompt", 400, "--new", 300)
    done = nanomoe("bench", "data", "--preset", "smoke", "--runs", 1, "--set", "stories=50")
    assert done.returncode == 0 and "50 stories" in done.stdout and "write_shards" in done.stdout, done.stderr


def test_settings_lists_what_set_takes():
    listed = re.findall(r"^│ (\S+) +│ (.*?) +│$", nanomoe("settings", "--preset", "smoke").stdout, flags=re.M)
    assert {"d_model", "tokens", "sft.epochs", "dpo.beta"} <= dict(listed).keys()
    assert override(preset("smoke"), [f"{name}={value}" for name, value in listed]) == preset("smoke")
