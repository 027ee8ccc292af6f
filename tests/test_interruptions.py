"""Training that is killed, stopped, split over processes or fed nonsense: same losses, nothing lost, one clear sentence."""
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from forks import nanomoe, start, until
from nanomoe import train
from nanomoe.checkpoint import load_checkpoint, load_model
from nanomoe.config import ModelConfig, Preset, TrainConfig
from nanomoe.data import write_shards
from nanomoe.files import UserError
from nanomoe.stories import storybook
from nanomoe.tokenizer import save_tokenizer, train_tokenizer
from nanomoe.train import Stopped, pretrain, read_log

TINY = Preset(ModelConfig(vocab_size=300, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=16, max_seq_len=64),
              TrainConfig(tokens=64 * 8 * 40, batch_size=8, seq_len=64, evals=4, log_every=1))
SETTINGS = ["vocab_size=300", "d_model=16", "n_layers=2", "n_heads=2", "n_kv_heads=1", "d_ff=16", "max_seq_len=64",
            f"tokens={64 * 8 * 40}", "batch_size=8", "seq_len=64", "evals=4", "log_every=1"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "A home with a tokenizer and shards."
    home = tmp_path_factory.mktemp("home")
    stories = list(storybook(n=60))
    tok = train_tokenizer([story.text for story in stories], 300)
    save_tokenizer(tok, home / "tokenizer.json")
    write_shards({"train": stories[:50], "val": stories[50:]}, tok, home / "data" / "shards")
    return home


@pytest.fixture
def home(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "home")
    return tmp_path / "home"


def losses(home):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_log(home / "artifacts" / "pretraining" / "train_log.jsonl")]


def tokens(home): return [row["tokens"] for row in read_log(home / "artifacts" / "pretraining" / "train_log.jsonl")]


def weights(home, name="ckpt_last.pt"):
    return load_checkpoint(home / "artifacts" / "pretraining" / name)["model"]


def same(a, b): return all(torch.equal(a[name], b[name]) for name in a)


def command(home, *more):
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return ["pretrain", "--home", str(home), "--device", "cpu", *settings, *more]


needs_forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")     # Windows has no SIGINT for another process either, and no gloo under torchrun


def finished(*words):
    done = nanomoe(*words)
    assert done.status == 0, done.err
    return done


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    home = tmp_path_factory.mktemp("whole") / "home"
    shutil.copytree(prepared, home)
    finished(*command(home))
    return home


@needs_forks
@pytest.mark.parametrize("after", [3, 17, 31])
def test_kill_and_resume_gives_the_same_losses(home, uninterrupted, after):
    process = start(*command(home, "--set", "save_minutes=0"))
    log = home / "artifacts" / "pretraining" / "train_log.jsonl"
    until(lambda: len(read_log(log)) >= after)
    process.kill()
    assert process.wait().status == -signal.SIGKILL
    finished(*command(home))
    assert losses(home) == losses(uninterrupted)
    assert same(weights(home), weights(uninterrupted)) and same(weights(home, "ckpt_best.pt"), weights(uninterrupted, "ckpt_best.pt"))


@needs_forks
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_and_says_how_to_go_on(home, sent):
    process = start(*command(home, "--set", "tokens=100_000_000", "--set", "evals=1"))
    log = home / "artifacts" / "pretraining" / "train_log.jsonl"
    until(lambda: len(read_log(log)) >= 3)
    process.kill(sent)
    status, _, error = process.wait()
    assert status == 130 and "the same command goes on from there" in error and "Traceback" not in error
    saved = load_checkpoint(home / "artifacts" / "pretraining" / "ckpt_last.pt")
    assert saved["step"] == len(read_log(log)) >= 3


def test_a_stop_in_the_last_evaluation_is_heard(home):
    def sample(model):
        if len(read_log(home / "artifacts" / "pretraining" / "val_log.jsonl")) == 3: signal.raise_signal(signal.SIGINT)
        return "Once."
    with pytest.raises(Stopped, match="after the last step"): pretrain(home, TINY, sample=sample)
    assert pretrain(home, TINY)["step"] == 40       # all of it was saved


# torchrun on this machine alone: it finds a port by itself, and host names, which may resolve to anything, play no part
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1")
LOOPBACK = {"linux": {"GLOO_SOCKET_IFNAME": "lo"}, "darwin": {"GLOO_SOCKET_IFNAME": "lo0"}}.get(sys.platform, {})


