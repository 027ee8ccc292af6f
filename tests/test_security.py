"""What comes from outside is text and numbers: it is never run, it names no file, and a key is shown to nobody but the server."""
import ast
import inspect
import io
import json
import os
import pickle
import re
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forks import KEY, ROOT, TINY, nanomoe, start
from nanomoe import app, cli, llm
from nanomoe.checkpoint import load_checkpoint, load_model
from nanomoe.config import Preset, override, preset
from nanomoe.export import export_hf, import_hf
from nanomoe.files import UserError
from nanomoe.stories import storybook
from nanomoe.synth import Seed, load_prompt_seeds, read_rows, seed_row
from nanomoe.tokenizer import load_tokenizer, train_tokenizer
from nanomoe.train import Log, read_log
from test_llm import LEAKY, completion, server      # noqa: F401, a fixture

linux = pytest.mark.skipif(sys.platform != "linux", reason="commands are forked, and sockets are looked up in /proc")
WITHOUT_DEVICE = [*TINY[:2], *TINY[4:]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A home made of stories whose words are paths, by a run that may not write outside of it."
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "stories").mkdir()
    for name, start_at, n in (("train", 0, 250), ("validation", 250, 200)):
        with open(folder / "stories" / f"{name}.jsonl", "w") as file:
            for i, story in enumerate(storybook(n=n, start=start_at)):
                file.write(json.dumps({"text": f"{story.text} The sign said ../../outside{i % 7} and /tmp/outside and ~/outside and $HOME and `id`."}) + "\n")
    done = nanomoe("run", "--home", folder / "home", "--stories", folder / "stories", *TINY, "--set", "sft.val_examples=16", accident=watched(folder / "home"), folder=folder)
    assert done.status == 0 and "OUTSIDE" not in done.err, done
    return folder / "home"


@pytest.fixture
def home(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "home")
    return tmp_path / "home"


def watched(*allowed):
    "An accident that names each file that is opened for writing, made, moved or removed anywhere else."
    return f"""
import tempfile
allowed = {[str(path) for path in allowed]} + ["/dev/", os.path.join(tempfile.gettempdir(), "tmp")]     # the reader of stories keeps its notes there
def watch(event, args):
    writes = event == "open" and (args[1] and set(args[1]) & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")
    if not (writes or changes) or isinstance(args[0], int) or event in ("os.remove", "os.rmdir") and args[1] != -1: return     # the last: inside of a folder that is removed
    paths = [os.path.abspath(os.fsdecode(path)) for path in args[:2 if event in ("os.rename", "os.link", "os.symlink") else 1]]
    for path in paths:
        if not path.startswith(tuple(allowed)): os.write(2, f"OUTSIDE {{event}} {{path}}\\n".encode())
sys.addaudithook(watch)
"""


# ---- nothing is unpickled

class Trap:
    def __init__(self, where): self.where = str(where)
    def __reduce__(self): return os.mkdir, (self.where,)


def torch_bytes(content, **more):
    file = io.BytesIO()
    torch.save(content, file, **more)
    return file.getvalue()


PICKLES = {"a checkpoint": lambda good, trap: torch_bytes({**good, "config": trap}), "among the weights": lambda good, trap: torch_bytes({**good, "model": {**good["model"], "x": trap}}),
           "beside them": lambda good, trap: torch_bytes({**good, "optimizers": [trap]}), "the old format": lambda good, trap: torch_bytes({**good, "rng": trap}, _use_new_zipfile_serialization=False),
           "a bare pickle": lambda good, trap: pickle.dumps({**good, "config": trap})}


@linux
@pytest.mark.parametrize("kind", PICKLES)
def test_a_planted_pickle_is_never_run(home, tmp_path, kind):
    last = home / "artifacts" / "pretraining" / "ckpt_last.pt"
    planted = PICKLES[kind](load_checkpoint(last), Trap(tmp_path / "sprung"))
    exported = export_hf(home / "artifacts" / "dpo" / "ckpt_best.pt", home / "tokenizer.json", tmp_path / "exported")
    for name in ("bad.pt", "bad.safetensors"):
        (tmp_path / name).write_bytes(planted)
        for load in (load_checkpoint, load_model):
            with pytest.raises(UserError, match="damaged"): load(tmp_path / name)
        with pytest.raises(UserError, match="damaged"): export_hf(tmp_path / name, home / "tokenizer.json", tmp_path / "again")
    (exported / "pytorch_model.bin").write_bytes(planted)       # read by nobody
    import_hf(exported)
    (exported / "model.safetensors").write_bytes(planted)
    with pytest.raises(UserError, match="cannot be read"): import_hf(exported)
    for path in (last, home / "artifacts" / "dpo" / "ckpt_best.pt", home / "tokenizer.json"): path.write_bytes(planted)
    for words in (["pretrain", *TINY], ["generate"], ["scorecard", "--device", "cpu"], ["export", "gguf", tmp_path / "x.gguf"]):
        done = nanomoe(*words, "--home", home)
        assert done.status == 1 and done.err.startswith("Error: ") and done.err.count("\n") == 1, done
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()       # the trap is a real one


