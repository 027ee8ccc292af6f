"""The LLM writer against a real server on 127.0.0.1 that speaks the OpenAI protocol and misbehaves."""
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomoe import cli, llm
from nanomoe.files import UserError
from nanomoe.llm import (Interrupted, Request, append_jsonl, back_off, expected_cost, judge, llm_writer, mend, read_answers, read_jsonl, retry_after,
                         unanswered, write_with_llm)
from nanomoe.synth import Seed, broken_rules, make_sft_data, seed_row, write_rows

KEY = "sk-planted-0123456789abcdef"


def completion(text="Mia ran.", reason="stop", **message):
    return {"model": "fake", "choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": reason}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 3}}


class Handler(BaseHTTPRequestHandler):
    "Does with each letter what the server's plan for its prompt says; without a plan it answers."
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        letter = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = letter["messages"][-1]["content"]
        with self.server.lock:
            self.server.letters.append((time.monotonic(), prompt, letter, {name.lower(): value for name, value in self.headers.items()}))
            plan = self.server.plan[prompt]
            action = plan.pop(0) if plan else self.server.otherwise
        if isinstance(action, dict): action = (200, {}, action)
        getattr(self, action)() if isinstance(action, str) else self.say(*action)

    def say(self, status, headers, body, kind="application/json"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def half(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "5000")
        self.end_headers()
        self.wfile.write(b'{"choices": [{"mess')
        self.wfile.flush()
        self.close_connection = True

    def reset(self):
        self.half()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing now sends RST
        self.connection.close()

    def hang(self):
        self.server.stopping.wait(30)
        self.close_connection = True

    def drip(self):
        "Something comes all the time, for ten seconds, and never all of it."
        self.half()
        for _ in range(200):
            if self.server.stopping.wait(0.05):
                return
            try:
                self.wfile.write(b" ")
            except OSError:
                return

    def pause(self):
        self.server.stopping.wait(0.03)
        self.say(200, {}, completion())

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args):
        pass


@pytest.fixture
def server():
    server = Server(("127.0.0.1", 0), Handler)
    server.lock, server.stopping = threading.Lock(), threading.Event()
    server.letters, server.plan, server.otherwise = [], defaultdict(list), completion()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.stopping.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(llm, "_FIRST_WAIT", 0.01)


def requests(n, prompt="Write {}."):
    return [Request(f"seed-{k}", 0, prompt.format(k)) for k in range(n)]


def rows_of(path):
    "The rows of a file that is JSONL to its last line, by a reader that is not ours."
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.decode("utf-8").split("\n")[:-1]]


def one(server, path, *plan, **arguments):
    "The row for a single request, whose letters get these replies in turn."
    server.plan["Write 0."] = list(plan)
    write_with_llm(requests(1), path, base_url=server.url, **{"retries": 3, "timeout": 10, **arguments})
    (row,) = rows_of(path)
    return row


# ---- answers

