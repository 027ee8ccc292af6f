"""The scorecard: intervals that hold, metrics that can be checked by hand, the same numbers twice, and a file that is whole."""
import json
import math
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanomoe import scorecard as module
from nanomoe.checkpoint import save_checkpoint
from nanomoe.config import ModelConfig
from nanomoe.data import load_shards, write_shards
from nanomoe.files import UserError, sha256_of
from nanomoe.generate import generate
from nanomoe.model import NanoMoE
from nanomoe.scorecard import SLICES, STAGES, interval, judge_model, judge_story, scorecard
from nanomoe.stories import storybook
from nanomoe.synth import Seed, seed_row, write_rows
from nanomoe.tokenizer import EOS, save_tokenizer, train_tokenizer
from nanomoe.train import evaluate
from nanomoe.viz import scorecard_figure

METRICS = {"protagonist", "required_all", "required_share", "banned_absent", "length_kept", "finished", "repetition"}
SEED = Seed("val-0", "val", "Mia", "kindness", ("red kite", "big hill"), ("cold rain",), 2, 3, 0)
GOOD = "Mia had a red kite. It flew over the big hill."


# Intervals

@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_yes_and_no_get_wilsons_interval(values):
    result, n, mean, z = interval(values), len(values), np.mean(values), 1.96
    assert result["mean"] == pytest.approx(mean) and result["n"] == n and 0 <= result["low"] <= mean + 1e-12 and mean - 1e-12 <= result["high"] <= 1
    for p in (result["low"], result["high"]):       # the two shares that the observed one is just 1.96 of their own standard errors away from
        assert (mean - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, abs=1e-9)
    assert result["low"] < result["high"]           # never sure, not even of 100 out of 100


def test_wilsons_interval_by_hand():
    assert interval([True] * 8 + [False] * 2) == pytest.approx({"mean": 0.8, "low": 0.4901625, "high": 0.9433178, "n": 10}, abs=1e-4)
    assert interval([True] * 100)["low"] == pytest.approx(100 / (100 + 1.96 ** 2)) and interval([True] * 100)["high"] == pytest.approx(1)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=50))
def test_numbers_get_the_normal_interval(values):
    result, half = interval(values), 1.96 * np.std(values, ddof=1) / math.sqrt(len(values))
    assert result["mean"] == pytest.approx(np.mean(values)) and result["n"] == len(values)
    assert result["low"] == pytest.approx(max(0, np.mean(values) - half), abs=1e-9) or result["low"] == pytest.approx(np.mean(values) - half, abs=1e-9)
    assert result["high"] - result["mean"] <= half + 1e-9


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_nineteen_in_twenty_intervals_hold_the_truth(share):
    rng = np.random.default_rng(0)
    def holds(values, truth): return (lambda r: r["low"] <= truth <= r["high"])(interval(values))
    assert 0.92 < np.mean([holds([bool(v) for v in rng.random(60) < share], share) for _ in range(2000)]) < 0.985
    assert 0.92 < np.mean([holds((rng.random(60) * share).tolist(), share / 2) for _ in range(2000)]) < 0.98


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.3]])
def test_the_interval_of_a_share_is_one(values): assert 0 <= interval(values)["low"] and interval(values)["high"] <= 1


# One story

@pytest.mark.parametrize("story, changed", [
    (GOOD, {}), (GOOD.replace("Mia", "Miami"), {"protagonist": False}), (GOOD.replace("red kite", "red hat"), {"required_all": False, "required_share": 0.5}),
    ("Mia ran. She fell.", {"required_all": False, "required_share": 0.0}), (GOOD[:-1] + " in cold rain.", {"banned_absent": False}),
    (GOOD + " One. Two.", {"length_kept": False}), (GOOD[:-1], {}),
    ("", {"protagonist": False, "required_all": False, "required_share": 0.0, "length_kept": False})])
def test_a_story_is_judged(story, changed):
    expected = {"protagonist": True, "required_all": True, "required_share": 1.0, "banned_absent": True, "length_kept": True, "finished": True, "repetition": 0.0}
    assert judge_story(story, SEED, True) == {**expected, **changed}
    assert judge_story(story, SEED, False) == {**expected, **changed, "finished": False}


def test_repetition_is_a_share_of_runs():
    assert judge_story("a b c d a b c d", SEED, True)["repetition"] == pytest.approx(1 / 5)


# A model that is a script

@pytest.fixture(scope="module")
def tok(): return train_tokenizer([story.text for story in storybook(n=40)], 300)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = NanoMoE(ModelConfig(vocab_size=300, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=16, max_seq_len=256))
    for p in model.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=0.05)
    return model.eval()


