"""Instruction tuning: what is learned and what is not, batches, early stopping, and runs that are killed."""
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forks import start, until
from nanomoe.checkpoint import load_checkpoint, load_model, save_checkpoint
from nanomoe.config import ModelConfig, Preset, SFTConfig, TrainConfig
from nanomoe.data import load_shards, write_shards
from nanomoe.files import UserError
from nanomoe.model import IGNORE, NanoMoE
from nanomoe.sft import Examples, drilled_loss, encode_drill, encode_example, make_drills, pad_rows, plain_stories, prompt_ids, score_answers, side_by_side, train_sft
from nanomoe.stories import storybook
from nanomoe.synth import Seed, contains, read_rows, seed_row, write_rows
from nanomoe.tokenizer import BOS, EOS, PAD, save_tokenizer, train_tokenizer
from nanomoe.train import read_log

MODEL = ModelConfig(vocab_size=300, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=16, max_seq_len=256)
CHOSEN = Preset(MODEL, TrainConfig(), SFTConfig(examples=32, epochs=5, batch_size=4, drills=0.0, replay=0.0, evals=5, patience=0, log_every=1))     # 40 steps


STORIES = [f"Once a fox had {i} red kites. They flew over the hill." for i in range(20)]


def rows(split, n, start=0):
    "Instructions and answers of a few words each, which a tiny model can learn."
    for i in range(start, start + n):
        name = ["Mia", "Tom", "Ada", "Ben"][i % 4]
        seed = Seed(f"{split}-{i}", split, name, "kindness", ("red kite", "big hill"), (), 1, 4, i)
        yield {**seed_row(seed), "response": f"{name} had a red kite." + " It flew over the big hill." * (1 + i % 3)}


@pytest.fixture(scope="module")
def tok(): return train_tokenizer([story.text for story in storybook(n=40)], 300)


@pytest.fixture(scope="module")
def prepared(tok, tmp_path_factory):
    "A home with a tokenizer, a base model that is not quite new, and answers."
    home = tmp_path_factory.mktemp("home")
    save_tokenizer(tok, home / "tokenizer.json")
    torch.manual_seed(0)
    model = NanoMoE(MODEL)
    for p in model.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=0.05)      # a new model's experts write nothing
    save_checkpoint(home / "artifacts" / "pretraining" / "ckpt_best.pt", model)
    folder = home / "data" / "synthetic"
    write_rows(folder / "sft_train.jsonl", rows("train", 32))
    write_rows(folder / "sft_val.jsonl", [*rows("val_seen", 6, 32), *rows("val", 6, 40)])
    write_shards({"train": STORIES, "val": STORIES[:1]}, tok, home / "data" / "shards")
    return home


