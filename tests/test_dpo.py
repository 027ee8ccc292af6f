"""Preference tuning: the loss against formulas and a library, pairs that differ in one thing, a reference that stays."""
import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forks import start, until
from nanomoe import dpo
from nanomoe.checkpoint import load_checkpoint, load_model, save_checkpoint
from nanomoe.config import DPOConfig, ModelConfig, Preset, SFTConfig, TrainConfig
from nanomoe.dpo import (answer_logps, asked_pairs, both_ways, collate_pairs, dpo_loss, dpo_objective, exchanged_pairs, make_dpo_data, pair_logps, plot_preferences, read_pairs,
                         score_pairs, stand_ins, train_dpo, with_reference)
from nanomoe.files import UserError
from nanomoe.model import IGNORE, NanoMoE
from nanomoe.stories import open_book, open_stories, storybook
from nanomoe.synth import Seed, article, broken_rules, contains, corpus_writer, exchange, make_prompt_seeds, read_rows, seed_from, seed_row, write_rows
from nanomoe.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from nanomoe.train import read_log

LN2 = math.log(2)
logps = st.floats(-500, 0)
batches = st.integers(1, 6).flatmap(lambda n: st.tuples(*[st.lists(logps, min_size=n, max_size=n)] * 4))
betas, smoothings = st.floats(0.01, 1), st.floats(0, 0.49)


# The loss

def in_numpy(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing):
    "Loss, and its derivative after the chosen log-probability, of each pair in float64."
    margin = beta * ((np.array(chosen) - ref_chosen) - (np.array(rejected) - ref_rejected))
    sigmoid = lambda x: np.exp(-np.logaddexp(0, -x))
    loss = (1 - smoothing) * np.logaddexp(0, -margin) + smoothing * np.logaddexp(0, margin)
    return loss, -beta * ((1 - smoothing) * sigmoid(-margin) - smoothing * sigmoid(margin))