def test_every_answer_is_kept_with_all_that_is_known_of_it(server, tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    assert write_with_llm(requests(20), path, base_url=server.url) == {"ok": 20}
    rows = rows_of(path)
    assert sorted(row["id"] for row in rows) == sorted(r.id for r in requests(20))
    assert rows[0].keys() == {"id", "attempt", "outcome", "text", "finish_reason", "model", "usage", "asked"}
    assert rows[0]["usage"] == {"prompt_tokens": 5, "completion_tokens": 3} and rows[0]["model"] == "fake"
    assert {p.name for p in path.parent.iterdir()} == {"answers.jsonl", ".lock"}     # no temporary file


def test_the_letter_holds_what_was_asked(server, tmp_path):
    request = Request("a", 3, "Write.", system="You tell stories.")
    write_with_llm([request], tmp_path / "a.jsonl", model="m", max_tokens=7, temperature=0.5, seed=1, base_url=server.url)
    ((_, _, letter, _),) = server.letters
    assert letter["messages"] == [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": "Write."}]
    assert (letter["model"], letter["max_tokens"], letter["temperature"]) == ("m", 7, 0.5)
    assert isinstance(letter["seed"], int)


def test_a_seed_is_another_for_each_request_and_attempt_and_the_same_each_time(server, tmp_path):
    asked = [Request(id, attempt, f"{id} {attempt}") for id in "ab" for attempt in range(3)]
    for name in ("one", "two"):
        write_with_llm(asked, tmp_path / name, seed=5, base_url=server.url)
    seeds = defaultdict(set)
    for _, prompt, letter, _ in server.letters:
        seeds[prompt].add(letter["seed"])
    assert all(len(s) == 1 for s in seeds.values()) and len(set.union(*seeds.values())) == 6


@pytest.mark.parametrize("body, outcome, text", [
    (completion("Mia ran."), "ok", "Mia ran."),
    (completion("Mia", "length"), "truncated", "Mia"),
    (completion("", "length"), "truncated", ""),
    (completion(None, refusal="No."), "refused", "No."),
    (completion("half", "content_filter"), "refused", "half"),
    (completion(" \n"), "empty", " \n"),
    (completion(None), "empty", ""),
    ({"choices": []}, "empty", ""),
    ({"choices": [{}]}, "empty", ""),
    (completion("Zoë \u2028 \u0000 \U0001F40C \"quoted\" \\ 雪"), "ok", "Zoë \u2028 \u0000 \U0001F40C \"quoted\" \\ 雪"),
    ((200, {}, b'{"choices": [{"message": {"content": "half a snail \\ud83d."}}]}'), "ok", "half a snail \ud83d."),
    ((200, {}, completion(), "text/plain"), "ok", "Mia ran."),      # the label is wrong, the letter is right
])
def test_outcomes(server, tmp_path, body, outcome, text):
    row = one(server, tmp_path / "a.jsonl", body)
    assert (row["outcome"], row["text"]) == (outcome, text)
    assert len(server.letters) == 1     # none of these is asked again
    assert read_answers(tmp_path / "a.jsonl")["seed-0", 0]["text"] == text


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["choices", "message", "content", "refusal", "finish_reason", "usage", "model"]), inner)))
def test_judge_takes_anything_or_says_ValueError(body):
    try:
        row = judge(body)
    except ValueError:
        return
    assert row["outcome"] in llm.OUTCOMES and isinstance(row["text"], str)
    json.dumps(row, allow_nan=False)


# ---- faults that pass

@pytest.mark.parametrize("fault", [
    (429, {}, {"error": {"message": "busy"}}), (429, {"Retry-After": "0"}, b""), (500, {}, b"oops"), (503, {"Retry-After": "soon"}, {}), (408, {}, {}),
    "half", "reset", (200, {}, b"{broken"), (200, {}, b""), (200, {}, b'{"choices": NaN}'), (200, {}, b"[" * 100_000), (200, {}, b"\xff\xfe"),
    (200, {}, b"<html>Log in</html>", "text/html"), (200, {}, {"error": {"message": "overloaded"}}), (200, {}, [1]),
], ids=str)
def test_what_may_pass_is_asked_again(server, tmp_path, fault):
    row = one(server, tmp_path / "a.jsonl", fault, fault)
    assert row["outcome"] == "ok" and len(server.letters) == 3


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_an_answer_that_never_ends_is_given_up_in_time(server, tmp_path, fault):
    row = one(server, tmp_path / "a.jsonl", fault, timeout=0.5)
    assert row["outcome"] == "ok" and len(server.letters) == 2


@pytest.mark.parametrize("fault, said", [((500, {}, b"oops"), "status 500, oops"), ((429, {}, {"error": {"message": "busy"}}), "status 429, busy"),
                                         ("reset", "the connection failed"), ("hang", "no answer within 0.5 s"), ("drip", "no answer within 0.5 s"), ((200, {}, b"x"), "no chat completion")], ids=str)
def test_out_of_retries_is_recorded_and_asked_again_by_the_next_run(server, tmp_path, fault, said):
    path = tmp_path / "a.jsonl"
    row = one(server, path, fault, fault, retries=1, timeout=0.5)
    assert row["outcome"] == "failed" and row["again"] and said in row["error"] and row["text"] == ""
    assert len(server.letters) == 2
    assert write_with_llm(requests(1), path, base_url=server.url) == {"ok": 1}
    answers = read_answers(path)
    assert answers["seed-0", 0]["outcome"] == "ok" and not answers.problems
    assert write_with_llm(requests(1), path, base_url=server.url) == {"kept": 1}


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_cannot_be_answered_is_recorded_for_good(server, tmp_path, status):
    path = tmp_path / "a.jsonl"
    row = one(server, path, (status, {}, {"error": {"message": "too long", "param": "messages"}}))
    assert (row["outcome"], row["again"], row["error"]) == ("failed", False, f"status {status}, too long")
    write_with_llm(requests(2)[1:], path, base_url=server.url)      # and another can be
    assert write_with_llm(requests(2), path, base_url=server.url) == {"kept": 2}
    assert len(server.letters) == 2