@pytest.fixture
def home(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def model(prepared): return load_model(prepared / "artifacts" / "pretraining" / "ckpt_best.pt")


def weights(home, name="ckpt_last.pt", stage="sft"): return load_checkpoint(home / "artifacts" / stage / name)["model"]


def same(a, b): return all(torch.equal(a[name], b[name]) for name in a)


# What is learned

def test_labels_begin_with_the_answer_and_end_with_eos(tok):
    tokens, labels = encode_example(tok, "Tell a story.", "Mia ran.")
    prompt, answer = prompt_ids(tok, "Tell a story."), tok.encode("Mia ran.").ids
    assert prompt[0] == BOS and tok.decode(prompt[1:]) == "Tell a story.\n\n" and len(tokens) == len(labels)
    assert tokens == prompt + answer and labels == [IGNORE] * (len(prompt) - 1) + answer + [EOS]
    assert labels[len(prompt) - 1] == answer[0]         # the prompt's last token predicts the answer's first


@given(st.text(min_size=1, max_size=40), st.text(max_size=60))
def test_every_label_is_the_next_token(tok, instruction, response):
    tokens, labels = encode_example(tok, instruction, response)
    whole = [*prompt_ids(tok, instruction), *tok.encode(response).ids, EOS]
    assert tokens == whole[:-1] and all(label in (IGNORE, after) for label, after in zip(labels, whole[1:]))
    assert sum(label != IGNORE for label in labels) == len(tok.encode(response).ids) + 1
    assert tok.decode([label for label in labels if label != IGNORE]) == response


def losses_and_gradients(model, x, y):
    model.zero_grad()
    loss = model.loss(x, y)
    loss.ce.backward()
    return loss.ce.item(), [p.grad.clone() for p in model.parameters()]


def one(tok, response="Tom ran up the big hill."): return encode_example(tok, "Tell a story about Tom.", response)


def test_the_prompts_labels_change_nothing(tok, model):
    tokens, labels = one(tok)
    x, y = pad_rows([(tokens, labels)])
    before, gradients = losses_and_gradients(model, x, y)
    shown = y.clone()
    shown[y == IGNORE] = torch.randint(-1000, -1, (int((y == IGNORE).sum()),))      # whatever stands there, as long as it is no token
    after, others = losses_and_gradients(model, x, shown)
    assert before == after and all(torch.equal(a, b) for a, b in zip(gradients, others))
    logits = model(x)[0].double().log_softmax(-1)
    prompt = len(prompt_ids(tok, "Tell a story about Tom."))
    answer = torch.tensor([*tok.encode("Tom ran up the big hill.").ids, EOS])
    assert before == pytest.approx(-logits[prompt - 1:].gather(1, answer[:, None]).mean().item(), abs=1e-5)   # of the answer alone


@pytest.mark.parametrize("place", ["first", "EOS"])
def test_the_ends_of_the_answer_are_trained_on(tok, model, place):
    tokens, labels = one(tok)
    at = len(prompt_ids(tok, "Tell a story about Tom.")) - 1 if place == "first" else -1
    assert labels[at] == (tok.encode("Tom ran up the big hill.").ids[0] if place == "first" else EOS)
    x, y = pad_rows([(tokens, labels)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(x).log_softmax(-1)[0, at, labels[at]].item()
    for _ in range(5):
        losses_and_gradients(model, x, y)
        optimizer.step()
    assert model(x).log_softmax(-1)[0, at, labels[at]].item() > before


def test_padding_changes_neither_loss_nor_gradients(tok, model):
    short, long = one(tok, "Tom ran."), one(tok, "Tom ran up the big hill, and the red kite flew over it.")
    x, y = pad_rows([short, long])
    assert (x[0, len(short[0]):] == PAD).all() and (y[0, len(short[0]):] == IGNORE).all() and x.shape == y.shape == (2, len(long[0]))
    padded = [losses_and_gradients(model, x[:1], y[:1]), losses_and_gradients(model, *(t.clone() for t in (x, y)))]
    alone = losses_and_gradients(model, *pad_rows([short]))
    assert padded[0][0] == pytest.approx(alone[0], rel=1e-5)
    for a, b in zip(padded[0][1], alone[1]): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    parts, n = [alone, losses_and_gradients(model, *pad_rows([long]))], [sum(l >= 0 for l in row[1]) for row in (short, long)]
    assert padded[1][0] == pytest.approx(sum(p[0] * k for p, k in zip(parts, n)) / sum(n), rel=1e-5)      # a batch is the mean over its tokens
    for both, a, b in zip(padded[1][1], *(p[1] for p in parts)): torch.testing.assert_close(both, (a * n[0] + b * n[1]) / sum(n), rtol=1e-4, atol=1e-6)


def test_padding_does_not_change_the_routers_losses(tok, model):
    x, y = pad_rows([one(tok, "Tom ran."), one(tok, "Tom ran up the big hill, and the red kite flew over it." * 2)])
    short = len(one(tok, "Tom ran.")[0])
    padded, alone = (model.loss_and_routing(x[:1, :n], y[:1, :n]) for n in (x.shape[1], short))
    assert padded[1].sum() == alone[1].sum() and padded[0].load_balance.item() == pytest.approx(alone[0].load_balance.item(), abs=1e-4)


# Batches

def numbered(n, batch_size, seed=0, lengths=None):
    return Examples(list(range(n)), lengths or [7 * i % 50 for i in range(n)], batch_size, lambda some: some, seed)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 5))
def test_an_epoch_is_every_example_once(n, batch_size, seed):
    batches = numbered(n, batch_size, seed)
    assert batches.per_epoch == n // min(batch_size, n)
    for epoch in range(3):
        counts = Counter(i for step in range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch) for i in batches(step))
        assert set(counts.values()) == {1} and sum(counts.values()) == batches.per_epoch * min(batch_size, n)     # those over wait for another epoch
        assert len(counts) > n - min(batch_size, n)