@given(batches, betas, smoothings)
def test_loss_and_gradients_are_the_formulas(batch, beta, smoothing):
    chosen, rejected, *ref = (torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in batch)
    result = dpo_loss(chosen, rejected, *ref, beta, smoothing)
    loss, slope = in_numpy(*batch, beta, smoothing)
    np.testing.assert_allclose(result.loss.detach(), loss, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.chosen, beta * (np.array(batch[0]) - batch[2]), rtol=1e-9)
    np.testing.assert_allclose(result.rejected, beta * (np.array(batch[1]) - batch[3]), rtol=1e-9)
    result.loss.sum().backward()
    np.testing.assert_allclose(chosen.grad, slope, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(rejected.grad, -slope, rtol=1e-9, atol=1e-12)
    assert not result.chosen.requires_grad and not result.rejected.requires_grad


@given(batches, betas, smoothings)
def test_float32_suffices(batch, beta, smoothing):
    result = dpo_loss(*map(torch.tensor, batch), beta, smoothing)
    np.testing.assert_allclose(result.loss, in_numpy(*batch, beta, smoothing)[0], rtol=1e-4, atol=1e-4)


@given(st.lists(st.tuples(logps, logps), min_size=1, max_size=6), betas, smoothings)
def test_a_model_that_is_its_reference_loses_ln_2(pairs, beta, smoothing):
    chosen, rejected = torch.tensor(pairs).T
    result = dpo_loss(chosen, rejected, chosen, rejected, beta, smoothing)
    torch.testing.assert_close(result.loss, torch.full_like(chosen, LN2), rtol=2e-7, atol=0)
    assert not result.chosen.any() and not result.rejected.any()
    assert dpo_loss(chosen, rejected, chosen, rejected, beta).loss.tolist() == [torch.tensor(LN2).item()] * len(pairs)      # to the last bit


@given(batches, betas, smoothings)
def test_swapping_chosen_and_rejected_flips_the_margin(batch, beta, smoothing):
    c, r, rc, rr = (torch.tensor(row, dtype=torch.float64) for row in batch)
    one, other = dpo_loss(c, r, rc, rr, beta, smoothing), dpo_loss(r, c, rr, rc, beta, smoothing)
    assert torch.equal(one.chosen - one.rejected, -(other.chosen - other.rejected))
    whole, back = dpo_loss(c, r, rc, rr, beta), dpo_loss(r, c, rr, rc, beta)     # smoothing is a share of the pairs the wrong way round
    torch.testing.assert_close(one.loss, (1 - smoothing) * whole.loss + smoothing * back.loss)


def test_smoothing_has_a_best_margin_and_nothing_else_has():
    margins = torch.linspace(-20, 60, 801, dtype=torch.float64)
    def best(smoothing): return margins[dpo_loss(margins, *torch.zeros(3, 801, dtype=torch.float64), 1.0, smoothing).loss.argmin()].item()
    assert best(0.0) == 60 and best(0.1) == pytest.approx(math.log(9), abs=0.1)


@pytest.mark.parametrize("margin", [1e4, -1e4, 1e30])
def test_far_margins_stay_finite(margin):
    chosen = torch.tensor([margin], requires_grad=True)
    loss = dpo_loss(chosen, *torch.zeros(3, 1), 1.0).loss
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all()


# The log-probabilities of answers

def full_logps(hidden, weight, labels):
    "The plain way: all logits, all log-softmaxes, one sum."
    scores = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (scores * (labels >= 0)).sum(-1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
@pytest.mark.parametrize("unlabelled", [False, True])
def test_answer_logps_are_a_log_softmax(chunk, unlabelled):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 9, 8, generator=g, requires_grad=True), torch.randn(50, 8, generator=g, requires_grad=True)
    labels = torch.randint(50, (3, 9), generator=g).masked_fill(torch.rand(3, 9, generator=g) < 0.4, IGNORE)
    if unlabelled: labels[1] = IGNORE
    shares = torch.tensor([1.0, -2.0, 0.5])
    ours, plain = answer_logps(hidden, weight, labels, chunk), full_logps(hidden, weight, labels)
    torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-5)
    if unlabelled: assert ours[1] == 0
    for a, b in zip(torch.autograd.grad((ours * shares).sum(), (hidden, weight)), torch.autograd.grad((plain * shares).sum(), (hidden, weight))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_answers_at_all():
    assert answer_logps(torch.randn(2, 3, 4), torch.randn(5, 4), torch.full((2, 3), IGNORE)).tolist() == [0, 0]


# A library's opinion

def by_trl(logp, ref, labels, beta, **settings):
    "The loss that trl's trainer makes of per-token log-probabilities (2B, T); everything around it is a stand-in."
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install --no-deps trl accelerate (1.16 agrees; it wants Python 3.11)")
    mask = torch.cat((torch.zeros(len(labels), 1, dtype=torch.long), (labels >= 0).long()), 1)
    trainer = MagicMock(beta=beta, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False, aux_loss_enabled=False,
                        **{"loss_types": ["sigmoid"], "loss_weights": [1.0], "label_smoothing": 0.0, **settings})
    trainer.accelerator = SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t)
    outputs = SimpleNamespace(log_probs=logp, entropy=torch.zeros_like(logp), mean_logits=torch.zeros_like(logp), is_top1=torch.zeros_like(logp).bool())
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, "ref_chosen_logps": ref[:len(ref) // 2], "ref_rejected_logps": ref[len(ref) // 2:]}
    try: return trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    except (AttributeError, TypeError, KeyError): pytest.skip(f"trl {trl.__version__} keeps its loss elsewhere")


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_trl_agrees(beta):
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(50, (8, 12), generator=g).masked_fill(torch.rand(8, 12, generator=g) < 0.4, IGNORE)
    per_token = (-5 * torch.rand(8, 12, generator=g) * (labels >= 0)).requires_grad_()
    ref = -30 * torch.rand(8, generator=g)
    def ours(rows=slice(None), smoothing=0.0):
        (c, r), (rc, rr) = per_token.sum(1).chunk(2), ref.chunk(2)
        return dpo_loss(c[rows], r[rows], rc[rows], rr[rows], beta, smoothing).loss.mean()
    theirs = by_trl(per_token, ref, labels, beta)
    torch.testing.assert_close(ours(), theirs)
    for a, b in zip(torch.autograd.grad(ours(), per_token), torch.autograd.grad(theirs, per_token)): torch.testing.assert_close(a, b)
    with_sft = by_trl(per_token, ref, labels, beta, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.3])       # our rpo_alpha
    torch.testing.assert_close(ours() - 0.3 * per_token[:4].sum() / (labels[:4] >= 0).sum(), with_sft)
    pair = [0, 4]       # of a single pair, trl's "aot" is the loss with label smoothing
    torch.testing.assert_close(ours(slice(0, 1), 0.2), by_trl(per_token[pair], ref[pair], labels[pair], beta, loss_types=["aot"], label_smoothing=0.2))


# Exchanging the protagonist