def test_the_source_has_no_way_to_run_what_it_reads():
    for path in (ROOT / "nanomoe").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name.split(".")[0] for alias in node.names} | {(getattr(node, "module", None) or "").split(".")[0]}
                assert not names & {"pickle", "cPickle", "marshal", "shelve", "dill", "joblib"}, path
            if not isinstance(node, ast.Call): continue
            called, given = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in ("eval", "exec", "os.system", "os.popen", "np.load", "yaml.load"), (path, node.lineno)
            assert called != "torch.load" or given.get("weights_only") == "True", (path, node.lineno)
            assert given.get("shell", "False") == "False" and given.get("trust_remote_code", "False") == "False", (path, node.lineno)


# ---- no path leaves the home

@linux
def test_no_seed_and_no_prompt_names_a_file(finished, home, tmp_path):
    path = home / "data" / "synthetic" / "prompt_seeds.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows): row |= {"id": f"../../../outside{i}", "theme": "/tmp/outside"}
    rows[0]["split"] = "../../../outside"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stories = finished.parent / "stories"
    for words in (["make-sft-data", "--stories", stories, *WITHOUT_DEVICE], ["make-dpo-data", "--stories", stories, *WITHOUT_DEVICE], ["scorecard", "--device", "cpu", "--prompts", 2],
                  ["generate", "../../../outside/../x\n/tmp/outside"]):
        done = nanomoe(*words, "--home", home, accident=watched(home), folder=tmp_path)
        assert done.status == 0 and "OUTSIDE" not in done.err and "Traceback" not in done.err, done


@linux
def test_no_file_that_is_imported_names_another(finished, home, tmp_path):
    exported = export_hf(home / "artifacts" / "dpo" / "ckpt_best.pt", home / "tokenizer.json", tmp_path / "exported")
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**config, "_name_or_path": "../../outside", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (exported / "evil.py").write_text("open('sprung', 'w')")
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "../../outside.safetensors"}}))
    done = nanomoe("import", "hf", exported, "--home", tmp_path / "new", accident=watched(tmp_path / "new"), folder=tmp_path)
    assert done.status == 0 and not done.err and not (tmp_path / "sprung").exists(), done
    meta = json.loads((home / "data/shards/meta.json").read_text())
    (home / "data/shards/meta.json").write_text(json.dumps({**meta, "splits": {**meta["splits"], "../../../etc/passwd": meta["splits"]["val"]}}))
    done = nanomoe("pretrain", "--home", home, *TINY, "--fresh", accident=watched(home), folder=tmp_path)
    assert done.status == 0 and not done.err, done


# ---- keys

@linux
@pytest.mark.parametrize("case", LEAKY)
def test_a_key_is_shown_to_nobody(home, server, case):      # noqa: F811
    reply = LEAKY[case]
    server.otherwise = reply
    done = nanomoe("make-sft-data", "--writer", "openai", "--limit", 3, "--attempts", 1, "--home", home, *WITHOUT_DEVICE,
                   accident="nanomoe.llm._FIRST_WAIT = nanomoe.llm._LONGEST_WAIT = 0.001", env={"OPENAI_BASE_URL": server.url})
    assert done.status == 1 and done.err.startswith("Error: ") and "Traceback" not in done.err, done
    assert {headers["authorization"] for *_, headers in server.letters} == {f"Bearer {KEY}"}
    nobody_has_the_key(home)


@linux
@pytest.mark.parametrize("accident, url", [("nanomoe.llm.judge = lambda *_: 1 / 0", None), ("full_disk('answers.jsonl', appending=True)", None),
                                           ("before('sft_train.jsonl', kill)", None), ("", f"http://user:{KEY}@127.0.0.1:9/v1"), ("", f"{KEY}://x")])
def test_nor_by_a_bug_a_full_disk_a_kill_or_an_address(home, server, accident, url):    # noqa: F811
    server.otherwise = completion("Lily ran. " * 6)
    done = nanomoe("make-sft-data", "--writer", "openai", "--limit", 3, "--attempts", 1, "--home", home, *WITHOUT_DEVICE,
                   accident=f"nanomoe.llm._FIRST_WAIT = nanomoe.llm._LONGEST_WAIT = 0.001\n{accident}", env={"OPENAI_BASE_URL": url or server.url})
    assert done.status != 0 and ("Traceback" in done.err) == ("1 / 0" in accident), done
    nobody_has_the_key(home)


def nobody_has_the_key(home): # what the command printed was looked at by `forks`
    for path in home.rglob("*"): assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_no_key_lies_in_the_repository():
    for path in (*ROOT.glob("*.*"), *(ROOT / "nbs").rglob("*.*"), *(ROOT / "nanomoe").rglob("*.py")):
        if path.is_file() and path.suffix in (".ipynb", ".py", ".md", ".qmd", ".yml", ".ini", ".json", ".jsonl"):
            assert not re.search(r"\b(sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{20,}|ghp_[A-Za-z0-9]{20,})", path.read_text(encoding="utf-8")), path