def test_a_server_that_refuses_everything_is_stopped_early_and_asked_anew_when_it_has_been_mended(server, tmp_path):
    server.otherwise = (400, {}, {"error": {"message": "maximum context length is 256"}})
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match="Ten requests in a row .*maximum context length is 256"): write_with_llm(requests(100), path, base_url=server.url)
    assert 10 <= len(server.letters) < 30
    server.otherwise = completion()
    assert write_with_llm(requests(100), path, base_url=server.url) == {"ok": 100}


def test_one_bad_request_does_not_disturb_the_others(server, tmp_path):
    server.plan["Write 3."] = [(400, {}, {})]
    server.plan["Write 5."] = ["reset"]
    server.plan["Write 7."] = [completion("", "length")]
    assert write_with_llm(requests(12), tmp_path / "a.jsonl", base_url=server.url) == {"ok": 10, "failed": 1, "truncated": 1}


# ---- waiting

@pytest.mark.parametrize("header", ["1", "date"])
def test_nobody_comes_before_the_server_asked_for_it(server, tmp_path, header):
    # a date has whole seconds: two seconds ahead is at least one
    value = header if header != "date" else formatdate(time.time() + 2, usegmt=True)
    server.plan["Write 0."] = [(429, {"Retry-After": value}, {})]
    write_with_llm(requests(1), tmp_path / "a.jsonl", base_url=server.url)
    (first, *_), (second, *_) = server.letters
    assert second - first >= 0.95


def test_one_429_makes_all_workers_wait(server, tmp_path):
    server.plan["Write 0."] = [(429, {"Retry-After": "1"}, {})]
    for k in range(1, 40):
        server.plan[f"Write {k}."] = ["pause"]
    write_with_llm(requests(40), tmp_path / "a.jsonl", concurrency=4, base_url=server.url)
    times = sorted(when for when, *_ in server.letters)
    assert max(b - a for a, b in zip(times, times[1:])) > 0.8


def test_a_wait_of_hours_is_left_to_the_next_run(server, tmp_path):
    row = one(server, tmp_path / "a.jsonl", (429, {"Retry-After": "86400"}, {}))
    assert row["outcome"] == "failed" and row["again"] and len(server.letters) == 1


@given(st.integers(1, 50), st.none() | st.floats(0, 1000), st.floats(0, 1))
def test_back_off_stays_in_its_bounds(tries, asked, draw):
    wait = back_off(tries, asked, draw=lambda: draw)
    assert wait >= (asked or 0)
    assert wait <= max(llm._LONGEST_WAIT, 1.1 * (asked or 0))
    assert back_off(tries + 1, asked, draw=lambda: draw) >= wait


@given(st.none() | st.text() | st.floats().map(str) | st.integers().map(str))
def test_retry_after_takes_any_header(header):
    seconds = retry_after(header)
    assert seconds is None or 0 <= seconds < float("inf")


@given(st.integers(0, 10**6))
def test_retry_after_reads_dates(ahead):
    now = 1_700_000_000
    assert retry_after(formatdate(now + ahead, usegmt=True), now) == ahead
    assert retry_after(formatdate(now - ahead - 1, usegmt=True), now) == 0


# ---- faults that do not pass

@pytest.mark.parametrize("status, body, word", [
    (401, {"error": {"message": "Incorrect API key"}}, "OPENAI_API_KEY"), (402, {}, "payment"), (403, {"error": "no"}, "allow"),
    (404, {"error": {"message": "model 'x' not found", "code": "model_not_found"}}, "--model"), (405, b"", "/v1"),
    (429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, "quota"),
    (400, {"error": {"message": "Use 'max_completion_tokens'", "param": "max_tokens"}}, "max_tokens"),
])
def test_what_would_repeat_stops_everything_with_one_sentence(server, tmp_path, status, body, word):
    server.otherwise = (status, {}, body)
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError) as caught:
        write_with_llm(requests(50), path, concurrency=4, base_url=server.url)
    assert word in str(caught.value) and "\n" not in str(caught.value)
    assert len(server.letters) <= 4 and not read_answers(path)
    server.otherwise = completion()
    assert write_with_llm(requests(50), path, base_url=server.url) == {"ok": 50}