def under_torchrun(*words):
    done = subprocess.run([*TORCHRUN, "--nproc-per-node=2", "-m", "nanomoe.cli", *words], env={**os.environ, **LOOPBACK}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def three_at_once(*words):
    "What torchrun does, without the time that the imports of three processes take. They share eight rows as 3 + 3 + 2."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **LOOPBACK}
    for process in [start(*words, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(3)]:
        status, _, error = process.wait()
        assert status == 0, error


@needs_forks
@pytest.mark.parametrize("optimizer, several", [("muon", under_torchrun), ("adamw", three_at_once)])
def test_processes_share_a_batch(prepared, home, tmp_path, optimizer, several):
    # gentle rates: rounding differs between the two, and a router at an edge would turn that into another choice
    gentle = ["--set", f"optimizer={optimizer}", "--set", "lr=1e-3", "--set", "muon_lr=1e-3", "--set", "tokens=10240", "--set", "grad_accum=2"]
    alone = tmp_path / "alone"
    shutil.copytree(prepared, alone)
    finished(*command(alone, *gentle))
    several(*command(home, *gentle))
    assert len(losses(home)) == 10
    for (_, ours, _), (_, theirs, _) in zip(losses(home), losses(alone), strict=True): assert abs(ours - theirs) < 1e-5
    assert tokens(home) == tokens(alone) == [1024 * step for step in range(1, 11)]


class Killed(BaseException): pass


def test_a_worse_score_never_replaces_the_best(home, monkeypatch):
    "Not even in a run that goes on after a kill, and has only heard of the best one."
    scores, evaluations = {0: 3.0, 1: 2.0, 2: 2.5, 3: 4.0}, lambda: len(read_log(home / "artifacts" / "pretraining" / "val_log.jsonl"))
    monkeypatch.setattr(train, "evaluate", lambda *_: {"nats": scores[evaluations()], "bpb": scores[evaluations()]})

    def sample(model):
        if evaluations() == 2: raise Killed
        return "Once."

    with pytest.raises(Killed): pretrain(home, TINY, sample=sample)
    kept = weights(home, "ckpt_best.pt")
    assert same(kept, weights(home))        # of the second evaluation, after step 20
    best = pretrain(home, TINY)
    assert best["step"] == 20 and best["bpb"] == 2.0 and evaluations() == 4 and not same(kept, weights(home))
    assert pretrain(home, TINY) == best     # finished: nothing is trained again
    assert same(kept, weights(home, "ckpt_best.pt"))


def test_a_checkpoint_of_another_run_is_refused(home):
    pretrain(home, TINY)
    before = weights(home)
    with pytest.raises(UserError, match="with d_ff=16, now 32"): pretrain(home, Preset(replace(TINY.model, d_ff=32), TINY.train))
    with pytest.raises(UserError, match="with lr=.*now 1e-05.*nanomoe pretrain --fresh --home .*/home`"): pretrain(home, Preset(TINY.model, replace(TINY.train, lr=1e-5)))
    assert same(before, weights(home))
    assert pretrain(home, Preset(TINY.model, replace(TINY.train, lr=1e-5)), fresh=True)["step"] > 0


def test_a_larger_budget_goes_on_and_never_replaces_the_best_by_a_worse(home, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 0.5])
    monkeypatch.setattr(train, "evaluate", lambda *_: {"nats": 0.0, "bpb": next(scores)})
    grown = lambda factor, **settings: Preset(TINY.model, replace(TINY.train, tokens=TINY.train.tokens * factor, evals=2, **settings))
    pretrain(home, grown(1))
    kept, log = weights(home, "ckpt_best.pt"), (home / "artifacts" / "pretraining" / "train_log.jsonl").read_text()
    best = pretrain(home, grown(2))
    assert best == {"nats": 0.0, "bpb": 1.0, "step": grown(1).train.steps} and same(kept, weights(home, "ckpt_best.pt"))
    assert (home / "artifacts" / "pretraining" / "train_log.jsonl").read_text().startswith(log)
    with pytest.raises(UserError, match="with tokens=40960, now 20480"): pretrain(home, grown(1))
    with pytest.raises(UserError, match="with lr="): pretrain(home, grown(3, lr=1e-5))
    assert pretrain(home, grown(3))["bpb"] == 0.5 and not same(kept, weights(home, "ckpt_best.pt"))


def test_what_was_only_stopped_keeps_its_budget(home):
    def stop(model): signal.raise_signal(signal.SIGINT)
    with pytest.raises(Stopped, match="the same command goes on from there.$"): pretrain(home, TINY, sample=stop)
    with pytest.raises(UserError, match="with tokens=20480, now 40960"): pretrain(home, Preset(TINY.model, replace(TINY.train, tokens=2 * TINY.train.tokens)))
    with pytest.raises(Stopped, match="without --fresh.$"): pretrain(home, TINY, fresh=True, sample=stop)


def test_a_finished_run_that_lost_a_checkpoint_is_not_trained_again(home):
    "What is left of it stays as it is; whoever wants it anew says so."
    pretrain(home, TINY)
    best, last = (home / "artifacts" / "pretraining" / name for name in ("ckpt_best.pt", "ckpt_last.pt"))
    kept = best.read_bytes()
    moved = last.rename(last.with_name("away"))
    with pytest.raises(UserError, match="ckpt_last.pt beside it is missing.*--fresh"): pretrain(home, TINY)
    assert best.read_bytes() == kept and not last.exists()
    moved.rename(last)
    content = load_checkpoint(last)
    torch.save({**content, "best": {**content["best"], "step": 10}}, last)
    best.unlink()
    with pytest.raises(UserError, match="ckpt_best.pt is missing: restore it"): pretrain(home, TINY)
    assert pretrain(home, TINY, fresh=True)["step"] and best.is_file()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "one bit"])