@given(st.integers(4, 60), st.integers(1, 6), st.lists(st.integers(0, 100), min_size=1, max_size=12))
def test_a_batch_depends_on_seed_and_step_alone(n, batch_size, steps):
    used = numbered(n, batch_size)
    for step in steps: assert used(step) == numbered(n, batch_size)(step)      # whatever was asked for before


def test_epochs_and_seeds_differ():
    a, b = numbered(64, 8), numbered(64, 8, seed=1)
    first, second = [a(i) for i in range(8)], [a(i) for i in range(8, 16)]
    assert first != second and first != [b(i) for i in range(8)]
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}    # not the same companions each time


@given(st.integers(1, 5), st.integers(0, 20))
def test_processes_share_a_batch(world, step):
    batches = numbered(40, 8)
    shares = [batches(step, rank, world) for rank in range(world)]
    assert Counter(i for share in shares for i in share) == Counter(batches(step)) and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_batches_are_of_similar_length():
    lengths = [int(x) for x in torch.randint(10, 300, (512,), generator=torch.Generator().manual_seed(0))]
    batches = numbered(512, 8, lengths=lengths)
    def wasted(groups): return 1 - sum(lengths) / sum(len(group) * max(lengths[i] for i in group) for group in groups)
    grouped, plain = wasted([batches(i) for i in range(64)]), wasted([range(i, i + 8) for i in range(0, 512, 8)])
    assert grouped < 0.12 < 0.35 < plain
    means = [sum(lengths[i] for i in batches(step)) / 8 for step in range(64)]
    assert means != sorted(means)               # and not from the short ones to the long ones


def test_fewer_examples_than_processes_are_a_sentence(tok):
    batches = Examples([one(tok)], [20], 4, pad_rows)
    with pytest.raises(UserError): [batches(0, rank, 2) for rank in range(2)]


# Drills

@pytest.mark.parametrize("story, hero, before, mention", [
    ("Once there was Mia. Mia ran.", "Mia", "Once there was", " Mia"), ("Mia ran.", "Mia", "", "Mia"), ("It rained.\nMia's hat", "Mia", "It rained.", "\nMia"),
    ("In Miami, a brave teapot sang.", "brave teapot", "In Miami, a", " brave teapot"), ("Miami! MIA ran.", "Mia", "Miami!", " MIA")])
def test_a_drill_is_the_first_mention_alone(tok, story, hero, before, mention):
    tokens, labels = encode_drill(tok, "Tell a story.", story, hero)
    learned = [label for label in labels if label != IGNORE]
    assert tok.decode(learned) == mention and labels[-len(learned):] == learned and len(tokens) == len(labels)
    whole = encode_example(tok, "Tell a story.", story)         # and up to there it is the example itself
    assert [*tokens, labels[-1]] == [*whole[0], EOS][:len(tokens) + 1] == prompt_ids(tok, "Tell a story.") + tok.encode(before + mention).ids


def test_drills_are_about_the_hero(tok):
    stories = [row for row in rows("train", 8)]
    drills = make_drills(tok, stories)
    assert len(drills) == len(stories) and make_drills(tok, []) == []
    for row, (tokens, labels) in zip(stories, drills):
        name = tok.decode([label for label in labels if label != IGNORE]).strip()
        assert tok.decode(tokens).startswith("Theme: ") and contains(tok.decode(tokens).split("\n\n")[0], f"about {name}") or contains(tok.decode(tokens), name)
        assert name.lower() == row["protagonist"].lower()