def test_a_server_that_is_gone_stops_the_run_which_goes_on_later(server, tmp_path):
    for k in range(10, 60):
        server.plan[f"Write {k}."] = [(503, {}, {})] * 2
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match="Ten requests in a row"):
        write_with_llm(requests(100), path, concurrency=2, retries=1, base_url=server.url)
    assert Counter(row["outcome"] for row in rows_of(path)) == {"ok": 10, "failed": 10}
    server.plan.clear()
    assert write_with_llm(requests(100), path, base_url=server.url) == {"kept": 10, "ok": 90}


def test_nobody_listens(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=f"Nobody answers at 127.0.0.1:{port}"):
        write_with_llm(requests(20), tmp_path / "a.jsonl", base_url=f"http://127.0.0.1:{port}/v1")
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://127.0.0.1/v1", "http://", "http://a:b:c", "http://[", "file:///etc/hosts"])
def test_an_address_that_is_none(tmp_path, url):
    with pytest.raises(UserError, match="http://127.0.0.1:8080/v1"):
        write_with_llm(requests(1), tmp_path / "a.jsonl", base_url=url)


def test_numbers_that_make_no_sense(server, tmp_path):
    for wrong in ({"concurrency": 0}, {"retries": -1}):
        with pytest.raises(UserError):
            write_with_llm(requests(1), tmp_path / "a.jsonl", base_url=server.url, **wrong)


# ---- the key