NOUNS, ADJECTIVES, OTHERS = ["teapot", "kettle", "drum", "robot", "umbrella"], ["brave", "shy", "old", "orange", "honest"], ["ran", "fox", "the", "and", "it", "very", "teapots"]
things = st.builds("{} {}".format, st.sampled_from(ADJECTIVES), st.sampled_from(NOUNS))
names = st.sampled_from(["Mia", "Tom", "Will", "Ivy", "Dot"])
two_things = st.tuples(things, things).filter(lambda pair: pair[0].split()[1] != pair[1].split()[1] and pair[0].split()[0] != pair[1].split()[0])
two_names = st.tuples(names, names).filter(lambda pair: pair[0] != pair[1])


def about(hero):
    "Texts about somebody: with an article before the whole name, with the lone noun, at a sentence's beginning, with 's."
    noun, a = hero.split()[-1], article(hero)
    ways = [hero, f"{hero}'s", f"“{hero}!”"] + ([f"{a} {hero}", f"the {noun}", f"The {noun}", f"{a.capitalize()} {hero}", f"the {noun}'s"] if " " in hero else [])
    return st.lists(st.sampled_from(ways) | st.sampled_from(OTHERS) | st.sampled_from([".", "\n", ","]), max_size=12).map(" ".join)


@given((two_things | two_names).flatmap(lambda pair: st.tuples(st.just(pair), about(pair[0]))))
def test_exchanging_is_complete_and_can_be_undone(case):
    (old, new), text = case
    other = exchange(text, old, new)
    assert not contains(other, old) and not contains(other, old.split()[-1])
    assert exchange(other, new, old) == text
    assert contains(other, new) == contains(text, old) and contains(other, new.split()[-1]) == contains(text, old.split()[-1])
    assert len(re.findall(r"\w+", other)) == len(re.findall(r"\w+", text)) and other.count("\n") == text.count("\n")
    for found in re.finditer(r"\b(an?) (\w+)", other, re.I): assert found[1].lower() == article(found[2])


@given((two_things | two_names).flatmap(lambda pair: st.tuples(st.just(pair), st.lists(st.sampled_from(OTHERS + ["a", "."])).map(" ".join))))
def test_a_story_without_the_protagonist_stays(case):
    (old, new), text = case
    assert exchange(text, old, new) == text


@pytest.mark.parametrize("text, old, new, result", [
    ("A brave teapot sang. The teapot was happy.", "brave teapot", "old drum", "An old drum sang. The drum was happy."),
    ("Once an orange cup met a teapot's lid.", "orange cup", "shy drum", "Once a shy drum met a teapot's lid."),
    ("Brave teapot! said the Teapot.", "brave teapot", "shy drum", "Shy drum! said the Drum."), ("Will will go.", "Will", "Tom", "Tom will go."),
    ("Mia's hat. Miami!", "Mia", "Zoë", "Zoë's hat. Miami!"), ("teapots and a teapot", "brave teapot", "shy drum", "teapots and a drum")])
def test_exchanging_by_hand(text, old, new, result): assert exchange(text, old, new) == result


def test_the_article_before_a_lone_noun_agrees(): assert exchange("It was a teapot.", "brave teapot", "shy umbrella") == "It was an umbrella."


def test_exchanging_reaches_across_line_breaks(): assert exchange("the brave\nteapot sang", "brave teapot", "shy drum").split() == "the shy drum sang".split()


# Pairs

COUNTS = {"train": 1_200, "val": 400}


@lru_cache
def told(split): return list(open_stories("storybook", split, COUNTS[split], 0))

def open_split(split): return iter(told(split))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A home with pairs of the storybook, and its seeds."
    home = tmp_path_factory.mktemp("pairs")
    seeds = make_prompt_seeds(home, open_split, 300, 60, 0)
    return home, seeds, make_dpo_data(home, exchanged_pairs(corpus_writer(open_split)), seeds)


def rows_of(home, split): return read_rows(home / "data" / "synthetic" / f"dpo_{split}.jsonl")


def test_pairs_differ_in_the_protagonist_alone(made):
    home, seeds, counts = made
    rows = [(split, row) for split in ("train", "val") for row in rows_of(home, split)]
    assert counts["accepted"] == len(rows) >= 0.9 * len(seeds)
    for split, row in rows:
        seed = seed_from(row)
        assert (seed.split == "train") == (split == "train") and seed in seeds and row["instruction"] == seed.instruction
        assert broken_rules(row["chosen"], seed) == [] and broken_rules(row["rejected"], seed) == ["missing_protagonist"]
        assert contains(row["rejected"], row["wrong"]) and not contains(row["rejected"], seed.protagonist) and not contains(row["chosen"], row["wrong"])
        assert not contains(seed.instruction, row["wrong"].split()[-1])
        assert exchange(row["rejected"], row["wrong"], seed.protagonist) == row["chosen"]
        assert not [m for m in re.finditer(r"\b(an?) ([\w-]+)", row["rejected"], re.I) if m[1].lower() != article(m[2])]