def scripted(tok, answers, calls=None):
    "A `generate` that gives each instruction the answer it is told to; None for one that does not end."
    def write(model, prompts, max_new_tokens, eos_id, temperature, seed):
        if calls is not None: calls.append((len(prompts), max_new_tokens, eos_id, temperature, seed))
        rows = []
        for prompt in prompts:
            story, ends = answers[tok.decode(prompt[1:].tolist()).strip()]
            rows.append(torch.cat((prompt, torch.tensor(tok.encode(story).ids + [EOS] * ends, dtype=torch.long))))
        return rows
    return write


def test_metrics_of_hand_made_answers(tok, model):
    seeds = [replace(SEED, id=f"val-{i}", theme=theme) for i, theme in enumerate(["kindness", "courage", "patience", "sharing"])]
    stories = [(GOOD, True), (GOOD.replace("Mia", "Tom"), True), (GOOD.replace("red kite", "red hat") + " Cold rain fell. Oh.", True), (GOOD[:20], False)]
    calls = []
    scores = judge_model(scripted(tok, {seed.instruction: story for seed, story in zip(seeds, stories)}, calls), model, tok, seeds, 0.0, batch_size=3)["val"]
    means = {metric: score["mean"] for metric, score in scores.items()}
    assert means == {"protagonist": 0.75, "required_all": 0.5, "required_share": pytest.approx((1 + 1 + 0.5 + 0.5) / 4), "banned_absent": 0.75,
                     "length_kept": 0.5, "finished": 0.75, "repetition": 0.0}
    assert set(scores) == METRICS and all(score["n"] == 4 and score["low"] <= score["mean"] <= score["high"] for score in scores.values())
    assert scores["protagonist"] == interval([True, True, True, False])
    assert [call[0] for call in calls] == [3, 1] and {call[2:4] for call in calls} == {(EOS, 0.0)}


def test_instructions_that_do_not_fit_are_left_out(tok, model):
    long = replace(SEED, id="long", required=("x " * 400,))
    scores = judge_model(scripted(tok, {SEED.instruction: (GOOD, True)}), model, tok, [long, SEED], 0.0)["val"]
    assert scores["protagonist"]["n"] == 1
    with pytest.raises(UserError, match="No instruction fits"): judge_model(scripted(tok, {}), model, tok, [long], 0.0)
    with pytest.raises(UserError, match="No instruction fits"):     # of one split
        judge_model(scripted(tok, {SEED.instruction: (GOOD, True)}), model, tok, [replace(long, split="val_seen"), SEED], 0.0)


def test_splits_are_answered_together_and_judged_apart(tok, model):
    seeds, calls = [SEED, replace(SEED, id="new", split="val_seen", protagonist="Tom")], []
    scores = judge_model(scripted(tok, {seed.instruction: (GOOD, True) for seed in seeds}, calls), model, tok, seeds, 0.0)
    assert len(calls) == 1 and {split: score["protagonist"]["mean"] for split, score in scores.items()} == {"val": 1.0, "val_seen": 0.0}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_same_numbers_twice_and_in_any_batch(tok, model, temperature):
    seeds = [replace(SEED, id=f"val-{i}", protagonist=name) for i, name in enumerate(["Mia", "Tom", "brave teapot", "Zoe", "old drum"])]
    def said(batch_size):
        heard = []
        def listening(model, prompts, new, **how):
            rows = generate(model, prompts, new, **how)
            heard.extend(row[len(prompt):].tolist() for row, prompt in zip(rows, prompts))
            return rows
        return judge_model(listening, model, tok, seeds, temperature, max_new_tokens=12, batch_size=batch_size), heard
    assert said(5) == said(5) == said(2) == said(1)
    assert all(0 < len(answer) <= 12 for answer in said(5)[1])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_instructions_that_do_not_fit_into_memory_go_in_halves(tok, model, temperature):
    seeds, heard = [replace(SEED, id=f"val-{i}", protagonist=name) for i, name in enumerate(["Mia", "Tom", "brave teapot", "Zoe", "old drum"])], []
    def said(most):
        answers = []
        def greedy(model, prompts, new, **how):
            heard.append(len(prompts))
            if len(prompts) > most: raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            rows = generate(model, prompts, new, **how)
            answers.extend(row.tolist() for row in rows)
            return rows
        return judge_model(greedy, model, tok, seeds, temperature, max_new_tokens=12, batch_size=4), answers
    assert said(4) == said(2) == said(1)
    assert heard == [4, 1] + [4, 2, 2, 1] + [4, 2, 1, 1, 2, 1, 1, 1]
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"): said(0)


# The whole card

@pytest.fixture
def home(tok, model, tmp_path):
    save_tokenizer(tok, tmp_path / "tokenizer.json")
    stories = list(storybook(n=12))
    write_shards({"train": stories[:10], "val": stories[10:]}, tok, tmp_path / "data" / "shards")
    seeds = [replace(SEED, id=f"{split}-{i}", split=split, protagonist=f"Mia{chr(97 + i)}{split[-1]}") for split in ("train", "val_seen", "val") for i in range(6)]
    write_rows(tmp_path / "data" / "synthetic" / "prompt_seeds.jsonl", map(seed_row, seeds))
    for folder in ("pretraining", "dpo"): save_checkpoint(tmp_path / "artifacts" / folder / "ckpt_best.pt", model)
    return tmp_path