def test_without_a_key_one_sentence_names_what_works(monkeypatch, tmp_path):
    for url in (None, "http://192.0.2.1/v1", "https://localhost.example.com/v1"):
        with pytest.raises(UserError) as caught:
            write_with_llm(requests(1), tmp_path / "a.jsonl", base_url=url)
        for word in ("OPENAI_API_KEY", "--writer corpus", "llama.cpp", "Ollama", "nanomoe llm-server"):
            assert word in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_local_server_needs_no_key_and_the_environment_names_it(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("127.0.0.1", "localhost"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")     # where nobody is
    assert write_with_llm(requests(2), tmp_path / "a.jsonl") == {"ok": 2}


@pytest.mark.parametrize("key", ["sk-bro\nken-0123456789", "sk-smart-‘quotes’", "sk two words 0123"])
def test_a_key_that_is_none_is_refused_without_showing_it(server, tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError) as caught:
        write_with_llm(requests(1), tmp_path / "a.jsonl", base_url=server.url)
    assert key[3:8] not in str(caught.value)


LEAKY = {
    "in the story": (200, {}, completion(f"The key is {KEY}.")), "in the model's name": (200, {}, {**completion(), "model": KEY}),
    "in a refusal": (200, {}, completion(None, refusal=KEY)), "in the reason": (200, {}, completion("x", KEY)),
    "in a 400": (400, {}, {"error": {"message": "x" * 190 + KEY}}), "in a 500": (500, {}, KEY.encode()),
    "in no JSON": (200, {}, KEY.encode()), "in a 401": (401, {}, {"error": {"message": f"Wrong: {KEY}"}}), "in a 404": (404, {}, f"<p>{KEY}</p>".encode()),
    "in a header": (429, {"Retry-After": KEY}, {}), "cut off": "half",
}


LEAKY_SCRIPT = """
import logging, os, sys, traceback
from nanomoe.llm import Request, write_with_llm
logging.basicConfig(level=os.environ["LEVEL"])
folder, url, *cases = sys.argv[1:]
for k, case in enumerate(cases):
    try: print(case, write_with_llm([Request("a", 0, case)], f"{folder}/{k}.jsonl", base_url=url, retries=0))
    except Exception: traceback.print_exc()
"""


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_the_key_reaches_the_server_and_nothing_else(server, tmp_path, level):
    "A process of its own, all its output and all its files."
    server.plan.update({case: [reply] for case, reply in LEAKY.items()})
    run = subprocess.run([sys.executable, "-c", LEAKY_SCRIPT, str(tmp_path), server.url, *LEAKY], capture_output=True, text=True, timeout=100,
                         env={**os.environ, "OPENAI_API_KEY": KEY + "\n", "LEVEL": level})
    assert [prompt for _, prompt, *_ in server.letters] == list(LEAKY)
    assert {headers["authorization"] for *_, headers in server.letters} == {f"Bearer {KEY}"}
    assert run.stderr.count("nanomoe.files.UserError: ") == 2 and run.stdout.count("Counter") == len(LEAKY) - 2
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert files.count(b"[key]") >= 5
    assert KEY[:12] not in run.stdout and KEY[:12].encode() not in files
    if level == "INFO":
        assert KEY[:12] not in run.stderr
    else:   # who asks the client to log everything gets the server's words, but never what we sent
        assert "Bearer" not in run.stderr


def test_no_exception_carries_the_key(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.otherwise = (401, {}, {"error": {"message": KEY}})
    with pytest.raises(UserError) as caught:
        write_with_llm(requests(3), tmp_path / "a.jsonl", base_url=server.url)
    error, seen = caught.value, []
    while error:
        seen.append(str(error) + repr(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert KEY not in "".join(seen)


# ---- interruptions

SCRIPT = """
import sys
from nanomoe.llm import Request, write_with_llm
write_with_llm([Request(f"seed-{k}", 0, f"Write {k}.") for k in range(200)], sys.argv[1], concurrency=8, base_url=sys.argv[2])
"""


def start(path, server, script=SCRIPT):
    return subprocess.Popen([sys.executable, "-c", script, str(path), server.url], stderr=subprocess.PIPE, text=True)


def wait_for_lines(process, path, n):
    deadline = time.monotonic() + 60
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < n):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_kill_in_the_middle_of_200_and_restart(server, tmp_path):
    server.otherwise, path = "pause", tmp_path / "answers.jsonl"
    for target in (40, 90, 130):
        process = start(path, server)
        wait_for_lines(process, path, target)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        with open(path, "ab") as file:      # what a kill in the middle of a write leaves
            file.write(b'{"id": "seed-199", "attempt": 0, "outcome": "ok", "te')
        before = len(read_answers(path))
        assert target <= before < 200
    letters = len(server.letters)
    counts = write_with_llm(requests(200), path, base_url=server.url)
    assert counts == {"kept": before, "ok": 200 - before}
    assert len(server.letters) - letters == 200 - before       # nothing that is kept is paid for again
    assert Counter(row["id"] for row in rows_of(path)) == {f"seed-{k}": 1 for k in range(200)}
    assert path.with_name("answers.jsonl.set-aside").read_bytes().count(b"\n") == 3
    assert letters - before <= 3 * 8        # what was under way when it was killed


AS_A_COMMAND = "import signal, sys; signal.signal(signal.SIGINT, lambda *_: sys.exit(130))" + SCRIPT     # as `nanomoe.cli.main` does


@pytest.mark.parametrize("script", [SCRIPT, AS_A_COMMAND])
def test_ctrl_c_leaves_a_whole_file_and_says_how_to_go_on(server, tmp_path, script):
    server.otherwise, path = "pause", tmp_path / "answers.jsonl"
    process = start(path, server, script)
    wait_for_lines(process, path, 30)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    done = len(rows_of(path))
    assert 30 <= done < 200
    assert f"Interrupted: Stopped with {done} of 200 requests answered" in err and "goes on" in err
    assert write_with_llm(requests(200), path, base_url=server.url) == {"kept": done, "ok": 200 - done}


def test_interrupted_counts_as_stopped_by_hand():
    assert issubclass(Interrupted, UserError) and Interrupted.status == 130


def test_two_runs_cannot_write_the_same_file(server, tmp_path):
    server.otherwise, path = "pause", tmp_path / "answers.jsonl"
    process = start(path, server)
    wait_for_lines(process, path, 5)
    with pytest.raises(UserError, match="is in use: process"):
        write_with_llm(requests(200), path, base_url=server.url)
    process.kill()
    process.communicate()
    server.otherwise = completion()
    write_with_llm(requests(200), path, base_url=server.url)     # the lock died with its owner


def test_limit_asks_a_few_and_then_a_few_more(server, tmp_path):
    path = tmp_path / "a.jsonl"
    assert write_with_llm(requests(10), path, limit=4, base_url=server.url) == {"ok": 4}
    assert write_with_llm(requests(10), path, limit=4, base_url=server.url) == {"kept": 4, "ok": 4}
    assert write_with_llm(requests(10), path, limit=4, base_url=server.url) == {"kept": 8, "ok": 2}
    assert write_with_llm(requests(10), path, limit=0, base_url=server.url) == {"kept": 10}
    assert write_with_llm([], path, base_url=server.url) == {}


def test_it_runs_inside_a_running_loop(server, tmp_path):
    import asyncio

    async def notebook():
        return write_with_llm(requests(3), tmp_path / "a.jsonl", base_url=server.url)
    assert asyncio.run(notebook()) == {"ok": 3}


def test_the_same_name_twice_and_other_words_under_a_name(server, tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match='"seed-0", attempt 0'):
        write_with_llm(requests(1) * 2, path, base_url=server.url)
    write_with_llm(requests(3), path, base_url=server.url)
    before = path.read_bytes()
    with pytest.raises(UserError, match="other instructions"):
        write_with_llm(requests(3, "Sing {}."), path, base_url=server.url)
    assert path.read_bytes() == before
    assert write_with_llm([Request("seed-0", 1, "Sing.")], path, base_url=server.url) == {"ok": 1}     # another attempt may be asked otherwise


def test_a_file_that_holds_something_else_is_left_alone(server, tmp_path):
    for content in (b'{"id": "seed-0", "prompt": "Write."}\n', b"a story\nand another\n", b"[1]\n[2]\n"):
        path = tmp_path / "theirs.jsonl"
        path.write_bytes(content)
        with pytest.raises(UserError, match="other lines than answers"):
            write_with_llm(requests(1), path, base_url=server.url)
        assert path.read_bytes() == content
    assert not server.letters


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_sentence():
    with pytest.raises(UserError, match="Cannot write /dev/full .*No space left"):
        append_jsonl("/dev/full", {"id": "a"})


def test_a_folder_in_the_way_is_one_sentence(server, tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "a.jsonl"):
        with pytest.raises(UserError, match="Cannot"):
            append_jsonl(path, {})
        with pytest.raises(UserError, match="Cannot"):
            write_with_llm(requests(1), path, base_url=server.url)


# ---- reading

def row(id, outcome="ok", attempt=0, **more):
    return {"id": id, "attempt": attempt, "outcome": outcome, "text": f"about {id}", **more}


def test_each_bad_line_is_named_and_nothing_good_is_lost(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps(row("a")).encode()
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([
        good, b"", json.dumps(row("b")).encode()[:20], json.dumps({"title": "foreign"}).encode(), b"[1, 2]", good, b"\xff\xfe", b"\x00" * 50,
        json.dumps(row("c")).encode() + b"\r", json.dumps(row("a", attempt=1)).encode(), json.dumps(row("d", "unheard of")).encode(),
        json.dumps({**row("e"), "attempt": True}).encode(), b'{"id": NaN}', json.dumps(row("f")).encode()[:-1]]))
    answers = read_answers(path)
    assert set(answers) == {("a", 0), ("c", 0), ("a", 1)}
    assert set(answers.problems) == {3, 4, 5, 6, 7, 8, 11, 12, 13, 14}
    assert "no JSON" in answers.problems[3] and "no answer" in answers.problems[4] and "second time" in answers.problems[6]
    assert answers.problems[14] == "is cut short"
    assert list(answers.problems) == sorted(answers.problems)


def test_mending_keeps_every_byte(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row("a")), "broken", json.dumps({"foreign": 1}), json.dumps(row("b")), '{"id": "c"']
    path.write_text("\n".join(lines))
    sentences = mend(path)
    assert [s.split(":")[0] for s in sentences] == ["a.jsonl, line 2 is no JSON", "a.jsonl, line 5 is cut short"]
    assert path.read_text() == "".join(lines[k] + "\n" for k in (0, 2, 3))
    assert path.with_name("a.jsonl.set-aside").read_text() == 'broken\n{"id": "c"\n'
    assert mend(path) == []


def test_a_whole_last_line_without_a_line_feed_is_kept(server, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row("seed-0")))
    assert write_with_llm(requests(2), path, base_url=server.url) == {"kept": 1, "ok": 1}
    assert [r["id"] for r in rows_of(path)] == ["seed-0", "seed-1"]


def test_failures_of_the_moment_give_way(tmp_path):
    path = tmp_path / "a.jsonl"
    for r in (row("a", "failed", again=True), row("a", "failed", again=True), row("a"), row("a", "failed", again=True), row("b", "failed", again=False)):
        append_jsonl(path, r)
    answers = read_answers(path)
    assert answers["a", 0]["outcome"] == "ok" and set(answers.problems) == {4}
    assert unanswered([Request("a", 0, ""), Request("b", 0, ""), Request("c", 0, "")], path) == [Request("c", 0, "")]


def test_no_file_holds_no_answers_but_is_no_jsonl(tmp_path):
    assert read_answers(tmp_path / "none") == {}
    with pytest.raises(UserError, match="Cannot read"):
        read_jsonl(tmp_path / "none")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(
    st.characters(exclude_categories=[]), max_size=20), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=4), max_size=6)