def test_stand_ins_are_of_the_same_split_and_kind_of_name(made):
    home, seeds, _ = made
    heroes = {split: {seed.protagonist for seed in seeds if seed.split == split} for split in ("train", "val", "val_seen")}
    for split in ("train", "val"):
        for row in rows_of(home, split): assert row["wrong"] in heroes[row["split"]] and row["wrong"][0].isupper() == row["protagonist"][0].isupper()


def pronoun(hero):
    "How the storybook speaks of somebody; animals without a name may be she or he."
    words = open_book()[0]
    for group, word in (("girls", "she"), ("boys", "he"), ("pets she", "she"), ("pets he", "he")):
        if hero in words[group]: return word
    return "it" if hero.split()[-1] in words["things"] else "she or he"


def test_pronouns_agree(made):
    rows = [row for split in ("train", "val") for row in rows_of(made[0], split)]
    wrong = [(row["protagonist"], row["wrong"]) for row in rows if pronoun(row["protagonist"]) != pronoun(row["wrong"])]
    assert len(wrong) <= 0.02 * len(rows), f"{len(wrong)} of {len(rows)}, for instance {wrong[:5]}"


def test_pairs_depend_on_the_seeds_alone(made, tmp_path):
    home, seeds, _ = made
    make_dpo_data(tmp_path, exchanged_pairs(corpus_writer(open_split)), seeds)
    for split in ("train", "val"): assert rows_of(tmp_path, split) == rows_of(home, split)


def test_training_pairs_come_both_ways(made, tmp_path):
    "The same two stories are asked for by either hero's instruction, so that nothing but the instruction can tell which is right."
    home, seeds, counts = made
    again = make_dpo_data(tmp_path, both_ways(exchanged_pairs(corpus_writer(open_split))), seeds)
    assert rows_of(tmp_path, "val") == rows_of(home, "val")
    rows = {row["id"]: row for row in rows_of(tmp_path, "train")}
    pairs = [(row, rows[f"{name} turned"]) for name, row in rows.items() if f"{name} turned" in rows]
    assert len(pairs) >= 0.9 * len(rows_of(home, "train")) and again["accepted"] == len(rows) + len(rows_of(home, "val"))
    for row, twin in pairs:
        assert (twin["protagonist"], twin["wrong"], twin["chosen"], twin["rejected"]) == (row["wrong"], row["protagonist"], row["rejected"], row["chosen"])
        assert twin["instruction"] == seed_from(twin).instruction != row["instruction"]
        assert broken_rules(twin["chosen"], seed_from(twin)) == [] and broken_rules(twin["rejected"], seed_from(twin)) == ["missing_protagonist"]


SEED = Seed("train-0", "train", "Mia", "kindness", ("red kite",), ("cold rain",), 2, 3, 0)
CHOSEN = "Mia had a red kite. She was happy."


@pytest.mark.parametrize("chosen, rejected, fault", [
    (CHOSEN, CHOSEN, "rejected has the right protagonist"), (CHOSEN, CHOSEN.replace("Mia", "Tom"), "rejected lacks the wrong protagonist"),
    (CHOSEN, CHOSEN.replace("Mia", "Zoe")[:-1], "rejected unfinished"), (CHOSEN, CHOSEN.replace("Mia", "Zoe").replace("kite", "ball"), "rejected missing_required"),
    (CHOSEN.replace("Mia", "Tom"), CHOSEN.replace("Mia", "Zoe"), "chosen missing_protagonist"), (CHOSEN[:-1], CHOSEN.replace("Mia", "Zoe"), "chosen unfinished"),
    (CHOSEN, "Mia and Zoe had a red kite. She was happy.", "rejected has the right protagonist")])
def test_pairs_that_break_a_rule_are_left_out(tmp_path, chosen, rejected, fault):
    seeds = [replace(SEED, id=f"{split}-{i}", split=split) for split in ("train", "val") for i in range(2)]
    good = CHOSEN.replace("Mia", "Zoe")
    def pairs(seeds): return ((seed, "Zoe", *((chosen, rejected) if seed.id == "train-1" else (CHOSEN, good))) for seed in seeds)
    counts = make_dpo_data(tmp_path, pairs, seeds)
    assert counts["accepted"] == 3 and counts[fault] == 1 and [row["id"] for row in rows_of(tmp_path, "train")] == ["train-0"]
    with pytest.raises(UserError, match="No pair for train kept the rules"): make_dpo_data(tmp_path, lambda seeds: ((seed, "Zoe", chosen, rejected) for seed in seeds), seeds)


