"""Every row of the table in nbs/troubleshooting.qmd: nothing is lost, one clear sentence, the right exit status."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
import torch

from forks import KEY, ROOT, TINY, nanomoe, start, until
from nanomoe.checkpoint import load_checkpoint
from nanomoe.train import read_log

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="commands are forked, and full disks are /dev/full")
is_root = hasattr(os, "geteuid") and os.geteuid() == 0
WITHOUT_DEVICE = [*TINY[:2], *TINY[4:]]     # for commands that use no device


class Row(NamedTuple):
    fault: str
    says: str
    status: str
    then: str
    test: str


def rows_of_the_docs():
    text = (ROOT / "nbs" / "troubleshooting.qmd").read_text(encoding="utf-8")
    return [Row(*map(str.strip, line.strip("|\n").split("|"))) for line in re.findall(r"^\|.*\|$", text, re.M)[2:]]


ROWS = {row.test.strip("`"): row for row in rows_of_the_docs()}


@pytest.fixture
def says(request):
    "Checks how a command ended against the docs' row for this test, and that no temporary file is left in its home."
    row = ROWS[request.function.__name__]

    def check(done, home=None, where="err"):
        text = getattr(done, where)
        assert done.status == (-9 if row.status == "137" else int(row.status)), done
        if row.says == "(nothing)": assert not done.err, done.err
        else:
            sentence = re.escape(row.says).replace("…", ".*")
            assert len(re.findall(f"^(Error: )?{sentence}$", text, re.M)) == 1, text
            if where == "err": assert text.strip().count("\n") == 0, text
        if home and row.status != "137": assert not list(home.rglob("*.tmp"))
    return check


def test_the_table_and_the_tests_agree():
    tests = [name for name, value in globals().items() if name.startswith("test_") and "says" in value.__code__.co_varnames]
    assert list(ROWS) == tests


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A home in which a run has come to its end."
    home = tmp_path_factory.mktemp("finished") / "home"
    done = nanomoe("run", "--home", home, *TINY)
    assert done.status == 0, done
    return home


@pytest.fixture
def home(finished, tmp_path):
    "A copy of it. At the end no file in it holds the key."
    shutil.copytree(finished, tmp_path / "home")
    yield tmp_path / "home"
    for path in (tmp_path / "home").rglob("*"): assert path.is_dir() or KEY.encode() not in path.read_bytes()


@pytest.fixture
def untrained(home):
    "One that has tokenizer and shards."
    for name in ("artifacts", "reports", "data/synthetic"): shutil.rmtree(home / name)
    return home


def contents(home):
    "All that has to be the same after an interruption: every byte, but for the times and memory in the logs."
    found = {str(path.relative_to(home)): path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file() and path.name not in (".lock", ".lock.json")}
    for name in found:
        if name.endswith("train_log.jsonl"):
            found[name] = [{key: value for key, value in row.items() if key not in ("tokens_per_s", "memory_mb")} for row in read_log(home / name)]
        if name.endswith("ckpt_last.pt"): found[name] = plain(load_checkpoint(home / name))      # its bytes tell which strings were one object
    return found


def plain(value): # so that == says whether two checkpoints are the same
    if isinstance(value, torch.Tensor): return value.shape, value.numpy().tobytes()
    if isinstance(value, dict): return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def same(home, finished, folder=""): return contents(home / folder) == contents(finished / folder)


STAGES = {"tokenizer": "before('tokenizer.json', kill)", "shards": "before('val.bin', kill)",      # train.bin is a new one already
          "pretraining": "before('pretraining/ckpt_last.pt', kill, 2)", "seeds": "before('prompt_seeds.jsonl', kill)",
          "SFT data": "before('sft_val.jsonl', kill)", "DPO data": "before('dpo_val.jsonl', kill)",
          "SFT": "before('sft/ckpt_best.pt', kill)", "DPO": "before('dpo/ckpt_last.pt', kill)", "scorecard": "before('scorecard.json', kill)"}


def test_kill_9_in_every_stage(finished, tmp_path, says):
    home, before = tmp_path / "home", {}
    for stage, accident in STAGES.items():
        says(nanomoe("run", "--home", home, *TINY, accident=accident), home)
        now = {name: value for name, value in contents(home).items() if ".tmp" not in name}
        assert before.keys() <= now.keys(), stage      # what was there is there
        before = now
    done = nanomoe("run", "--home", home, *TINY)
    assert done.status == 0, done
    for leftover in home.rglob(".*.tmp"): leftover.unlink()     # of the killed, swept up after a day
    assert same(home, finished)


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_stop_in_training(untrained, finished, says, number):
    says(nanomoe("pretrain", "--home", untrained, *TINY, accident=f"before('ckpt_last.pt', lambda: kill(signal.{number}))"), untrained)
    assert load_checkpoint(untrained / "artifacts/pretraining/ckpt_last.pt")["step"] == 6     # the evaluation is after step 5, and a step is finished
    assert nanomoe("pretrain", "--home", untrained, *TINY).status == 0
    assert load_checkpoint(untrained / "artifacts/pretraining/ckpt_best.pt")["model"]["embed.weight"].equal(load_checkpoint(finished / "artifacts/pretraining/ckpt_best.pt")["model"]["embed.weight"])


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_stop_elsewhere(home, finished, says, number):
    says(nanomoe("prepare-data", "--home", home, *WITHOUT_DEVICE, accident=f"before('train.bin', lambda: kill(signal.{number}))"), home)
    assert same(home, finished)


def test_a_stop_at_the_very_start(tmp_path, says):
    (tmp_path / "typer.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", "from nanomoe.cli import main; main()"], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=300)[1] == "" and process.returncode == int(ROWS["test_a_stop_at_the_very_start"].status)


def test_a_full_disk_for_shards(home, finished, says):
    says(nanomoe("prepare-data", "--home", home, *WITHOUT_DEVICE, accident="full_disk('train.bin')"), home)
    assert same(home, finished)


@pytest.mark.parametrize("name", ["ckpt_last.pt", "ckpt_best.pt"])
def test_a_full_disk_for_a_checkpoint(untrained, finished, says, name):
    says(nanomoe("pretrain", "--home", untrained, *TINY, accident=f"full_disk('{name}')"), untrained)
    assert nanomoe("pretrain", "--home", untrained, *TINY).status == 0
    assert same(untrained, finished, "artifacts/pretraining")


def test_a_full_disk_for_jsonl(home, finished, says):
    says(nanomoe("make-prompt-seeds", "--home", home, *WITHOUT_DEVICE, accident="full_disk('prompt_seeds.jsonl')"), home)
    assert same(home, finished)


def test_a_full_disk_for_a_log(untrained, finished, says):
    says(nanomoe("pretrain", "--home", untrained, *TINY, accident="full_disk('val_log.jsonl', appending=True)"), untrained)
    with open(untrained / "artifacts/pretraining/val_log.jsonl", "a") as file: file.write('{"step": 5, "bp')      # what a disk does with the rest of a line
    assert nanomoe("pretrain", "--home", untrained, *TINY).status == 0
    assert same(untrained, finished, "artifacts/pretraining")


def test_a_tokenizer_cut_short(home, finished, says):
    path = home / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:5000])
    says(nanomoe("generate", "--home", home), home)
    assert nanomoe("run", "--home", home, *TINY).status == 0 and same(home, finished)


@pytest.mark.parametrize("damage", ["a flipped bit", "another one"])
def test_another_tokenizer(home, finished, says, damage):
    path = home / "tokenizer.json"
    if damage == "another one": assert nanomoe("tokenizer", "--fresh", "--seed", 9, "--home", home, *WITHOUT_DEVICE).status == 0
    else: path.write_bytes(path.read_bytes().replace(b'"~":', b'"\x7f":'))    # a letter that no story has
    for words in (["generate"], ["generate", "--checkpoint", home / "artifacts/pretraining/ckpt_best.pt"]): says(nanomoe(*words, "--home", home), home)
    assert nanomoe("run", "--home", home, *TINY).status == 0 and same(home, finished)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_shard(home, finished, says, damage):
    path = home / "data/shards/train.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-1000] if damage == "cut" else data[:500] + bytes([data[500] ^ 8]) + data[501:])
    says(nanomoe("pretrain", "--home", home, *TINY), home)
    assert nanomoe("run", "--home", home, *TINY).status == 0 and same(home, finished)


def test_damaged_meta(home, finished, says):
    path = home / "data/shards/meta.json"
    path.write_bytes(path.read_bytes()[:100])
    for command in ("pretrain", "run"): says(nanomoe(command, "--home", home, *TINY), home)
    assert nanomoe("prepare-data", "--home", home, *WITHOUT_DEVICE).status == nanomoe("run", "--home", home, *TINY).status == 0
    assert same(home, finished)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint(home, says, damage):
    path = home / "artifacts/pretraining/ckpt_last.pt"
    data = path.read_bytes()
    middle = data.index(load_checkpoint(path)["model"]["embed.weight"].numpy().tobytes()[:64])
    damaged = data[:-100] if damage == "cut" else data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]
    path.write_bytes(damaged)
    says(nanomoe("pretrain", "--home", home, *TINY), home)
    says(nanomoe("generate", "--home", home, "--checkpoint", path), home)
    assert path.read_bytes() == damaged


def test_a_checkpoint_of_another_config(home, says):
    path = home / "artifacts/dpo/ckpt_best.pt"
    content = load_checkpoint(path)
    torch.save({**content, "config": {**content["config"], "d_ff": 32}}, path)
    data = path.read_bytes()
    says(nanomoe("generate", "--home", home), home)
    assert path.read_bytes() == data


def test_other_settings(home, finished, says):
    says(nanomoe("pretrain", "--home", home, *TINY, "--set", "d_ff=32"), home)
    assert same(home, finished)


def test_two_runs_in_one_home(home, finished, says):
    first = start("run", "--home", home, *TINY, accident="before('config.json', lambda: time.sleep(60))")
    until(lambda: (home / ".lock.json").is_file() and (home / ".lock.json").read_bytes())
    for command, env in (("run", {}), ("pretrain", {}), ("pretrain", {"RANK": "1"})):      # the last: not one of torchrun's, which also tells how many there are
        second = nanomoe(command, "--home", home, *TINY, "--fresh", env=env)
        assert f"process {first.pid} " in second.err and str(time.localtime().tm_year) in second.err
        says(second)
    assert nanomoe("generate", "--home", home).status == 0
    first.kill()
    assert first.wait().status == -signal.SIGKILL
    assert nanomoe("pretrain", "--home", home, *TINY).status == 0     # free at once
    for leftover in home.rglob(".*.tmp"): leftover.unlink()
    assert same(home, finished)


def test_the_clock_is_set_back(home, finished, says):
    for name in ("artifacts/sft", "artifacts/dpo", "reports"): shutil.rmtree(home / name)
    for path in home.rglob("*"): os.utime(path, (2e9, 2e9))       # 2033
    says(nanomoe("run", "--home", home, *TINY, accident="time.time = lambda: 1e9"), home)     # 2001
    assert same(home, finished)


def test_a_read_only_home(home, says):
    folders = [home, *(path for path in home.rglob("*") if path.is_dir())]
    for folder in folders: folder.chmod(0o555)
    # root may write everywhere, until it gives that up; as another user it could not read a virtual environment of its own
    nobody = "import ctypes; assert not ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())" if is_root else ""
    says(nanomoe("run", "--home", home, *TINY, accident=nobody), home)
    for words in (["pretrain", *TINY], ["train-sft", "--preset", "smoke", "--device", "cpu", "--fresh"]):
        done = nanomoe(*words, "--home", home, accident=nobody)
        assert done.status == 1 and done.err.startswith("Error: Cannot write ") and done.err.count("\n") == 1, done
    assert nanomoe("generate", "--home", home, accident=nobody).status == 0
    for folder in folders: folder.chmod(0o755)


def test_stories_that_are_not_utf_8(tmp_path, says):
    (tmp_path / "latin.txt").write_bytes("Es war einmal ein Bär.\n<|endoftext|>\n".encode("latin-1") * 50)
    says(nanomoe("run", "--home", tmp_path / "home", "--stories", tmp_path / "latin.txt", *TINY), tmp_path)
    assert {path.name for path in (tmp_path / "home").iterdir()} <= {".lock"}


POISON = """
forward, left = nanomoe.train.Objective.forward, [8]
def poisoned(self, *batch):
    losses, load, entropy = forward(self, *batch)
    left[0] -= 1
    return losses._replace(total=losses.total * float("nan")) if not left[0] else losses, load, entropy