def test_a_damaged_checkpoint_is_refused_and_kept(home, damage):
    pretrain(home, TINY)
    path = home / "artifacts" / "pretraining" / "ckpt_last.pt"
    whole = path.read_bytes()
    weight = whole.index(weights(home)["embed.weight"].numpy().tobytes()[:64])
    flipped = whole[:weight] + bytes([whole[weight] ^ 1]) + whole[weight + 1:]
    data = {"cut": whole[:-500], "empty": b"", "text": b"not a checkpoint", "one bit": flipped}[damage]
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"): pretrain(home, TINY)
    with pytest.raises(UserError, match="damaged"): load_model(path)
    assert path.read_bytes() == data


def test_a_malicious_pickle_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self): return (os.mkdir, (str(tmp_path / "sprung"),))
    torch.save({"config": Trap(), "model": {}}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="damaged"): load_model(tmp_path / "bad.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_loss_that_is_not_a_number_stops_the_run(home):
    folder = home / "artifacts" / "pretraining"
    wild = Preset(TINY.model, replace(TINY.train, optimizer="adamw", lr=1e30, grad_clip=0.0))
    with pytest.raises(UserError, match="The loss is"): pretrain(home, wild)
    for name in ("ckpt_last.pt", "ckpt_best.pt"):
        if (folder / name).exists(): assert all(p.isfinite().all() for p in weights(home, name).values())


def no_number(objective, model, cfg, optimizers, batches, step): raise train._diverged(step + 1, math.nan, 1.0)


def test_a_loss_that_is_no_number_at_once(home, monkeypatch):
    "No checkpoint is there yet, and none is spoken of."
    monkeypatch.setattr(train, "train_step", no_number)
    with pytest.raises(UserError, match="at step 1: training stopped, and what was saved before stays; lower") as caught: pretrain(home, TINY)
    assert "ckpt_best.pt" not in str(caught.value) and not list(home.rglob("ckpt_*"))


def test_a_fresh_run_that_fails_at_once_has_lost_nothing(home, monkeypatch):
    folder = home / "artifacts" / "pretraining"
    best = pretrain(home, TINY)
    before = {name: (folder / name).read_bytes() for name in ("ckpt_last.pt", "ckpt_best.pt", "train_log.jsonl", "val_log.jsonl")}
    monkeypatch.setattr(train, "train_step", no_number)
    for _ in range(2):      # the second failure has nothing to keep, and keeps what is there
        with pytest.raises(UserError, match="loss is nan"): pretrain(home, TINY, fresh=True)
        found = {name: (folder / (name if name == "ckpt_best.pt" else f"{name}.old")).read_bytes() for name in before}
        assert found == before and not (folder / "ckpt_last.pt").exists()
    monkeypatch.undo()
    back = home.parent / "back"
    shutil.copytree(home, back)
    for old in back.rglob("*.old"): old.replace(old.with_suffix(""))
    assert pretrain(back, TINY) == best and (back / "artifacts" / "pretraining" / "train_log.jsonl").read_bytes() == before["train_log.jsonl"]

    def kept(model): return repr(sorted(path.name for path in folder.glob("*.old")))
    pretrain(home, TINY, sample=kept)       # as after a kill: not gone on from the old one, which is kept until this one has saved
    rows = read_log(folder / "val_log.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30, 40] and rows[0]["sample"].count(".old") == 3 and rows[1]["sample"] == "[]"


def test_a_checkpoint_is_never_newer_than_its_logs(home, monkeypatch):
    "Not even after a power cut, when what was not asked for may be missing from the disk."
    folder, saved, checked, fsync, rename = home / "artifacts" / "pretraining", {}, [], os.fsync, os.replace
    def recorded(number):
        saved[os.fstat(number).st_ino] = os.fstat(number).st_size
        fsync(number)

    def checking(old, new):
        if str(new).endswith("ckpt_last.pt"):
            logs = [(folder / name).stat() for name in ("train_log.jsonl", "val_log.jsonl")]
            checked.append(all(log.st_size == saved[log.st_ino] for log in logs))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "replace", checking)
    pretrain(home, Preset(TINY.model, replace(TINY.train, save_minutes=0)))
    assert checked == [True] * 40


@needs_forks
def test_logs_are_whole_and_say_what_they_should(uninterrupted):
    folder = uninterrupted / "artifacts" / "pretraining"
    rows = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert {"tokens", "loss", "ce", "load_balance", "z", "grad_norm", "lr", "load", "entropy", "tokens_per_s", "memory_mb"} <= rows[0].keys()
    assert all(abs(sum(layer) - 1) < 1e-3 for row in rows for layer in row["load"])
    assert [row["step"] for row in read_log(folder / "val_log.jsonl")] == [10, 20, 30, 40]