def test_nobody_is_nobodys_stand_in():
    assert stand_ins([SEED], [CHOSEN]) == [None]
    two = [SEED, replace(SEED, id="b", protagonist="Zoe")]
    assert stand_ins(two, [CHOSEN, CHOSEN.replace("Mia", "Zoe")]) == ["Zoe", "Mia"]
    assert stand_ins(two, [CHOSEN + " Zoe came.", CHOSEN.replace("Mia", "Zoe")]) == [None, "Mia"]
    apart = [SEED, replace(SEED, id="b", protagonist="Zoe", split="val")]
    assert stand_ins(apart, [CHOSEN, CHOSEN.replace("Mia", "Zoe")]) == [None, None]


def test_a_writer_is_asked_for_the_wrong_protagonist(tmp_path):
    seeds = [replace(SEED, id=f"{split}-{i}", split=split, protagonist=name) for split in ("train", "val") for i, name in enumerate(["Mia", "Zoe", "Ada"])]
    def write(some): return ((seed, CHOSEN.replace("Mia", seed.protagonist) if seed.id != "train-2" else "No") for seed in some)
    counts = make_dpo_data(tmp_path, asked_pairs(write), seeds)
    assert counts["accepted"] == 5 and counts["chosen unfinished"] == 1 and not any("rejected" in fault for fault in counts)     # nobody was asked for train-2's stand-in
    assert make_dpo_data(tmp_path, both_ways(asked_pairs(write)), seeds) == {**counts, "accepted": 7}       # what is refused is counted once
    for row in rows_of(tmp_path, "train") + rows_of(tmp_path, "val"):
        assert contains(row["chosen"], row["protagonist"]) and contains(row["rejected"], row["wrong"]) and row["wrong"] != row["protagonist"]


# Training

MODEL = ModelConfig(vocab_size=300, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=16, max_seq_len=256)
TINY = Preset(MODEL, TrainConfig(), SFTConfig(), DPOConfig(rpo_alpha=0.1, examples=24, epochs=4, batch_size=4, evals=4, patience=0, log_every=1, lr=2e-3, muon_lr=4e-3))   # 24 steps


def rows(split, n):
    heroes = ["Mia", "Tom", "Ada", "Ben"]
    for i in range(n):
        seed = replace(SEED, id=f"{split}-{i}", split=split, protagonist=heroes[i % 4], min_sentences=1, max_sentences=4)
        chosen = f"{seed.protagonist} had a red kite." + " It flew." * (i % 3)
        wrong = heroes[(i + 1) % 4]
        yield {**seed_row(seed), "wrong": wrong, "chosen": chosen, "rejected": exchange(chosen, seed.protagonist, wrong)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "A home with a tokenizer, a model in the place of the instructed one, and pairs."
    home = tmp_path_factory.mktemp("home")
    save_tokenizer(train_tokenizer([story.text for story in storybook(n=40)], 300), home / "tokenizer.json")
    torch.manual_seed(0)
    model = NanoMoE(MODEL)
    for p in model.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=0.05)
    save_checkpoint(home / "artifacts" / "sft" / "ckpt_best.pt", model)
    write_rows(home / "data" / "synthetic" / "dpo_train.jsonl", rows("train", 24))
    write_rows(home / "data" / "synthetic" / "dpo_val.jsonl", [*rows("val_seen", 4), *rows("val", 4)])
    return home


@pytest.fixture
def home(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "home")
    return tmp_path / "home"


def pairs_of(home, split="train"): return read_pairs(home / "data" / "synthetic" / f"dpo_{split}.jsonl", load_tokenizer(home / "tokenizer.json"), 256)


def instructed(home): return load_model(home / "artifacts" / "sft" / "ckpt_best.pt")


def weights(home, name="ckpt_last.pt"): return load_checkpoint(home / "artifacts" / "dpo" / name)["model"]


def same(a, b): return all(torch.equal(a[name], b[name]) for name in a)


def by_hand(model, pair):
    "Both answers' log-probabilities from plain logits."
    return [full_logps(model.hidden(torch.tensor([tokens]))[0], model.embed.weight, torch.tensor([labels])).item() for tokens, labels in (pair.chosen, pair.rejected)]


def test_logps_do_not_depend_on_the_batch(home):
    model, pairs = instructed(home), pairs_of(home)
    ours = np.array(pair_logps(model, pairs, 5))
    np.testing.assert_allclose(ours, [by_hand(model, pair) for pair in pairs], atol=1e-3)
    np.testing.assert_allclose(ours, pair_logps(model, pairs, 24), atol=1e-3)
    np.testing.assert_allclose(ours[::-1], pair_logps(model, pairs[::-1], 1), atol=1e-3)