@pytest.mark.parametrize("hero, story", [("brave teapot", "A brave\nteapot sang."), ("brave teapot", "A brave, teapot sang.")])
def test_every_mention_that_the_filter_accepts_can_be_drilled(tok, hero, story):
    row = {**next(rows("train", 1)), "protagonist": hero, "response": story}
    assert contains(story, hero) and len(make_drills(tok, [row])) == 1


def test_stories_without_an_instruction_are_part_of_the_training(home):
    "The model is not to forget how a story begins when nobody asks."
    best = train_sft(home, Preset(MODEL, TrainConfig(), replace(CHOSEN.sft, epochs=1, replay=0.5, evals=1)))
    assert best["step"] == 12       # 32 examples and 16 stories, in batches of 4


@given(st.integers(1, 50))
def test_plain_stories_are_whole_and_from_everywhere(tok, prepared, n):
    told = plain_stories(load_shards(prepared / "data" / "shards", tok).train, n)
    whole = [[BOS, *tok.encode(text).ids, EOS] for text in STORIES]
    assert len(told) == n and all([*tokens, labels[-1]] in whole and tokens[1:] == labels[:-1] for tokens, labels in told)
    assert len({str(tokens) for tokens, _ in told}) == min(n, 20)


def test_replay_needs_the_shards(home):
    shutil.rmtree(home / "data" / "shards")
    with pytest.raises(UserError, match="prepare-data"): train_sft(home, Preset(MODEL, TrainConfig(), replace(CHOSEN.sft, replay=0.5)))


def test_nothing_asked_is_a_story_alone(tok):
    tokens, labels = encode_example(tok, "", "It rained.")
    assert tokens[0] == BOS and tokens[1:] == labels[:-1] and labels[-1] == EOS and IGNORE not in labels


def test_drills_are_part_of_the_training(home):
    best = train_sft(home, Preset(MODEL, TrainConfig(), replace(CHOSEN.sft, epochs=1, drills=0.5, evals=1)))
    log = read_log(home / "artifacts" / "sft" / "train_log.jsonl")
    assert best["step"] == 8 == len(log) and all(row["drill"] > 0 for row in log)      # 32 examples in batches of 4, and 2 drills beside each
    alone = train_sft(home, Preset(MODEL, TrainConfig(), replace(CHOSEN.sft, epochs=1, evals=1)), fresh=True)
    assert log[-1]["tokens"] > read_log(home / "artifacts" / "sft" / "train_log.jsonl")[-1]["tokens"] > 0 and alone["step"] == 8      # both halves of a batch are read


def test_there_may_be_fewer_examples_than_were_asked_for(home):
    assert train_sft(home, Preset(MODEL, TrainConfig(), replace(CHOSEN.sft, examples=1_000, epochs=1, evals=1)))["step"] == 8     # of 32, in batches of 4


def test_stories_and_drills_weigh_the_same(tok, model):
    "Against torch's own loss, in value and gradient."
    some = list(rows("train", 3))
    stories, drills = pad_rows([encode_example(tok, row["instruction"], row["response"]) for row in some]), pad_rows(make_drills(tok, some[:1]))
    parts = drilled_loss(model, *drills, *stories)[0]
    def mean(tokens, labels): return torch.nn.functional.cross_entropy(model(tokens)[labels >= 0], labels[labels >= 0])
    by_hand = mean(*stories) + mean(*drills)
    torch.testing.assert_close(parts.ce + parts.drill, by_hand, atol=1e-5, rtol=1e-4)
    ours, theirs = (torch.autograd.grad(loss, model.embed.weight)[0] for loss in (parts.ce + parts.drill, by_hand))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_side_by_side_shares_with_processes():
    batches = side_by_side(lambda *place: ("drills", *place), lambda *place: ("stories", *place))
    assert batches(3, 1, 2) == ("drills", 3, 1, 2, "stories", 3, 1, 2)


