"""The GGUF file: read back with `gguf`, and run by llama.cpp itself, which `xllamacpp` carries."""
import json
import re
import shutil
import sys
import urllib.request
from dataclasses import replace

import pytest
import torch

from nanomoe.data import write_shards
from nanomoe.export import export_gguf, read_gguf
from nanomoe.files import UserError
from nanomoe.generate import encode_prompt, generate, tell_story
from nanomoe.stories import storybook
from nanomoe.tokenizer import BOS
from test_cli import nanomoe, refused
from test_export import CONFIG, make_home, paths, same_weights, some_texts, tree

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module", params=["granite", "ernie"])
def home(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "granite": return make_home(folder)
    return make_home(folder, replace(CONFIG, balance="bias", num_shared_experts=2), bias=[0.3, -0.2, 0.1, 0.0])


def test_f32_comes_back_with_every_bit(home, tmp_path):
    folder, model, tok = home
    file = export_gguf(*paths(folder), tmp_path / "m.gguf", "F32")
    assert same_weights(read_gguf(file, model.cfg), model)
    first = file.read_bytes()
    export_gguf(*paths(folder), file, "F32")
    assert file.read_bytes() == first and [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_what_the_file_says(home, tmp_path):
    folder, model, tok = home
    fields = gguf.GGUFReader(export_gguf(*paths(folder), tmp_path / "m.gguf", "F32")).fields
    arch = fields["general.architecture"].contents()
    says = {name.replace(arch, "*"): field.contents() for name, field in fields.items()}
    assert arch == ("granitemoe" if model.cfg.balance == "aux" else "ernie4_5-moe")
    assert says["tokenizer.ggml.model"] == "gpt2" and says["tokenizer.ggml.pre"] == "gpt-2"
    assert says["tokenizer.ggml.tokens"] == [tok.id_to_token(i) for i in range(600)]
    assert says["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 3, 1]
    assert says["tokenizer.ggml.add_bos_token"] is True and says["tokenizer.ggml.eos_token_id"] == 3
    assert says["*.expert_shared_feed_forward_length"] == model.cfg.num_shared_experts * model.cfg.d_ff
    if arch == "granitemoe":
        assert says["*.attention.scale"] == pytest.approx(model.cfg.head_dim ** -0.5)
        assert [says[f"*.{name}_scale"] for name in ("embedding", "residual", "logit")] == [1.0, 1.0, 1.0]


def test_q8_0_rounds_blocks_and_leaves_the_rest(home, tmp_path):
    folder, model, _ = home
    file = export_gguf(*paths(folder), tmp_path / "m.gguf", "Q8_0")
    forms = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert forms["token_embd.weight"] == forms["blk.0.ffn_down_exps.weight"] == forms["blk.1.attn_q.weight"] == "Q8_0"
    assert forms["output_norm.weight"] == forms["blk.0.ffn_gate_inp.weight"] == "F32"
    for name, tensor in read_gguf(file, model.cfg).state_dict().items():
        original = model.state_dict()[name]
        assert (tensor - original).abs().max() <= 0.006 * original.abs().max(), name
    assert file.stat().st_size < 0.5 * export_gguf(*paths(folder), tmp_path / "f32.gguf", "F32").stat().st_size


def test_rows_that_are_no_whole_blocks_stay_f16(tmp_path):
    folder, model, _ = make_home(tmp_path, replace(CONFIG, d_ff=24, num_shared_experts=0))
    file = export_gguf(*paths(folder), tmp_path / "m.gguf", "Q8_0")
    forms = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert forms["blk.0.ffn_down_exps.weight"] == "F16" and forms["blk.0.ffn_up_exps.weight"] == "Q8_0"


def test_the_command_measures_what_the_rounding_costs(home, tmp_path):
    folder, file = home[0], tmp_path / "m.gguf"
    words = ["export", "gguf", file, "--kind", "Q8_0", "--cost", "--home"]
    shutil.copytree(folder, tmp_path / "home")
    assert "nanomoe prepare-data" in refused(*words, tmp_path / "home") and not file.exists()
    write_shards({"train": storybook(n=2), "val": storybook(seed=1, n=2)}, home[2], tmp_path / "home" / "data" / "shards")
    done = nanomoe(*words, tmp_path / "home")
    before, after, cost = map(float, re.search(r"Q8_0, whole validation split: (\S+) -> (\S+) bits per byte \((\S+)\)", done.stdout).groups())
    assert before > 1 and before != after and abs(after - before - cost) < 2e-5 and abs(cost) < 0.1
    assert f"-> {file.stat().st_size / 1e6:.1f} MB" in done.stdout


def test_mistakes(home, tmp_path, monkeypatch):
    folder = home[0]
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(UserError, match="other than a GGUF file"): export_gguf(*paths(folder), notes)
    with pytest.raises(UserError, match="other than a GGUF file"): export_gguf(*paths(folder), tmp_path)
    with pytest.raises(UserError, match='"Q4"'): export_gguf(*paths(folder), tmp_path / "m.gguf", "Q4")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        with pytest.raises(UserError, match="pip install gguf"): export_gguf(*paths(folder), tmp_path / "m.gguf")

    def fail(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(UserError, match="disk is full"): export_gguf(*paths(folder), tmp_path / "m.gguf")
    assert tree(tmp_path) == {"notes.txt": b"mine"}


class LlamaCpp:
    "llama.cpp's own server in this process, computing and remembering in float32."
    def __init__(self, file):
        import xllamacpp
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.verbosity, params.warmup = str(file), 96, 1, 0, False
        params.hostnames, params.port, params.cpuparams.n_threads, params.n_gpu_layers = ["127.0.0.1"], 0, 1, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def post(self, path, **body):
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer: return json.load(answer)


@pytest.fixture(scope="module")
def llama(home):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    folder, model, tok = home
    return LlamaCpp(export_gguf(*paths(folder), folder / "m.gguf", "F32")), model, tok


def test_llama_cpp_gives_200_texts_the_same_ids(llama):
    engine, model, tok = llama
    texts = some_texts()
    assert len(texts) == 200
    for text in texts:
        ids = engine.post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
        assert ids == [BOS, *tok.encode(text).ids], repr(text)
        assert engine.post("/detokenize", tokens=ids[1:])["content"] == text


def test_llama_cpp_tells_the_same_story(llama):
    engine, model, tok = llama
    for prompt in ("Once upon a time", "The brave teapot said: \"", "Two"):
        told = engine.post("/completion", prompt=prompt, n_predict=60, temperature=0, return_tokens=True, cache_prompt=False)
        ids = encode_prompt(tok, prompt)
        ours = generate(model, ids, 60, temperature=0, eos_id=3)[0, ids.shape[1]:].tolist()
        assert told["tokens"] == [i for i in ours if i != 3]
        assert prompt + told["content"] == tell_story(model, tok, prompt, temperature=0, max_new_tokens=60)


@pytest.mark.parametrize("kind, apart", [("F16", 0.02), ("Q8_0", 0.8)])     # nats; with Q8_0 llama.cpp rounds what flows between the layers, too
def test_llama_cpp_tells_what_the_rounded_model_would(home, tmp_path, kind, apart):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    folder, model, tok = home
    file = export_gguf(*paths(folder), tmp_path / "m.gguf", kind)
    engine, rounded = LlamaCpp(file), read_gguf(file, model.cfg)
    for prompt in ("Once upon a time", "Two"):
        told = engine.post("/completion", prompt=prompt, n_predict=60, temperature=0, return_tokens=True, cache_prompt=False)
        ids, answer = encode_prompt(tok, prompt), torch.tensor(told["tokens"])
        with torch.inference_mode(): logits = rounded(torch.cat((ids, answer[None]), 1))[0, ids.shape[1] - 1:-1]
        behind = logits.max(-1).values - logits.gather(1, answer[:, None])[:, 0]     # how far each token was from being our choice
        assert behind.max() < apart and behind.mean() < apart / 10 and (logits.max(-1).values - logits.mean(-1)).min() > 1
        assert told["content"] == tok.decode(told["tokens"])


def test_llama_cpp_has_the_same_log_probabilities(llama):
    "The server tells no logits, but the log-probability of every token: logits up to one constant for all."
    engine, model, tok = llama
    ids, worst = encode_prompt(tok, next(text for text in some_texts() if len(tok.encode(text).ids) > 40))[0, :40].tolist(), 0.0
    with torch.inference_mode(): ours = model(torch.tensor([ids]))[0].log_softmax(-1)
    for length in (1, 2, 7, 20, 40):
        told = engine.post("/completion", prompt=ids[:length], n_predict=1, temperature=0, n_probs=600, cache_prompt=False)
        (step,) = told["completion_probabilities"]
        theirs = {choice["id"]: choice["logprob"] for choice in step["top_logprobs"]}
        assert sorted(theirs) == list(range(600))
        worst = max(worst, (torch.tensor([theirs[i] for i in range(600)]) - ours[length - 1]).abs().max().item())
    assert worst < 1e-3


def test_llama_cpp_takes_part_in_the_benchmark(home, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    file = export_gguf(*paths(home[0]), tmp_path / "m.gguf", "F32")
    few = ["bench", "decode", "--preset", "smoke", "--prompt", 8, "--new", 8, "--runs", 1, "--threads", 1, "--gguf"]
    done = nanomoe(*few, file)
    assert done.returncode == 0 and "llama.cpp, m.gguf" in done.stdout, done.stderr
    assert "There is no model file" in refused(*few, tmp_path / "none.gguf")
    (tmp_path / "broken.gguf").write_bytes(file.read_bytes()[:100])
    assert "llama.cpp cannot serve" in nanomoe(*few, tmp_path / "broken.gguf").stderr      # llama.cpp says a word or two as well