def same(a, b):
    "Two surrogates that make one character come back as that character."
    def whole(text):
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    return json.loads(whole(json.dumps(a, ensure_ascii=True))) == json.loads(json.dumps(b, ensure_ascii=True))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)     # hundreds of small files need not reach the disk
        yield tmp_path_factory.mktemp("jsonl") / "a.jsonl"


@given(rows=OBJECTS)
def test_what_is_appended_is_read(scratch, rows):
    scratch.write_bytes(b"")
    for r in rows:
        append_jsonl(scratch, r)
    read, problems = read_jsonl(scratch)
    assert not problems and list(read) == list(range(1, len(rows) + 1))
    assert all(same(a, b) for a, b in zip(rows, read.values()))
    assert scratch.read_bytes().count(b"\n") == len(rows)


@given(rows=OBJECTS, data=st.data())
def test_a_cut_anywhere_loses_one_line_at_most(scratch, rows, data):
    scratch.write_bytes(b"")
    for r in rows:
        append_jsonl(scratch, r)
    whole = scratch.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    scratch.write_bytes(whole[:cut])
    read, problems = read_jsonl(scratch)
    complete = whole[:cut].count(b"\n")
    assert set(range(1, complete + 1)) <= set(read)
    assert set(problems) <= {complete + 1}
    assert len(read) + len(problems) == complete + (cut > 0 and whole[cut - 1:cut] != b"\n")