nanomoe.train.Objective.forward = poisoned
"""


def test_a_loss_that_is_nan(untrained, finished, says):
    says(nanomoe("pretrain", "--home", untrained, *TINY, accident=POISON), untrained)
    last, best = (load_checkpoint(untrained / "artifacts/pretraining" / name) for name in ("ckpt_last.pt", "ckpt_best.pt"))
    assert last["step"] == 5 and all(tensor.isfinite().all() and tensor.equal(best["model"][name]) for name, tensor in last["model"].items())
    assert nanomoe("pretrain", "--home", untrained, *TINY).status == 0
    assert same(untrained, finished, "artifacts/pretraining")


GREEDY = """
loss = nanomoe.train.NanoMoE.loss
def greedy(self, x, y):
    if len(x) > 2: raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return loss(self, x, y)
nanomoe.train.NanoMoE.loss = greedy
"""


def test_out_of_memory_in_evaluation(untrained, finished, says):
    says(nanomoe("pretrain", "--home", untrained, *TINY, accident=GREEDY), untrained, "out")
    ours, theirs = (read_log(home / "artifacts/pretraining/val_log.jsonl") for home in (untrained, finished))
    assert [row["step"] for row in ours] == [5, 10]
    for a, b in zip(ours, theirs): assert a["bpb"] == pytest.approx(b["bpb"], rel=1e-5)


def test_out_of_memory_in_training(untrained, finished, says):
    accident = POISON.replace("losses._replace", "(_ for _ in ()).throw(MemoryError()) if not left[0] else losses._replace")
    says(nanomoe("pretrain", "--home", untrained, *TINY, accident=accident), untrained)
    assert nanomoe("pretrain", "--home", untrained, *TINY).status == 0
    assert same(untrained, finished, "artifacts/pretraining")


def test_no_compiler(home, finished, says):
    accident = "import torch._inductor.config as inductor; inductor.cpp.cxx = (None, '/nowhere/g++')"
    says(nanomoe("generate", "Once", "--home", home, "--device", "cpu", "--compile", accident=accident), home)
    assert same(home, finished)


def test_a_real_disk_fills_up_and_grows(tmp_path, finished):
    "The same without tricks, where this process may mount a disk."
    def mount(*options): return subprocess.run(["mount", "-t", "tmpfs", "-o", *options, "tmpfs", str(tmp_path)], capture_output=True).returncode == 0
    if not is_root or not mount("size=600k"): pytest.skip("this system does not let us mount a small disk")
    try:
        home = tmp_path / "home"
        done = nanomoe("run", "--home", home, *TINY)
        assert done.status == 1 and "disk is full" in done.err and done.err.count("\n") == 1, done
        assert mount("remount,size=20m") and nanomoe("run", "--home", home, *TINY).status == 0
        assert same(home, finished)
    finally: subprocess.run(["umount", str(tmp_path)], check=True)
