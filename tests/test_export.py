"""The way into transformers and back: the same logits, text and token ids, whole folders, and refusals in one sentence."""
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

import nanomoe.export as module
from nanomoe.checkpoint import load_model, save_checkpoint
from nanomoe.config import ModelConfig
from nanomoe.export import config_from_hf, export_checkpoints, export_hf, family_of, hf_config, hf_tensors, import_hf
from nanomoe.files import STAGES, UserError, find_checkpoints, sha256_of
from nanomoe.generate import encode_prompt, generate, tell_story
from nanomoe.tokenizer import BOS, load_tokenizer, save_tokenizer, tokenizer_hash, train_tokenizer
from nanomoe.stories import storybook
from test_oracle import random_model, shapes

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
from transformers import AutoModelForCausalLM, AutoTokenizer

CONFIG = ModelConfig(vocab_size=600, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, max_seq_len=96)
ODD_TEXTS = ["", " ", "\n", "\n\n \t ", "  two  spaces  ", "[EOS]", "a [BOS] b[UNK]", "[PAD][PAD]", "I'm, you're, it's, we'll, don't, they'd, I've",
             "IT'S", "1234567", "3.14 and 1,000", "\u00e9\u00e8 e\u0301", "\u96ea\u304c\u964d\u308b", "\u0645\u0631\u062d\u0628\u0627", "\U0001f600\U0001f469\u200d\U0001f469",
             "\u00a0no-break", "\u3000wide", "\u2028line", "zero\u200bwidth", "\ufeffbom", "tab\tand\r\nreturn", "\x0b\x0c", "\x01\x02", "snake_case",
             "\u00b2\u00bd\u2167", "\u2014dash\u2026", "\"quoted\"", "-----", "  \n  x"]


def some_texts(count=200):
    "Stories, cut anywhere, and texts that no story contains."
    stories = [story.text[i % 7:i % 7 + 120] for i, story in enumerate(storybook(seed=5, n=count - len(ODD_TEXTS)))]
    return ODD_TEXTS + stories


