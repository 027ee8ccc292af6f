"""Commands with accidents: one process imports everything once, and a fork of it runs each command, so that a second is enough for a run."""
import json
import os
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-planted-0123456789abcdef"     # no output and no file may ever hold it
TINY = ["--preset", "smoke", "--device", "cpu", *(word for setting in (
    "d_model=16 n_heads=2 n_kv_heads=1 d_ff=16 vocab_size=400 stories=150 val_stories=20 tokens=20480 tokenizer_stories=150 max_seq_len=1100 "
    "sft.examples=16 sft.val_examples=4 dpo.examples=16").split() for word in ("--set", setting))]

SERVER = r'''
import builtins, errno, json, os, signal, sys, time, traceback
import matplotlib.figure, torch
import nanomoe.cli, nanomoe.dpo, nanomoe.export, nanomoe.generate, nanomoe.llm, nanomoe.scorecard, nanomoe.train, nanomoe.viz
import openai
matplotlib.figure.Figure.savefig = lambda figure, file, **_: file.write(b"a picture")
import torch._dynamo    # which the first optimiser would import

def short_story(model, prompts, max_new_tokens=12, stream=nanomoe.generate.stream, **named): return stream(model, prompts, min(max_new_tokens, 12), **named)
nanomoe.generate.stream = short_story       # whole ones take longer than all the rest

def before(name, do, nth=1):
    "Do something just before a new file takes the place of the old `name`, the nth time."
    real, left = os.replace, [nth]
    def replace(old, new):
        left[0] -= str(new).endswith(name)
        if not left[0] and str(new).endswith(name): do()
        real(old, new)
    os.replace = replace

def kill(number=signal.SIGKILL): os.kill(os.getpid(), number)

def full_disk(name, appending=False):
    "Whatever is written for `name`, or added to it, meets a full disk."
    real = builtins.open
    def open_(path, mode="r", *more, **named):
        ours = str(path).endswith("/" + name) if appending else f".{name}." in str(path)
        return real("/dev/full" if ours and mode[0] in "wa" else path, mode, *more, **named)
    builtins.open = open_

def run(job):
    signal.alarm(900)    # rather than hang
    os.chdir(job["folder"])
    for number, name in enumerate(("in", "out", "err")): os.dup2(os.open(job[name], os.O_RDWR | os.O_CREAT | os.O_TRUNC * (number > 0)), number)
    sys.argv = ["nanomoe", *job["words"]]
    os.environ.update(job["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        exec(job["accident"], globals())
        nanomoe.cli.main()
        code = 0
    except SystemExit as end: code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job: answer = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
    else:
        answer = os.fork()
        if not answer: run(job)
    print(answer, file=answers, flush=True)
'''


class Done(NamedTuple):
    "How a command ended. A negative status is the signal that killed it; 99 stands for a traceback."
    status: int
    out: str
    err: str


class Running:
    def __init__(self, pid, where): self.pid, self.where = pid, where
    def kill(self, number=signal.SIGKILL): os.kill(self.pid, number)

    def wait(self) -> Done:
        done = Done(_ask({"wait": self.pid}), *((self.where / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")))
        assert KEY not in done.out + done.err
        return done


@lru_cache
def _server():
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg", "PYTHONUTF8": "1", "OPENAI_API_KEY": KEY, "COLUMNS": "200"}
    return subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)   # it ends with our end of the pipe


def _ask(job):
    server = _server()
    print(json.dumps(job), file=server.stdin, flush=True)
    return int(server.stdout.readline())


def start(*words, accident="", input="", env={}, folder=".", number=[0]) -> Running:
    "Start a command; `accident` is Python that is run just before it, `input` what somebody types."
    number[0] += 1
    where = _scratch() / str(number[0])
    where.mkdir()
    (where / "in").write_text(input, encoding="utf-8")
    files = {name: str(where / name) for name in ("in", "out", "err")}
    return Running(_ask({"words": [str(word) for word in words], "accident": accident, "env": env, "folder": str(Path(folder).resolve()), **files}), where)


def nanomoe(*words, **more) -> Done: return start(*words, **more).wait()


def until(seen):
    "Wait for what a command is doing, and fail if it never does it, for instance because it has ended."
    end = time.monotonic() + 300
    while not seen():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


@lru_cache
def _scratch():
    import atexit, shutil, tempfile
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