# ---- servers

def test_servers_bind_loopback_unless_told_otherwise():
    for serve in (cli.serve_app, cli.llm_server, app.run_app, llm.serve_llm, llm.local_llm): assert inspect.signature(serve).parameters["host"].default == "127.0.0.1", serve


@linux
def test_the_app_listens_to_this_machine_alone(home):
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    running = start("app", "--home", home, "--port", port)
    try:
        for _ in range(500):
            tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6") if Path(f"/proc/net/{name}").exists()]
            bound = [fields[1].split(":")[0] for table in tables for fields in map(str.split, table) if fields[3] == "0A" and fields[1].endswith(f":{port:04X}")]
            if bound: break
            time.sleep(0.1)
        assert bound == ["0100007F"]
    finally:
        running.kill()
        running.wait()


# ---- fuzz: a UserError or success, never another exception

words = st.text(max_size=12)
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | words, lambda v: st.lists(v, max_size=3) | st.dictionaries(words, v, max_size=3), max_leaves=6)
lines = st.binary(max_size=30) | values.map(lambda value: json.dumps(value).encode()) | st.sampled_from([b"[" * 20_000, b"1" * 5_000, b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"id": 1}', b'{"step": 1}', b'{"step": NaN}', b'{"step": "1"}'])
files = st.builds(lambda many, end: b"\n".join(many) + end, st.lists(lines, max_size=6), st.sampled_from([b"", b"\n", b"\r\n"]))


@given(files, st.lists(st.sampled_from(["id", "step"]), unique=True))
def test_any_jsonl_is_rows_or_a_sentence(tmp_path_factory, data, needed):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(data)
    try: assert all(set(needed) <= row.keys() for row in read_rows(path, *needed))
    except UserError as error: assert str(path) in str(error) and "\n" not in str(error)
    assert path.read_bytes() == data


@given(files)
def test_any_log_is_rows(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz_log.jsonl"
    path.write_bytes(data)
    rows = read_log(path)
    assert all(isinstance(row["step"], (int, float)) for row in rows)
    Log(path, 1).write(step=2)      # a run can go on after it
    assert read_log(path)[-1] == {"step": 2} and len(read_log(path)) <= len(rows) + 1


GOOD = seed_row(Seed("a", "train", "Lily", "kindness", ("red ball", "big tree"), (), 3, 7, 0))


@given(st.dictionaries(st.sampled_from([name for name in GOOD if name not in ("id", "instruction")]), values, max_size=3))
def test_any_seed_is_an_instruction_or_a_sentence(tmp_path_factory, changes):
    home = tmp_path_factory.getbasetemp()
    path = home / "data" / "synthetic" / "prompt_seeds.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**GOOD, **changes}) + "\n")
    try: (seed,) = load_prompt_seeds(home)
    except UserError as error: assert "\n" not in str(error)
    else:
        text = seed.instruction
        assert seed.theme in text and text.endswith(f"{seed.protagonist}.") and all(phrase in text for phrase in (*seed.required, *seed.banned))


@pytest.fixture(scope="module")
def tok(): return train_tokenizer(["Lily ran to the big red ball. It was [BOS] fun."] * 3, 300)


@given(st.text())
def test_any_text_survives_the_tokenizer(tok, text):
    ids = tok.encode(text).ids
    assert tok.decode(ids) == text and all(4 <= i < tok.get_vocab_size() for i in ids)      # no text can write a special token


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.binary(max_size=3), st.integers(0, 3))
def test_any_damage_to_a_tokenizer_is_a_tokenizer_or_a_sentence(tok, tmp_path_factory, place, new, gone):
    path, data = tmp_path_factory.getbasetemp() / "tokenizer.json", tok.to_str().encode()
    place %= len(data)
    path.write_bytes(data[:place] + new + data[place + gone:])
    try: load_tokenizer(path)
    except UserError as error: assert str(path) in str(error)


names = st.sampled_from(list(cli._choose("smoke", [])[0].__dataclass_fields__) + ["lr", "seed", "tokens", "compile", "optimizer", "evals", "sft.epochs", "dpo.beta", "dpo.examples", "x", "", "sft.", ".lr", "dpo.d_model"])
numbers = st.sampled_from(["0", "-1", "1", "1e9", "1e999", "nan", "-inf", "true", "1_0", "_", "٣", "0x10", "9" * 400, "9" * 5_000, "1e-400", "", " 4 ", "=", "4=5"])


@given(st.lists(st.builds("{}={}".format, names, numbers | words) | words, max_size=4))
def test_any_setting_is_taken_or_a_sentence(changes):
    try: assert isinstance(override(preset("smoke"), changes), Preset)
    except UserError as error: assert "Traceback" not in str(error)