def make_home(folder, cfg=CONFIG, bias=None):
    "A home folder with a tokenizer, a random checkpoint and its log."
    tok = train_tokenizer((story.text for story in storybook(n=200)), cfg.vocab_size)
    save_tokenizer(tok, folder / "tokenizer.json")
    model = random_model(replace(cfg, vocab_size=tok.get_vocab_size()), seed=0).eval()
    if bias is not None:
        for block in model.blocks: block.moe.bias.copy_(torch.tensor(bias))
    run = folder / "artifacts" / "pretraining"
    save_checkpoint(run / "ckpt_best.pt", model)
    rows = [{"step": 10, "bpb": 2.5, "nats": 5.0}, {"step": 20, "bpb": 1.23456, "nats": 3.0}, {"step": 30, "bpb": 1.5, "nats": 4.0}]
    (run / "val_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder, model, tok


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def paths(folder):
    return folder / "artifacts" / "pretraining" / "ckpt_best.pt", folder / "tokenizer.json"


@pytest.fixture(scope="module")
def exported(home):
    return export_hf(*paths(home[0]), home[0] / "hf", dtype="float32")


def same_weights(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def test_logits_and_greedy_text(home, exported):
    folder, model, tok = home
    theirs, their_tok = AutoModelForCausalLM.from_pretrained(exported).eval(), AutoTokenizer.from_pretrained(exported)
    assert type(theirs).__name__ == "GraniteMoeSharedForCausalLM" and theirs.dtype == torch.float32
    tokens = torch.randint(4, 600, (3, 90), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=0)
    for prompt in ("", "Once upon a time", "The teapot [EOS]"):
        inputs = their_tok(prompt, return_tensors="pt")
        assert inputs.input_ids.equal(encode_prompt(tok, prompt))
        written = theirs.generate(**inputs, max_new_tokens=50, do_sample=False)
        assert written.equal(generate(model, inputs.input_ids, written.shape[1] - inputs.input_ids.shape[1], temperature=0, eos_id=3))
        assert their_tok.decode(written[0], skip_special_tokens=True) == tell_story(model, tok, prompt, temperature=0, max_new_tokens=50)


def test_the_snippet_of_the_card(home, exported):
    folder, model, tok = home
    tell = transformers.pipeline("text-generation", str(exported))
    told = tell("Once upon a time", max_new_tokens=30, do_sample=False)[0]["generated_text"]
    assert told == tell_story(model, tok, "Once upon a time", temperature=0, max_new_tokens=30)


@pytest.mark.parametrize("cfg", [replace(CONFIG, num_shared_experts=0), replace(CONFIG, num_shared_experts=2, top_k=1), replace(CONFIG, num_experts=1, top_k=1),
                                 replace(CONFIG, rope_theta=500.0, norm_eps=1e-3), replace(CONFIG, balance="bias"), replace(CONFIG, balance="none", z_coef=0.5)],
                         ids=["no shared", "two shared", "one expert", "theta", "bias of zeros", "settings of ours"])
def test_other_shapes_leave_and_come_back(tmp_path, cfg):
    folder, model, tok = make_home(tmp_path, cfg)
    out = export_hf(*paths(folder), tmp_path / "hf", dtype="float32")
    tokens = torch.randint(600, (2, 60))
    theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    with torch.inference_mode(): torch.testing.assert_close(theirs.eval()(tokens).logits, model(tokens), atol=1e-4, rtol=0)
    back = import_hf(out)
    assert back.cfg == model.cfg and same_weights(back, model)


@settings(max_examples=25, deadline=None)
@given(cfg=shapes(), seed=st.integers(0, 2**16), balance=st.sampled_from(["aux", "bias", "none"]), zero=st.booleans())
def test_config_and_weights_go_there_and_back(tmp_path_factory, cfg, seed, balance, zero):
    folder, cfg = tmp_path_factory.mktemp("there"), replace(cfg, balance=balance, load_balance_coef=0.125)
    model = random_model(cfg, seed)
    if balance == "bias" and not zero: model.blocks[-1].moe.bias += torch.randn(cfg.num_experts)
    kind = family_of(model)
    assert kind == ("ernie4_5_moe" if balance == "bias" and not zero else "granitemoeshared")
    (folder / "config.json").write_text(json.dumps(hf_config(cfg, kind)))
    save_file(hf_tensors(model), folder / "model.safetensors")
    back = import_hf(folder)
    assert back.cfg == cfg and same_weights(back, model)


def test_a_router_bias_leaves_as_ernie(tmp_path):
    folder, model, tok = make_home(tmp_path, replace(CONFIG, balance="bias", num_shared_experts=2), bias=[0.3, -0.2, 0.1, 0.0])
    out = export_hf(*paths(folder), tmp_path / "hf", dtype="float32")
    theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(theirs).__name__ == "Ernie4_5_MoeForCausalLM" and not any(info.values())
    tokens = torch.randint(4, 600, (3, 90))
    with torch.inference_mode(): torch.testing.assert_close(theirs.eval()(tokens).logits, model(tokens), atol=1e-4, rtol=0)
    prompt = encode_prompt(tok, "Once upon a time")
    written = theirs.generate(prompt, max_new_tokens=40, do_sample=False)
    assert written.equal(generate(model, prompt, written.shape[1] - prompt.shape[1], temperature=0))
    assert same_weights(import_hf(out), model)


def test_bfloat16_rounds_every_weight_once(home, tmp_path):
    folder, model, _ = home
    out = export_hf(*paths(folder), tmp_path / "hf")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == torch.bfloat16
    for name, tensor in import_hf(out).state_dict().items():
        assert tensor.dtype == torch.float32 and tensor.equal(model.state_dict()[name].bfloat16().float())
    assert (out / "model.safetensors").stat().st_size < 0.6 * paths(folder)[0].stat().st_size


def test_what_transformers_saves_again_comes_back(home, exported, tmp_path):
    folder, model, tok = home
    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(exported).save_pretrained(tmp_path / "again")
    back = import_hf(tmp_path / "again", tmp_path / "home")
    assert back.cfg == model.cfg and same_weights(back, model)
    assert tokenizer_hash(load_tokenizer(tmp_path / "home" / "tokenizer.json")) == tokenizer_hash(tok)


def test_200_texts_have_the_same_ids(home, exported):
    tok, theirs = home[2], AutoTokenizer.from_pretrained(exported)
    texts = some_texts()
    assert len(texts) == 200
    for text in texts:
        ids = theirs(text).input_ids
        assert ids == [BOS, *tok.encode(text).ids], repr(text)
        assert theirs(text, add_special_tokens=False).input_ids == tok.encode(text).ids
        assert theirs.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text


@pytest.fixture(scope="module")
def both_tokenizers(home, exported):
    return home[2], AutoTokenizer.from_pretrained(exported)


special = st.sampled_from(["[BOS]", "[EOS]", "[UNK]", "[PAD]"])


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.text() | special, max_size=5).map("".join))
def test_any_text_has_the_same_ids(both_tokenizers, text):
    tok, theirs = both_tokenizers
    assert theirs(text).input_ids == [BOS, *tok.encode(text).ids]
    assert theirs.decode(tok.encode(text).ids) == text