def test_pairs_that_do_not_fit_into_memory_go_in_halves(home, monkeypatch):
    model, pairs, hidden, sizes = instructed(home), pairs_of(home), NanoMoE.hidden, []
    whole = pair_logps(model, pairs, 8)
    def greedy(self, tokens, *more):
        sizes.append(len(tokens))
        if len(tokens) > 3: raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return hidden(self, tokens, *more)
    monkeypatch.setattr(NanoMoE, "hidden", greedy)
    np.testing.assert_allclose(whole, pair_logps(model, pairs, 8), atol=1e-3)
    assert {16, 8, 4, 2} <= set(sizes)


@pytest.mark.parametrize("cfg", [replace(TINY.dpo, rpo_alpha=0.0), replace(TINY.dpo, beta=0.3, label_smoothing=0.1, rpo_alpha=0.5)])
def test_the_objective_is_its_formula(home, cfg):
    model, pairs = instructed(home), pairs_of(home)[:4]
    batch = collate_pairs([pair._replace(reference=(-40.0 - i, -45.0 + i)) for i, pair in enumerate(pairs)])
    result, load, entropy = dpo_objective(cfg)(model, *batch)
    tokens, labels, reference, numbers = batch
    assert tokens.shape == labels.shape and len(tokens) == len(reference) == 8 and numbers.tolist() == [0, 1, 2, 3]
    hidden, routings = model.hidden(tokens)
    chosen, rejected = full_logps(hidden, model.embed.weight, labels).chunk(2)
    loss, _ = in_numpy(chosen.detach().numpy(), rejected.detach().numpy(), reference[:4].numpy(), reference[4:].numpy(), cfg.beta, cfg.label_smoothing)
    margin = cfg.beta * ((chosen - reference[:4]) - (rejected - reference[4:]))
    per_token = chosen.sum() / (labels[:4] >= 0).sum()
    assert result.dpo.item() == pytest.approx(loss.mean(), abs=1e-4) and result.chosen_logp.item() == pytest.approx(per_token.item(), abs=1e-4)
    assert result.margin.item() == pytest.approx(margin.mean().item(), abs=1e-4) and result.accuracy.item() == (margin > 0).float().mean().item()
    assert result.chosen_reward.item() == pytest.approx(cfg.beta * (chosen - reference[:4]).mean().item(), abs=1e-4)
    assert result.rejected_reward.item() == pytest.approx(cfg.beta * (rejected - reference[4:]).mean().item(), abs=1e-4)
    plain = (-(1 - cfg.label_smoothing) * margin.sigmoid().log() - cfg.label_smoothing * (-margin).sigmoid().log()).mean() - cfg.rpo_alpha * per_token + model.routing_losses(routings, (tokens != 1).flatten())[0]
    assert result.total.item() == pytest.approx(plain.item(), abs=1e-4)
    ours, theirs = (torch.autograd.grad(total, list(model.parameters())) for total in (result.total, plain))
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_first_step_loses_ln_2_and_the_margin_grows(home):
    before = (home / "artifacts" / "sft" / "ckpt_best.pt").read_bytes()
    best = train_dpo(home, TINY)
    log, val = (read_log(home / "artifacts" / "dpo" / f"{name}_log.jsonl") for name in ("train", "val"))
    assert log[0]["dpo"] == pytest.approx(LN2, abs=2e-6)
    assert abs(log[0]["chosen_reward"]) < 1e-5 and abs(log[0]["rejected_reward"]) < 1e-5
    assert len(log) == 24 and val[-1]["dpo"] < 0.65 and val[-1]["margin"] > 0.1 and best["dpo"] == min(row["dpo"] for row in val)
    assert {"accuracy", "accuracy_val", "accuracy_val_seen", "margin", "chosen_reward", "rejected_reward", "chosen_logp"} <= best.keys()
    for row in log: assert row["margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-5) and 0 <= row["accuracy"] <= 1
    # the reference has not moved: neither its file nor what was computed with it
    assert (home / "artifacts" / "sft" / "ckpt_best.pt").read_bytes() == before
    kept = json.loads((home / "artifacts" / "dpo" / "reference_train.json").read_text())["logps"]
    np.testing.assert_allclose(kept, pair_logps(instructed(home), pairs_of(home)), atol=1e-4)
    assert not same(instructed(home).state_dict(), weights(home))


def test_the_divergence_is_logged(home):
    train_dpo(home, TINY)
    assert any("kl" in name for name in read_log(home / "artifacts" / "dpo" / "train_log.jsonl")[0])


def test_the_reference_is_kept_on_disk_until_something_changes(home, monkeypatch):
    model, pairs, path, calls = instructed(home), pairs_of(home), home / "reference.json", []
    monkeypatch.setattr(dpo, "pair_logps", lambda *args: calls.append(1) or pair_logps(*args))
    first = with_reference(path, "a", model, pairs, 4)
    assert [pair.reference for pair in first] == pair_logps(model, pairs, 4) and first[0]._replace(reference=(0.0, 0.0)) == pairs[0]
    assert with_reference(path, "a", model, pairs, 4) == first and len(calls) == 1
    with_reference(path, "b", model, pairs, 4)
    assert len(calls) == 2
    for damage in (b"{", b"", b"\xff\xfe", path.read_bytes()[:-30], b'{"key": "b", "logps": 5}', json.dumps({"key": "b", "logps": [1.0] * len(pairs)}).encode(), b"[]"):
        path.write_bytes(damage)
        assert with_reference(path, "b", model, pairs, 4) == first
    assert len(calls) == 9


@pytest.mark.parametrize("content", ["[]", '{"key": "a", "logps": []}', '{"key": "a"}'])
def test_a_foreign_reference_file_is_computed_again(home, content):
    (home / "reference.json").write_text(content)
    try: assert len(with_reference(home / "reference.json", "a", instructed(home), pairs_of(home), 4)) == 24
    except (AttributeError, ValueError, KeyError) as error: pytest.fail(repr(error))


def test_training_computes_the_reference_once_and_again_for_other_data_or_another_model(home, monkeypatch):
    calls = []
    monkeypatch.setattr(dpo, "with_reference", lambda path, key, *rest: calls.append(key) or with_reference(path, key, *rest))
    few = Preset(MODEL, TrainConfig(), SFTConfig(), replace(TINY.dpo, epochs=0.5, evals=1))
    train_dpo(home, few)
    train_dpo(home, few)
    assert len(set(calls)) == 1
    data = home / "data" / "synthetic" / "dpo_val.jsonl"
    data.write_bytes(data.read_bytes().replace(b"red kite", b"red boat"))
    with pytest.raises(UserError, match="other data"): train_dpo(home, few)
    model = instructed(home)
    model.norm.weight.data *= 1.1
    save_checkpoint(home / "artifacts" / "sft" / "ckpt_best.pt", model)
    with pytest.raises(UserError, match="other data"): train_dpo(home, few)
    assert len(set(calls)) == 3
    train_dpo(home, few, fresh=True)
    assert read_log(home / "artifacts" / "dpo" / "train_log.jsonl")[0]["dpo"] == pytest.approx(LN2, abs=2e-6)


def started(home, save_minutes=5):
    "The training, in a process that can be killed."
    return start(accident=f"""
from dataclasses import replace
from nanomoe.config import *
from nanomoe.dpo import train_dpo
train_dpo({str(home)!r}, Preset({MODEL!r}, TrainConfig(), SFTConfig(), replace({TINY.dpo!r}, save_minutes={save_minutes})))
raise SystemExit
""")


def trained(home): assert started(home).wait().status == 0


def log_of(home): return [(row["step"], row["loss"], row["grad_norm"]) for row in read_log(home / "artifacts" / "dpo" / "train_log.jsonl")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")
def test_kill_and_resume_gives_the_same_losses(home, tmp_path):
    shutil.copytree(home, tmp_path / "whole")
    trained(tmp_path / "whole")
    process = started(home, save_minutes=0)
    until(lambda: len(log_of(home)) >= 9)
    process.kill()
    assert process.wait().status == -signal.SIGKILL
    trained(home)
    assert log_of(home) == log_of(tmp_path / "whole") and len(log_of(home)) == 24
    assert same(weights(home), weights(tmp_path / "whole")) and same(weights(home, "ckpt_best.pt"), weights(tmp_path / "whole", "ckpt_best.pt"))


def test_a_collapse_is_noticed(home):
    model, cfg = instructed(home), TINY.dpo
    pairs = [pair._replace(reference=tuple(by_hand(model, pair))) for pair in pairs_of(home, "val")]
    scores = score_pairs(model, pairs, cfg)
    assert scores["dpo"] == pytest.approx(LN2, abs=1e-4) and scores["margin"] == pytest.approx(0, abs=1e-4)
    answer = [sum(label >= 0 for label in pair.chosen[1]) for pair in pairs]
    assert scores["chosen_logp"] == pytest.approx(sum(pair.reference[0] for pair in pairs) / sum(answer), abs=1e-4)
    def fallen(by): return [pair._replace(reference=(pair.reference[0] + by * n, pair.reference[1])) for pair, n in zip(pairs, answer)]
    score_pairs(model, fallen(dpo.MAX_DROP - 0.01), cfg)
    with pytest.raises(UserError, match=r"0\.51 nats per token less likely"): score_pairs(model, fallen(dpo.MAX_DROP + 0.01), cfg)
    for pair, right in zip(pairs, fallen(-1.0)): assert score_pairs(model, [right], cfg)["accuracy"] == 1


def test_a_collapse_stops_the_run_and_keeps_what_was_good(home, monkeypatch):
    train_dpo(home, TINY)
    kept = weights(home, "ckpt_best.pt")
    monkeypatch.setattr(dpo, "MAX_DROP", -1e9)
    with pytest.raises(UserError, match="collapsing, so training stopped.*start with --fresh"): train_dpo(home, TINY, fresh=True)
    assert len(log_of(home)) == 6 and same(kept, weights(home, "ckpt_best.pt"))       # at the first evaluation


def test_a_sample_that_repeats_itself_stops_the_run_and_keeps_what_was_good(home):
    told, stuck = "Once there was a red kite, and it flew over the hill to a friend.", "the kite and the kite and " * 20
    def run(says, **options): return train_dpo(home, TINY, fresh=True, sample=lambda model: next(says), **options)
    run(iter([told] * 5))                           # the reference speaks first, then the model at four evaluations
    run(iter([stuck] * 5))                          # who repeats itself from the start has not collapsed
    log, val = log_of(home), read_log(home / "artifacts" / "dpo" / "val_log.jsonl")
    assert [row["sample"] for row in val] == [stuck] * 4 and [row["step"] for row in val] == [6, 12, 18, 24]
    with pytest.raises(UserError, match=r"repeats itself \(9\d% of its runs.*what was saved before stays.*--fresh"): run(iter([told, told, stuck]))
    assert log_of(home) == log[:12]                 # at the second evaluation
    assert same(weights(home, "ckpt_best.pt"), weights(home)) and load_checkpoint(home / "artifacts" / "dpo" / "ckpt_last.pt")["step"] == 6


def test_the_curves_are_what_the_logs_say(home):
    with pytest.raises(UserError, match="train first"): plot_preferences(home / "artifacts" / "dpo")
    train_dpo(home, TINY)
    loss, rewards, accuracy = plot_preferences(home / "artifacts" / "dpo").axes
    train, val = (read_log(home / "artifacts" / "dpo" / f"{name}_log.jsonl") for name in ("train", "val"))
    def drawn(axes): return [list(line.get_ydata()) for line in axes.lines]
    assert drawn(loss) == [[row["dpo"] for row in train], [row["dpo"] for row in val], [LN2, LN2]] and len(train) == 24
    assert drawn(rewards)[1:] == [[row[name] for row in log] for name in ("chosen_reward", "rejected_reward") for log in (train, val)]
    assert drawn(accuracy)[1:] == [[row["accuracy"] for row in log] for log in (train, val)]


@pytest.mark.parametrize("name", ["tokenizer.json", "artifacts/sft/ckpt_best.pt"])
def test_a_missing_file_is_one_sentence(home, name):
    (home / name).unlink()
    with pytest.raises(UserError, match="There is no"): train_dpo(home, TINY)
    assert not (home / "artifacts" / "dpo").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_pairs_are_one_sentence(home, split):
    (home / "data" / "synthetic" / f"dpo_{split}.jsonl").unlink()
    with pytest.raises(UserError, match="make it with `nanomoe make-dpo-data`"): train_dpo(home, TINY)


def test_damaged_pairs_are_one_sentence(home):
    path = home / "data" / "synthetic" / "dpo_train.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="line 24, is not a JSON object"): train_dpo(home, TINY)


def test_pairs_that_do_not_fit_are_left_out(home):
    path, tok = home / "data" / "synthetic" / "dpo_train.jsonl", load_tokenizer(home / "tokenizer.json")
    short, *others = read_rows(path)
    write_rows(path, [{**short, "rejected": "Tom ran. " * 200}, *others])
    pairs = read_pairs(path, tok, 256)
    assert len(pairs) == 23 and all(max(len(pair.chosen[0]), len(pair.rejected[0])) <= 256 for pair in pairs)
    with pytest.raises(UserError, match="No pair of .* fits"): read_pairs(path, tok, 10)