@given(st.lists(st.one_of(st.binary(max_size=20), st.sampled_from([json.dumps(row(k)).encode() for k in "ab"])), max_size=8))
def test_any_bytes_are_read_and_every_line_is_accounted_for(lines):
    import tempfile
    from pathlib import Path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(b"\n".join(lines))
        read, problems = read_jsonl(path)
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert sorted([*read, *problems]) == [n for n, line in enumerate(content, 1) if line.strip()]
        answers = read_answers(path)
        assert len(answers) == len({line for line in lines if b'"outcome"' in line})
        try:
            mend(path)
        except UserError:
            assert path.read_bytes() == b"\n".join(lines)
            return
        assert read_jsonl(path)[1] == {} and read_answers(path) == answers
        left = [line for line in path.read_bytes().split(b"\n") if line.strip()]
        aside = path.with_name("a.jsonl.set-aside")
        moved = [line for line in aside.read_bytes().split(b"\n") if line.strip()] if aside.exists() else []
        assert sorted(left + moved) == sorted(line for line in content if line.strip())


# ---- instructions and pairs

def asked_for(names, split="train"):
    "Seeds that can be told apart by their instructions, whoever stands in for whom."
    return [Seed(f"{split}-{i}", split, name, "kindness", (f"{split} kite {i}",), (), 1, 3, i, "she") for i, name in enumerate(names)]


def told(seed):
    return f"{seed.protagonist} had a {seed.required[0]}. It flew."


def test_only_whole_answers_become_training_data(server, tmp_path):
    "Each of these texts keeps all the rules."
    seeds = asked_for(["Mia", "Zoe", "Ada", "Ivy", "Eve", "Amy", "Ida"]) + asked_for(["Una"], "val")
    text = {seed.id: told(seed) for seed in seeds}
    assert not any(broken_rules(text[seed.id], seed) for seed in seeds)
    replies = [completion(text["train-0"]), completion(None, refusal=text["train-1"]), completion(text["train-2"], "content_filter"), completion(text["train-3"], "length"),
               completion(" "), (400, {}, {"error": {"message": "too long"}}), (500, {}, b"oops"), completion(text["val-0"])]
    server.plan.update({seed.instruction: [reply] for seed, reply in zip(seeds, replies)})
    counts = make_sft_data(tmp_path, llm_writer(tmp_path / "a.jsonl", attempts=1, base_url=server.url, retries=0), seeds)
    assert counts == {"accepted": 2, "refused": 2, "truncated": 1, "empty": 1, "failed": 2}
    folder = tmp_path / "data" / "synthetic"
    assert [row["id"] for name in ("train", "val") for row in rows_of(folder / f"sft_{name}.jsonl")] == ["train-0", "val-0"]
    rejects = {row["id"]: (row["broken"], row["response"]) for row in rows_of(folder / "rejects.jsonl")}
    assert rejects["train-1"] == (["refused"], text["train-1"]) and rejects["train-5"] == (["failed"], "status 400, too long") and len(rejects) == 6


def test_what_is_no_answer_is_asked_again(server, tmp_path):
    seeds = asked_for(["Mia"]) + asked_for(["Una"], "val")
    for seed in seeds:
        server.plan[seed.instruction] = [completion(told(seed), "length"), completion(told(seed))]
    assert make_sft_data(tmp_path, llm_writer(tmp_path / "a.jsonl", base_url=server.url), seeds) == {"accepted": 2, "truncated": 2}