def test_the_tokenizer_config_names_a_class_that_every_version_knows(exported):
    config = json.loads((exported / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    generation = transformers.GenerationConfig.from_pretrained(exported)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (2, 3, 1)


def rows_of(card): return dict(re.findall(r"^\| (\w.*?) \| (.+) \|$", card, re.M))


def share(mean): return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 50}


def write_reports(folder):
    "What a run leaves beside its checkpoint: the stories' account, the log of its training, the scorecard."
    (folder / "data" / "shards").mkdir(parents=True, exist_ok=True)
    (folder / "data" / "shards" / "meta.json").write_text(json.dumps({"source": f"{folder}/tales.txt, 9 stories", "splits": {"train": {"stories": 1234, "tokens": 56789}}}))
    log = [{"step": 10, "tokens": 3_000, "tokens_per_s": 100.0}, {"step": 20, "tokens": 9_000, "tokens_per_s": 50.0}]
    (folder / "artifacts" / "pretraining" / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (folder / "reports").mkdir(exist_ok=True)
    metrics = {name: share(0.5) for name in ("protagonist", "required_all", "length_kept", "repetition")} | {"finished": share(0.75)}
    slices = {name: {"greedy": metrics, "sampled": metrics} for name in ("seen", "unseen")}
    judged = {"sha256": sha256_of(paths(folder)[0].read_bytes()), "bpb": 1.3, **slices}
    (folder / "reports" / "scorecard.json").write_text(json.dumps({"base": judged, "dpo": {**judged, "bpb": 9.9}}))


def test_the_card_says_what_the_files_of_the_run_say(tmp_path):
    folder, model, _ = make_home(tmp_path)
    write_reports(folder)
    card = (export_hf(*paths(folder), tmp_path / "hf") / "README.md").read_text(encoding="utf-8")
    rows = rows_of(card)
    assert rows["Parameters"] == f"{model.num_parameters():,}; each token meets {model.num_parameters(active=True):,}"
    assert rows["Data"] == "tales.txt: 1,234 stories, 56,789 tokens"
    assert rows["Training run"] == "9,000 tokens in 2.5 minutes"        # 30 s and 120 s
    assert rows["Bits per byte"] == "1.2346 on the whole validation split, after step 20"
    assert rows["comes to an end"] == "75% (65% to 85%) | 75% (65% to 85%)" and "| 50 about known protagonists |" in card
    assert len(rows) == 8 and len(card.splitlines()) < 40
    assert str(tmp_path) not in card and "9.9" not in card


def card_of(folder): # its rows
    return rows_of((export_hf(*paths(folder), folder / "card") / "README.md").read_text(encoding="utf-8"))


def test_a_scorecard_of_other_weights_is_not_on_the_card(tmp_path):
    "Whose scores they are is a matter of fingerprints: files are copied without their times, and clocks are set back."
    folder, model, _ = make_home(tmp_path)
    write_reports(folder)
    (folder / "artifacts" / "pretraining" / "val_log.jsonl").write_text('{"step": 20}\n')
    checkpoint, scorecard = paths(folder)[0], folder / "reports" / "scorecard.json"
    later = scorecard.stat().st_mtime + 60
    os.utime(checkpoint, (later, later))
    assert card_of(folder)["Bits per byte"] == "1.3000 on the whole validation split" and "comes to an end" in card_of(folder)
    scores = json.loads(scorecard.read_text())
    del scores["base"]["sha256"]        # as it was written before there were fingerprints
    scorecard.write_text(json.dumps(scores))
    assert list(card_of(folder)) == ["Parameters", "Data", "Training run"]
    write_reports(folder)
    with torch.no_grad(): model.embed.weight[5] += 1
    save_checkpoint(checkpoint, model)
    now = checkpoint.stat().st_mtime
    os.utime(scorecard, (now, now))
    assert list(card_of(folder)) == ["Parameters", "Data", "Training run"]


def test_a_run_that_has_given_no_weights_yet_is_not_on_the_card(tmp_path):
    "As after `pretrain --fresh` that was stopped early: the logs are of the new run, and the weights still of the old one."
    folder, *_ = make_home(tmp_path)
    write_reports(folder)
    (folder / "artifacts" / "pretraining" / "val_log.jsonl").write_text("")
    assert "Training run" not in card_of(folder)


def test_stories_that_came_later_are_not_on_the_card(tmp_path):
    folder, *_ = make_home(tmp_path)
    write_reports(folder)
    meta = json.loads((folder / "data" / "shards" / "meta.json").read_text())
    for data, known in ((sha256_of(json.dumps(meta, sort_keys=True)), True), ("0" * 64, False)):
        (folder / "artifacts" / "pretraining" / "config.json").write_text(json.dumps({"data": data}))
        assert ("Data" in card_of(folder)) == known


def test_the_tokens_of_a_checkpoint_are_those_up_to_its_step(tmp_path):
    folder, model, _ = make_home(tmp_path)
    write_reports(folder)
    (folder / "artifacts" / "pretraining" / "val_log.jsonl").write_text('{"step": 10, "bpb": 1.5}\n')
    save_checkpoint(paths(folder)[0], model, step=10)
    assert card_of(folder)["Training run"] == "3,000 tokens in 30 seconds"


def test_the_settings_of_another_run_are_not_given_away(tmp_path):
    folder, model, _ = make_home(tmp_path)
    write_reports(folder)
    artifacts, given = folder / "artifacts" / "pretraining", tmp_path / "given" / "pretraining.json"
    (artifacts / "val_log.jsonl").write_text('{"step": 10, "bpb": 1.5}\n')
    for config, log, theirs in (({"model": asdict(model.cfg)}, True, True), ({"model": asdict(replace(model.cfg, d_ff=8))}, True, False), ({"model": asdict(model.cfg)}, False, False)):
        (artifacts / "config.json").write_text(json.dumps(config))
        if not log: (artifacts / "val_log.jsonl").write_text("")
        export_checkpoints(folder, tmp_path / "given")
        assert given.is_file() == theirs


KEPT = {"its protagonist", "all its phrases", "its length", "comes to an end"}
DAMAGED = {"meta.json without splits": ("data/shards/meta.json", '{"source": "x"}', {"Data"}), "a list": ("data/shards/meta.json", "[1]", {"Data"}), "a number as source": ("data/shards/meta.json", '{"source": 1, "splits": {}}', {"Data"}),
           "words for numbers": ("data/shards/meta.json", '{"source": "x", "splits": {"train": {"stories": "many", "tokens": []}}}', {"Data"}),
           "a list of scores": ("reports/scorecard.json", "[1]", KEPT), "a score for scores": ("reports/scorecard.json", '{"base": 1}', KEPT), "half a scorecard": ("reports/scorecard.json", '{"ba', KEPT),
           "another key": ("artifacts/pretraining/train_log.jsonl", '{"step": 1, "words": 5}', {"Training run"}), "no number": ("artifacts/pretraining/train_log.jsonl", '{"step": 1, "tokens": "five", "tokens_per_s": null}', {"Training run"}),
           "words for bits": ("artifacts/pretraining/val_log.jsonl", '{"step": 1, "bpb": "few"}', set()), "not a number of bits": ("artifacts/pretraining/val_log.jsonl", '{"step": 1, "bpb": NaN}', set())}


@pytest.mark.parametrize("name, text, without", DAMAGED.values(), ids=DAMAGED)
def test_a_fact_that_cannot_be_read_is_not_on_the_card(tmp_path, name, text, without):
    folder, _, _ = make_home(tmp_path)
    write_reports(folder)
    before = card_of(folder)
    (folder / name).write_text(text)
    assert set(card_of(folder)) == set(before) - without and "nan" not in str(card_of(folder))


def test_what_was_not_measured_is_not_on_the_card(tmp_path):
    folder, model, _ = make_home(tmp_path)
    checkpoint, tokenizer = paths(folder)
    save_checkpoint(checkpoint.with_name("ckpt_last.pt"), model, step=30)
    save_checkpoint(checkpoint.with_name("other.pt"), model)
    last = (export_hf(checkpoint.with_name("ckpt_last.pt"), tokenizer, tmp_path / "last") / "README.md").read_text(encoding="utf-8")
    assert "1.5000" in last and "1.2346" not in last
    other = (export_hf(checkpoint.with_name("other.pt"), tokenizer, tmp_path / "other") / "README.md").read_text(encoding="utf-8")
    (checkpoint.parent / "val_log.jsonl").unlink()
    alone = (export_hf(checkpoint, tokenizer, tmp_path / "alone") / "README.md").read_text(encoding="utf-8")
    for card in (other, alone): assert len(rows_of(card)) == 1 and "Bits per byte" not in card


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_appears_whole_or_not_at_all(home, tmp_path, monkeypatch):
    import safetensors.torch
    folder = home[0]
    out = export_hf(*paths(folder), tmp_path / "hf", dtype="float32")
    before = tree(tmp_path)
    assert export_hf(*paths(folder), out, dtype="float32") == out and tree(tmp_path) == before    # replaced by itself

    def fail(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(safetensors.torch, "save", fail)
    with pytest.raises(UserError, match="disk is full"): export_hf(*paths(folder), out)
    with pytest.raises(UserError, match="disk is full"): export_hf(*paths(folder), tmp_path / "new")
    assert tree(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_kill_between_two_renames_loses_no_export(home, tmp_path, monkeypatch):
    folder, out = home[0], tmp_path / "hf"
    export_hf(*paths(folder), out, dtype="float32")
    before = tree(tmp_path)
    code = ("import os, sys, nanomoe.export as e\nmove = os.replace\n"
            "def kill(old, new):\n    move(old, new)\n    if str(new).endswith('.old'): os._exit(9)\n"
            "os.replace = kill\ne.export_hf(*sys.argv[1:])")
    killed = [sys.executable, "-c", code, *paths(folder), out]
    assert subprocess.run(killed).returncode == 9 and not out.exists()
    mine = tmp_path / ".hf.holiday.old"     # a name like those, and somebody's pictures
    mine.mkdir()
    (mine / "beach.jpg").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(module, "model_card", lambda *_: "\ud800")    # the next attempt fails: what no file can hold
        with pytest.raises(UnicodeEncodeError): export_hf(*paths(folder), out, dtype="float32")
    assert {name: content for name, content in tree(tmp_path).items() if name in before} == before
    (tmp_path / ".hf.1.old").mkdir()        # of a kill after the second rename
    for name, content in tree(out).items(): (tmp_path / ".hf.1.old" / name).write_bytes(content)
    export_hf(*paths(folder), out, dtype="float32")
    assert [path.name for path in tmp_path.glob(".*.old")] == [mine.name] and (mine / "beach.jpg").is_file()


@pytest.mark.parametrize("files", [{"beach.jpg": "mine"}, {"config.json": "{}"}, {"config.json": "{"}, {"config.json": '{"nano_moe": {}}', "thesis.txt": "mine"}, None],
                         ids=["pictures", "another model", "broken", "an export and more", "a file"])
def test_what_is_no_export_is_left_alone(home, tmp_path, files):
    out = tmp_path / "hf"
    if files is None: out.write_text("mine")
    else:
        out.mkdir()
        for name, text in files.items(): (out / name).write_text(text)
    before = tree(tmp_path)
    with pytest.raises(UserError, match="something other than an earlier export"): export_hf(*paths(home[0]), out)
    assert tree(tmp_path) == before


def test_an_empty_folder_may_be_used(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    assert (export_hf(*paths(home[0]), "hf") / "config.json").is_file()


FOREIGN = {
    "type": ({"model_type": "llama"}, '"llama"'), "no type": ({"model_type": None}, '"None"'), "scale": ({"attention_multiplier": 1.0}, "attention_multiplier=1.0"),
    "no theta": ({"rope_theta": None, "rope_parameters": None}, "rope_theta is None"), "no scale": ({"attention_multiplier": None}, "attention_multiplier=None"), "embedding": ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0"),
    "residual": ({"residual_multiplier": 0.22}, "residual_multiplier"), "logits": ({"logits_scaling": 6}, "logits_scaling=6"),
    "untied": ({"tie_word_embeddings": False}, "tie_word_embeddings=False"), "biases": ({"attention_bias": True}, "attention_bias"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act=gelu"), "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_parameters"),
    "old yarn": ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"), "head": ({"head_dim": 32}, "head_dim=32"),
    "shared": ({"shared_intermediate_size": 33}, "shared_intermediate_size=33"), "words": ({"hidden_size": "wide"}, "d_model is wide"),
    "half": ({"num_hidden_layers": 1.5}, "n_layers is 1.5"), "zero": ({"intermediate_size": 0}, "makes no sense"), "vocab": ({"vocab_size": 128_000}, "65,535"),
}


@pytest.mark.parametrize("change, says", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_model_is_refused_in_one_sentence(change, says):
    with pytest.raises(UserError) as error: config_from_hf({**hf_config(CONFIG), **change})
    assert says in str(error.value) and "\n" not in str(error.value)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=5), v, max_size=2), max_leaves=4)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted({**hf_config(CONFIG), **hf_config(CONFIG, "ernie4_5_moe"), "rope_scaling": 0, "head_dim": 0})), value=json_values,
       kind=st.sampled_from(["granitemoeshared", "ernie4_5_moe"]))
def test_any_config_gives_a_config_or_one_sentence(name, value, kind):
    try: cfg = config_from_hf({**hf_config(CONFIG, kind), name: value})
    except UserError as error: assert "\n" not in str(error)
    else: assert isinstance(cfg, ModelConfig)


def broken(exported, folder, change):
    folder.mkdir()
    for path in exported.iterdir(): (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    return folder


def edit(name=None, drop=None, add=None, shape=None):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        if drop: del weights[drop]
        if add: weights[add] = torch.zeros(2)
        if shape: weights[shape] = weights[shape][:-1].contiguous()
        save_file(weights, folder / "model.safetensors")
    return change


@pytest.mark.parametrize("change", [lambda f: (f / "config.json").unlink(), lambda f: (f / "config.json").write_text("{"), lambda f: (f / "config.json").write_text("[]"),
                                    lambda f: (f / "model.safetensors").unlink(), lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
                                    lambda f: (f / "model.safetensors").write_bytes(b"hello"), edit(drop="model.norm.weight"), edit(add="lm_head.weight"),
                                    edit(shape="model.embed_tokens.weight"), lambda f: (f / "tokenizer.json").unlink(), lambda f: (f / "tokenizer.json").write_text("{}")],
                         ids=["no config", "half a config", "a list", "no weights", "cut off", "no safetensors", "a tensor less", "a tensor more", "another shape", "no tokenizer", "empty tokenizer"])
def test_a_damaged_folder_writes_nothing(exported, tmp_path, change):
    folder = broken(exported, tmp_path / "hf", change)
    with pytest.raises(UserError) as error: import_hf(folder, tmp_path / "home")
    assert "\n" not in str(error.value) and not (tmp_path / "home").exists()


def test_a_home_is_written_once(home, exported, tmp_path):
    folder, model, tok = home
    import_hf(exported, tmp_path / "home")
    assert same_weights(load_model(paths(tmp_path / "home")[0]), model)
    before = tree(tmp_path / "home")
    with pytest.raises(UserError, match="there already"): import_hf(exported, tmp_path / "home")
    assert tree(tmp_path / "home") == before


def exported_as(home, folder, stage):
    "An export of a checkpoint that lies where that stage has its own."
    own = folder / "from" / "artifacts" / STAGES[stage] / "ckpt_best.pt"
    own.parent.mkdir(parents=True)
    own.write_bytes(paths(home[0])[0].read_bytes())
    return export_hf(own, paths(home[0])[1], folder / "hf", dtype="float32")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_comes_home_to_its_place(home, tmp_path, stage):
    import_hf(exported_as(home, tmp_path, stage), tmp_path / "home")
    assert list(find_checkpoints(tmp_path / "home")) == [stage]


@pytest.mark.parametrize("stage", ["../../x", 5, [], None, "pretraining"])
def test_a_stage_that_is_none_comes_home_as_pretrain(exported, tmp_path, stage):
    def change(folder):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["nano_moe"]["stage"] = stage
        (folder / "config.json").write_text(json.dumps(config))
    import_hf(broken(exported, tmp_path / "hf", change), tmp_path / "home")
    assert [path.relative_to(tmp_path / "home").as_posix() for path in find_checkpoints(tmp_path / "home").values()] == ["artifacts/pretraining/ckpt_best.pt"]


def test_two_stages_share_a_home(home, exported, tmp_path):
    import_hf(exported, tmp_path / "home")
    before = (tmp_path / "home" / "tokenizer.json").stat().st_mtime_ns
    import_hf(exported_as(home, tmp_path, "dpo"), tmp_path / "home")
    assert list(find_checkpoints(tmp_path / "home")) == ["pretrain", "dpo"] and (tmp_path / "home" / "tokenizer.json").stat().st_mtime_ns == before
    save_tokenizer(train_tokenizer((story.text for story in storybook(n=50)), 500), tmp_path / "other" / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer.json is there already"): import_hf(exported, tmp_path / "other")


def test_an_import_that_was_killed_can_be_repeated(home, exported, tmp_path):
    code = "import os, sys, nanomoe.export as e; e.save_checkpoint = lambda *_: os._exit(9); e.import_hf(sys.argv[1], sys.argv[2])"
    assert subprocess.run([sys.executable, "-c", code, exported, tmp_path / "home"]).returncode == 9
    assert list(tree(tmp_path / "home")) == ["tokenizer.json"]
    import_hf(exported, tmp_path / "home")
    assert same_weights(load_model(paths(tmp_path / "home")[0]), home[1])


def test_an_import_that_fails_leaves_no_home(exported, tmp_path, monkeypatch):
    from test_cli import refused
    assert "cannot be read" in refused("import", "hf", broken(exported, tmp_path / "hf", lambda f: (f / "model.safetensors").write_bytes(b"hello")), "--home", tmp_path / "home")
    def full(*_, **__): raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="disk is full"): import_hf(exported, tmp_path / "home")
    assert not (tmp_path / "home").exists()
    (tmp_path / "home").mkdir()         # one that was there stays
    with pytest.raises(UserError, match="disk is full"): import_hf(exported, tmp_path / "home")
    assert not list((tmp_path / "home").iterdir())


def test_a_tokenizer_of_another_model_is_refused(home, tmp_path):
    other = train_tokenizer((story.text for story in storybook(n=50)), 500)
    save_tokenizer(other, tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer.json has 500"): export_hf(paths(home[0])[0], tmp_path / "tokenizer.json", tmp_path / "hf")
    with pytest.raises(UserError, match="float16"): export_hf(*paths(home[0]), tmp_path / "hf", dtype="float16")
    assert not (tmp_path / "hf").exists()


def test_our_settings_travel(exported, home):
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert set(config["nano_moe"]) <= {"stage", *asdict(home[1].cfg)}
    assert config["attention_multiplier"] == home[1].cfg.head_dim ** -0.5 and config["tie_word_embeddings"] is True


def test_what_is_given_away_replaces_nothing_else(home, tmp_path):
    folder = home[0]
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match="other than an earlier export"): export_checkpoints(folder, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    given = export_checkpoints(folder, tmp_path / "given")
    (given / "dpo.safetensors").write_bytes(b"of an earlier home")
    assert [path.name for path in find_checkpoints(export_checkpoints(folder, given)).values()] == ["pretraining.safetensors"]
    load_model(given / "pretraining.safetensors")


def test_a_bias_is_given_away_exactly(tmp_path):
    _, model, _ = make_home(tmp_path, replace(CONFIG, balance="bias"), bias=[0.5001, -0.2503, 0.1, 0.0])
    given = load_model(export_checkpoints(tmp_path, tmp_path / "given") / "pretraining.safetensors")
    assert all(theirs.moe.bias.equal(ours.moe.bias) for theirs, ours in zip(given.blocks, model.blocks))
    assert given.embed.weight.equal(model.embed.weight.bfloat16().float())