# Scores

def test_the_score_is_the_mean_over_the_answers_tokens(tok, model):
    coded = [(row["split"], encode_example(tok, row["instruction"], row["response"])) for row in [*rows("val_seen", 5), *rows("val", 6, 5)]]
    scores = score_answers(model, coded, batch_size=3)
    nats, counts = Counter(), Counter()
    for split, (tokens, labels) in coded:
        logps = model(torch.tensor([tokens]))[0].double().log_softmax(-1)
        for i, label in enumerate(labels):
            if label != IGNORE: nats[split] -= logps[i, label].item(); counts[split] += 1
    assert scores["nats"] == pytest.approx(nats.total() / counts.total(), abs=1e-5)
    assert {split: scores[f"nats_{split}"] for split in nats} == pytest.approx({split: nats[split] / counts[split] for split in nats}, abs=1e-5)
    assert scores == pytest.approx(score_answers(model, coded[::-1], batch_size=11), abs=1e-5)      # no matter how they are batched


# Training

def test_it_starts_from_the_base_and_gets_better(home):
    base = load_checkpoint(home / "artifacts" / "pretraining" / "ckpt_best.pt")
    best = train_sft(home, CHOSEN)
    log, val = (read_log(home / "artifacts" / "sft" / f"{name}_log.jsonl") for name in ("train", "val"))
    assert best["step"] == 40 and best["nats"] == val[-1]["nats"] < val[0]["nats"] and {"nats_val_seen", "nats_val"} <= best.keys()
    assert same(base["model"], load_checkpoint(home / "artifacts" / "pretraining" / "ckpt_best.pt")["model"])     # the base itself stays
    assert all(row["load_balance"] >= 0.9 and row["loss"] > row["ce"] for row in log)         # the routers' losses stay on
    still = Preset(MODEL, TrainConfig(), replace(CHOSEN.sft, lr=0.0, muon_lr=0.0, weight_decay=0.0))
    train_sft(home, still, fresh=True)
    assert same(weights(home, "ckpt_best.pt"), base["model"])
    tok_rows = read_log(home / "artifacts" / "sft" / "train_log.jsonl")
    assert tok_rows[0]["ce"] == pytest.approx(log[0]["ce"], abs=1e-6)       # both began with the same batch and the same weights


def test_it_ends_early_when_held_out_answers_get_less_likely(home):
    write_rows(home / "data" / "synthetic" / "sft_val.jsonl", [{**row, "response": "zq " * 12 + "xj."} for row in rows("val", 6, 40)])      # nothing that training teaches
    patient = Preset(MODEL, TrainConfig(), replace(CHOSEN.sft, evals=20, patience=2, muon_lr=0.02))
    best = train_sft(home, patient)
    val = read_log(home / "artifacts" / "sft" / "val_log.jsonl")
    assert best["step"] < val[-1]["step"] < 40 and [row["step"] for row in val if row["step"] > best["step"]] == [best["step"] + 2, best["step"] + 4]
    assert best["nats"] == min(row["nats"] for row in val)
    kept = weights(home, "ckpt_best.pt")
    assert train_sft(home, patient) == best and same(kept, weights(home, "ckpt_best.pt"))     # over is over
    train_sft(home, Preset(MODEL, TrainConfig(), replace(patient.sft, patience=0)))           # and may go on after all
    assert read_log(home / "artifacts" / "sft" / "val_log.jsonl")[-1]["step"] == 40


def started(home, save_minutes=5):
    "The training, in a process that can be killed."
    return start(accident=f"""
from dataclasses import replace
from nanomoe.config import *
from nanomoe.sft import train_sft
train_sft({str(home)!r}, Preset({MODEL!r}, TrainConfig(), replace({CHOSEN.sft!r}, save_minutes={save_minutes})))
raise SystemExit
""")


def trained(home): assert started(home).wait().status == 0