def test_what_got_no_answer_waits_for_the_next_run_and_is_not_paid_for_twice(server, tmp_path):
    seeds = asked_for(["Mia"]) + asked_for(["Una"], "val")
    for seed in seeds: server.plan[seed.instruction] = [completion(told(seed))] * 9
    server.plan[seeds[0].instruction].insert(0, (503, {}, {}))
    write = llm_writer(tmp_path / "a.jsonl", attempts=2, base_url=server.url, retries=0)
    with pytest.raises(UserError, match="No answer for train kept the rules.*'failed': 1"): make_sft_data(tmp_path, write, seeds)
    for _ in range(2): assert make_sft_data(tmp_path, write, seeds) == {"accepted": 2}
    assert [prompt for _, prompt, *_ in server.letters].count(seeds[0].instruction) == 2 and len(server.letters) == 3


def test_pairs_do_not_pay_for_the_held_out_answers_of_the_instructions(server, tmp_path, monkeypatch, capsys):
    seeds = asked_for(["Mia", "Zoe", "Ada"]) + asked_for(["Una", "Ida"], "val")
    write_rows(tmp_path / "data" / "synthetic" / "prompt_seeds.jsonl", map(seed_row, seeds))
    for seed in seeds:
        for hero in seeds:
            asked = replace(seed, protagonist=hero.protagonist)
            server.plan[asked.instruction] = [completion(told(asked))] * 9
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    for make in (cli.make_sft_data, cli.make_dpo_data): make(preset="smoke", home=tmp_path, writer="openai", set=["sft.examples=1", "dpo.examples=4"])
    prompts = Counter(prompt for _, prompt, *_ in server.letters)
    assert set(prompts.values()) == {1} and len(prompts) == 9      # five chosen stories, and four rejected ones


def test_pairs_go_on_after_a_limit_and_a_failure(server, tmp_path, monkeypatch, capsys):
    "Whoever was asked for once is asked for by the next run as well: nothing is paid for twice, and nothing refused."
    seeds = asked_for(["Mia", "Zoe", "Ada", "Ivy", "Eve", "Amy"]) + asked_for(["Una", "Ida", "Fay", "Kay"], "val")
    write_rows(tmp_path / "data" / "synthetic" / "prompt_seeds.jsonl", map(seed_row, seeds))
    for seed in seeds:
        for hero in seeds:
            asked = replace(seed, protagonist=hero.protagonist)
            server.plan[asked.instruction] = [completion(told(asked))] * 9
    server.plan[seeds[5].instruction].insert(0, (400, {}, {}))
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)

    def make(**options):
        cli.make_dpo_data(preset="smoke", home=tmp_path, writer="openai", set=["sft.examples=1", "dpo.examples=200"], **options)
        return " ".join(capsys.readouterr().out.split())
    assert make(limit=4, attempts=1) == "Pairs: 6 accepted"     # two of training, both ways, and two for validation
    for hero in seeds[:4] + seeds[5:]:      # whoever stands in for Eve
        server.plan[replace(seeds[4], protagonist=hero.protagonist).instruction].insert(0, completion(None, refusal="No."))
    assert make(attempts=1) == "Pairs: 12 accepted, 1 chosen failed, 1 rejected refused"
    assert make(attempts=2) == "Pairs: 16 accepted, 1 chosen failed, 1 rejected refused"
    prompts = Counter(prompt for _, prompt, *_ in server.letters)
    assert len(prompts) == 20 and sum(prompts.values()) == 22       # a chosen and a rejected story for ten heroes, and two that were asked again


# ---- cost

def test_expected_cost():
    asked = [Request("a", 0, "x" * 40), Request("b", 0, "x" * 40, system="y" * 8)]
    cost = expected_cost(iter(asked), max_tokens=100, price_in=2.0, price_out=10.0)
    assert cost == {"requests": 2, "prompt_tokens": 14 + 14 + 6, "answer_tokens": 200, "cost": pytest.approx((34 * 2 + 200 * 10) / 1e6)}
    assert expected_cost([], 100) == {"requests": 0, "prompt_tokens": 0, "answer_tokens": 0, "cost": 0}


def test_importing_it_is_light():
    code = "import sys, nanomoe.llm; heavy = {'openai', 'torch', 'xllamacpp', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)