class Asked(dict):
    "Every instruction is answered with the good story about the hero it asks for; what was asked is counted."
    def __init__(self): self.heard = Counter()
    def __getitem__(self, instruction):
        hero = instruction.rstrip(".").split()[-1]
        self.heard[hero] += 1
        return GOOD.replace("Mia", hero), True


def test_the_card_has_every_stage_there_is(home, tok, model):
    asked, calls = Asked(), []
    scores = scorecard(scripted(tok, asked, calls), home, prompts=8)
    assert list(scores) == ["base", "dpo"]          # nothing was instructed, and that is no error
    shards = load_shards(home / "data" / "shards")
    bpb = evaluate(model, shards.val, shards.meta["splits"]["val"]["bytes"], 8, 256)["bpb"]
    for stage in scores.values():
        assert set(stage) == {"sha256", "bpb", *SLICES} and stage["bpb"] == pytest.approx(bpb, rel=1e-6)
        for name in SLICES:
            assert set(stage[name]) == {"greedy", "sampled"}
            for way in stage[name].values(): assert set(way) == METRICS and all(m["n"] == 4 for m in way.values()) and way["protagonist"]["mean"] == 1
    files = {stage: home / "artifacts" / STAGES[stage] / "ckpt_best.pt" for stage in scores}
    assert {stage: score["sha256"] for stage, score in scores.items()} == {stage: sha256_of(path.read_bytes()) for stage, path in files.items()}
    assert "sha" not in "".join(axes.get_title() for axes in scorecard_figure(scores).axes)
    assert {call[3] for call in calls} == {0.0, 0.8}
    # held-out instructions only, the same for everybody: each once greedily and once sampled, by two models
    assert asked.heard == {f"Mia{chr(97 + i)}{split[-1]}": 4 for split in ("val_seen", "val") for i in range(4)}
    assert json.loads((home / "reports" / "scorecard.json").read_text(encoding="utf-8")) == scores


def test_stages_and_slices_are_what_the_folders_and_splits_are_called():
    assert STAGES == {"base": "pretraining", "sft": "sft", "dpo": "dpo"} and SLICES == {"seen": "val_seen", "unseen": "val"}


def test_two_cards_of_a_real_model_are_equal(home):
    def short(model, prompts, new, **how): return generate(model, prompts, 8, **how)
    first = scorecard(short, home, prompts=4)
    text = (home / "reports" / "scorecard.json").read_bytes()
    assert scorecard(short, home, prompts=4) == first and (home / "reports" / "scorecard.json").read_bytes() == text
    assert first["base"] == first["dpo"]            # they are the same weights


def test_the_report_is_whole_or_the_old_one(home, tok, monkeypatch):
    scorecard(scripted(tok, Asked()), home, prompts=4)
    path = home / "reports" / "scorecard.json"
    before = path.read_bytes()
    def fail(*_, **__): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="disk is full"): scorecard(scripted(tok, Asked()), home, prompts=6)
    monkeypatch.undo()
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    monkeypatch.setattr(module, "judge_model", fail)
    with pytest.raises(OSError): scorecard(scripted(tok, Asked()), home, prompts=6)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name, sentence", [("tokenizer.json", "nanomoe tokenizer"), ("data/synthetic/prompt_seeds.jsonl", "nanomoe make-prompt-seeds"),
                                            ("data/shards/meta.json", "nanomoe prepare-data")])
def test_a_missing_file_is_one_sentence(home, tok, name, sentence):
    (home / name).unlink()
    with pytest.raises(UserError, match=sentence): scorecard(scripted(tok, Asked()), home)
    assert not (home / "reports").exists()


def test_no_checkpoint_is_one_sentence(home, tok):
    for path in (home / "artifacts").rglob("ckpt_best.pt"): path.unlink()
    with pytest.raises(UserError, match="no checkpoint yet"): scorecard(scripted(tok, Asked()), home)
    assert not (home / "reports").exists()


def test_a_damaged_checkpoint_is_one_sentence(home, tok):
    path = home / "artifacts" / "dpo" / "ckpt_best.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"): scorecard(scripted(tok, Asked()), home)
    assert not (home / "reports").exists()


@pytest.mark.parametrize("prompts, without", [(1, None), (8, "val_seen")])
def test_no_instructions_are_called_that(home, tok, prompts, without):
    path = home / "data" / "synthetic" / "prompt_seeds.jsonl"
    path.write_bytes(b"".join(line for line in path.read_bytes().splitlines(keepends=True) if f'"split": "{without}"'.encode() not in line))
    with pytest.raises(UserError) as error: scorecard(scripted(tok, Asked()), home, prompts=prompts)
    assert "context" not in str(error.value)