def log_of(home): return [(row["step"], row["loss"], row["grad_norm"]) for row in read_log(home / "artifacts" / "sft" / "train_log.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    home = tmp_path_factory.mktemp("whole") / "home"
    shutil.copytree(prepared, home)
    trained(home)
    return home


@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")
@pytest.mark.parametrize("after", [3, 21])
def test_kill_and_resume_gives_the_same_losses(home, uninterrupted, after):
    process = started(home, save_minutes=0)
    until(lambda: len(log_of(home)) >= after)
    process.kill()
    assert process.wait().status == -signal.SIGKILL
    trained(home)
    assert log_of(home) == log_of(uninterrupted) and len(log_of(home)) == 40
    assert same(weights(home), weights(uninterrupted)) and same(weights(home, "ckpt_best.pt"), weights(uninterrupted, "ckpt_best.pt"))


FEW = Preset(MODEL, TrainConfig(), replace(CHOSEN.sft, epochs=0.5, evals=2))      # 4 steps


def test_a_run_is_not_resumed_on_another_base_or_other_data(home):
    train_sft(home, FEW)
    before = (home / "artifacts" / "sft" / "ckpt_last.pt").read_bytes()
    path = home / "data" / "synthetic" / "sft_train.jsonl"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"red kite", b"red ship"))
    with pytest.raises(UserError, match="other data"): train_sft(home, FEW)
    path.write_bytes(data)
    with pytest.raises(UserError, match="with batch_size=4, now 2:"): train_sft(home, Preset(MODEL, TrainConfig(), replace(FEW.sft, batch_size=2)))
    base = home / "artifacts" / "pretraining" / "ckpt_best.pt"
    model = load_model(base)
    model.norm.weight.data *= 1.01
    save_checkpoint(base, model)
    with pytest.raises(UserError, match="from another model,.*nanomoe train-sft --fresh"): train_sft(home, FEW)
    assert before == (home / "artifacts" / "sft" / "ckpt_last.pt").read_bytes()
    assert train_sft(home, FEW, fresh=True)["step"] > 0


def test_a_run_is_not_resumed_on_other_held_out_answers(home):
    train_sft(home, FEW)
    write_rows(home / "data" / "synthetic" / "sft_val.jsonl", rows("val", 6, 60))
    with pytest.raises(UserError): train_sft(home, FEW)


def test_another_tokenizer_is_refused(home):
    save_tokenizer(train_tokenizer([story.text for story in storybook(n=40)], 400), home / "tokenizer.json")
    with pytest.raises(UserError): train_sft(home, FEW)


@pytest.mark.parametrize("name, sentence", [("tokenizer.json", "run `nanomoe tokenizer`"), ("artifacts/pretraining/ckpt_best.pt", "There is no checkpoint"),
                                            ("data/synthetic/sft_train.jsonl", "make it with `nanomoe make-sft-data`"), ("data/synthetic/sft_val.jsonl", "make it with `nanomoe make-sft-data`")])
def test_a_missing_file_is_one_sentence(home, name, sentence):
    (home / name).unlink()
    with pytest.raises(UserError, match=sentence): train_sft(home, FEW)
    assert not (home / "artifacts" / "sft").exists()


def test_damaged_data_is_one_sentence(home):
    path = home / "data" / "synthetic" / "sft_train.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="line 32, is not a JSON object"): train_sft(home, FEW)


def test_what_does_not_fit_is_left_out(home):
    path = home / "data" / "synthetic" / "sft_train.jsonl"
    long = {**next(rows("train", 1, 99)), "response": "Mia ran. " * 200}
    write_rows(path, [long, *read_rows(path)])
    train_sft(home, FEW)                        # and does not end in an error in the middle
    log = read_log(home / "artifacts" / "sft" / "train_log.jsonl")
    assert len(log) == 4 and max(b["tokens"] - a["tokens"] for a, b in zip(log, log[1:])) <= 4 * MODEL.max_seq_len
    write_rows(path, [long])
    with pytest.raises(UserError, match="No example of .* fits into the model's context of 256 tokens"): train_sft(home, FEW, fresh=True)
