"""Traces against the model's own routings, an expert turned off against a masked router, bits against their definition."""
import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, strategies as st

from nanomoe import moe
from nanomoe.config import ModelConfig
from nanomoe.files import UserError
from nanomoe.generate import generate
from nanomoe.routing import Trace, expert_words, mutual_information, specialization, trace_routing, trace_stories, without_expert
from nanomoe.tokenizer import BOS, train_tokenizer
from test_oracle import random_model, shapes


def tokens_for(cfg, n=9, seed=0): return torch.randint(cfg.vocab_size, (min(n, cfg.max_seq_len),), generator=torch.Generator().manual_seed(seed))


def small(**changes):
    cfg = ModelConfig(**{"vocab_size": 300, "d_model": 16, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1, "d_ff": 8, "max_seq_len": 32, **changes})
    return random_model(cfg, 0).eval()


@given(cfg=shapes(), seed=st.integers(0, 2**16))
def test_a_trace_is_what_the_model_did_and_changes_nothing(cfg, seed):
    model, tokens = random_model(cfg, seed).eval(), tokens_for(cfg, seed=seed)
    with torch.no_grad(): before, routings = model(tokens[None]), model.hidden(tokens[None])[1]
    trace = trace_routing(model, tokens)
    with torch.no_grad(): assert model(tokens[None]).equal(before)
    for layer, routing in enumerate(routings):
        assert trace.experts[layer].equal(routing.experts) and trace.weights[layer].equal(routing.weights) and trace.probs[layer].equal(routing.probs)
    assert trace.experts.shape == trace.weights.shape == (cfg.n_layers, len(tokens), cfg.top_k)
    assert trace.probs.shape == (cfg.n_layers, len(tokens), cfg.num_experts)
    assert all(a.equal(b) for a, b in zip(trace, trace_routing(model, tokens[None])))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_trace_leaves_mode_and_gradients_alone():
    model = small().train()
    assert not trace_routing(model, tokens_for(model.cfg)).probs.requires_grad
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_sums_of_a_trace_by_hand():
    trace = Trace(experts=torch.tensor([[[0, 1], [0, 2], [2, 0], [1, 0]]]), weights=torch.full((1, 4, 2), 0.5),
                  probs=torch.tensor([[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.0]]]))
    torch.testing.assert_close(trace.usage, torch.tensor([[4 / 8, 2 / 8, 2 / 8]]))
    torch.testing.assert_close(trace.entropy, torch.tensor([[1.5, 0.0, math.log2(3), 1.0]]))
    torch.testing.assert_close(trace.confidence, torch.tensor([[0.5, 1.0, 1 / 3, 0.5]]))
    torch.testing.assert_close(trace.pairs, torch.tensor([[[1.0, 0.5, 0.5], [0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]]))
    assert trace.top.tolist() == [[0, 0, 2, 1]]


@pytest.mark.parametrize("tokens", [torch.zeros(0, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long), torch.tensor([300]), torch.tensor([-1]), torch.zeros(33, dtype=torch.long)],
                         ids=["none", "a batch", "beyond the vocabulary", "negative", "beyond the context"])
def test_what_cannot_be_traced_is_refused_in_a_sentence(tokens):
    with pytest.raises(UserError, match=r"\.$"): trace_routing(small(), tokens)
    with pytest.raises(UserError, match="no text"): trace_stories(small(), None, [])


def test_stories_are_traced_each_by_itself():
    tok, texts = train_tokenizer(["the cat sat on the mat"] * 9, 270), ["the cat", "", "on the mat " * 20]
    model = small()
    tokens, trace, story = trace_stories(model, tok, texts)
    for i in range(3):
        alone = tokens[story == i]
        assert alone[0] == BOS and len(alone) <= 32
        assert trace.experts[:, story == i].equal(trace_routing(model, alone).experts)
    assert trace.probs.shape[1] == len(tokens) == len(story) and (story == 1).sum() == 1


# an expert turned off

@pytest.mark.parametrize("balance", ["aux", "bias"])
@pytest.mark.parametrize("layer", [0, 2, -1])
def test_off_is_a_score_of_minus_infinity(layer, balance):
    model, route, calls = small(balance=balance), moe.route, []
    tokens = tokens_for(model.cfg, 30)

    def masked(logits, top_k, bias=None):
        calls.append(1)
        if len(calls) - 1 == layer % 3: logits = logits.index_fill(-1, torch.tensor([1]), -torch.inf)
        return route(logits, top_k, bias)

    with torch.no_grad():
        with patch("nanomoe.moe.route", masked): expected = model(tokens[None])
        before, state = model(tokens[None]), {name: t.clone() for name, t in model.state_dict().items()}
        with without_expert(model, layer, 1) as same:
            assert same is model
            torch.testing.assert_close(model(tokens[None]), expected)
            assert not (trace_routing(model, tokens).experts[layer] == 1).any()
        assert model(tokens[None]).equal(before) and not before.allclose(expected)
    assert model.state_dict().keys() == state.keys() and all(t.equal(state[name]) for name, t in model.state_dict().items())


def test_off_holds_while_writing_and_ends_with_an_error():
    model = small()
    prompt = tokens_for(model.cfg, 5)[None]
    before = generate(model, prompt, 20, temperature=0)
    with pytest.raises(ZeroDivisionError), without_expert(model, 0, 2):
        with_cache, without = (generate(model, prompt, 20, temperature=0, use_cache=use) for use in (True, False))
        assert with_cache.equal(without) and not with_cache.equal(before)
        assert not (trace_routing(model, with_cache).experts[0] == 2).any()
        1 / 0
    assert generate(model, prompt, 20, temperature=0).equal(before) and model.blocks[0].moe.bias is None


def test_two_may_be_off_and_top_k_have_to_stay():
    model = small()
    with without_expert(model, 1, 0), without_expert(model, 1, 3):
        assert set(trace_routing(model, tokens_for(model.cfg, 30)).experts[1].unique().tolist()) == {1, 2}
        with pytest.raises(UserError, match="stay on"), without_expert(model, 1, 2): pass
        with without_expert(model, 0, 2): pass
    assert all(block.moe.bias is None for block in model.blocks)


@pytest.mark.parametrize("layer, expert", [(3, 0), (-4, 0), (0, 4), (0, -1)])
def test_there_is_no_such_expert(layer, expert):
    with pytest.raises(UserError, match=f"no (layer {layer}|expert {expert})"), without_expert(small(), layer, expert): pass


# words

@given(seed=st.integers(0, 999))
def test_words_are_counted_and_ranked_by_log_odds(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens, experts = torch.randint(12, (400,), generator=generator), torch.randint(3, (400,), generator=generator)
    for expert, column in enumerate(expert_words(tokens, experts, 3, n=99, least=30)):
        for word in column:
            is_word, is_here = tokens == word.token, experts == expert
            a, b, c, d = ((x & y).sum().item() + 0.5 for x in (is_word, ~is_word) for y in (is_here, ~is_here))
            assert (word.count, word.total) == (a - 0.5, is_word.sum().item()) and word.total >= 30
            assert word.bits == pytest.approx(math.log2(a / b / (c / d))) and word.bits > 0
        assert [w.bits for w in column] == sorted((w.bits for w in column), reverse=True)


def test_a_planted_word_leads_and_a_rare_one_does_not():
    tokens = torch.tensor([1] * 40 + [2] * 100 + [3] * 3)
    experts = torch.tensor([0] * 38 + [1] * 2 + [0, 1] * 50 + [0] * 3)
    column = expert_words(tokens, experts, 2, least=1)[0]
    assert [word.token for word in column] == [1, 3]
    assert [word.token for word in expert_words(tokens, experts, 2, least=4)[0]] == [1]
    assert expert_words(tokens, experts, 2, n=1, least=1)[0] == column[:1]
    assert expert_words(tokens, torch.zeros_like(tokens), 3, least=1)[1:] == [[], []]     # experts that nobody visits


# bits

@given(seed=st.integers(0, 999))
def test_mutual_information_is_the_entropies_of_each_less_that_of_both(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randint(5, (60,), generator=generator), torch.randint(3, (60,), generator=generator)
    def entropy(x):
        p = x.unique(return_counts=True)[1].double() / len(x)
        return -(p * p.log2()).sum().item()
    assert mutual_information(a, b) == pytest.approx(entropy(a) + entropy(b) - entropy(a * 3 + b), abs=1e-9)
    assert mutual_information(a, a) == pytest.approx(entropy(a))
    assert mutual_information(a, b) == pytest.approx(mutual_information(b, a))


def test_what_is_there_stands_out_from_the_shuffles_and_what_is_not_does_not():
    generator = torch.Generator().manual_seed(0)
    labels, noise = torch.randint(50, (3000,), generator=generator), torch.randint(4, (3000,), generator=generator)
    nothing, everything = specialization(labels, noise), specialization(labels, labels % 4)
    assert abs(nothing.bits - nothing.shuffled) < 4 * nothing.spread and nothing.bits > 0.01     # biased upwards, both of them
    assert everything.bits == pytest.approx(everything.ceiling) and everything.bits > everything.shuffled + 100 * everything.spread
    assert specialization(labels, noise) == nothing and specialization(labels, noise, seed=1) != nothing


def test_labels_of_stories_are_shuffled_by_story():
    "Every story sticks to one expert, whatever its theme: shuffling tokens would call that a link."
    generator = torch.Generator().manual_seed(0)
    story = torch.arange(40).repeat_interleave(100)
    theme, expert = (torch.randint(4, (40,), generator=generator)[story] for _ in range(2))
    by_story, by_token = specialization(theme, expert, story), specialization(theme, expert)
    assert by_story.bits == by_token.bits
    assert by_token.bits > by_token.shuffled + 10 * by_token.spread     # wrong
    assert abs(by_story.bits - by_story.shuffled) < 3 * by_story.spread
    assert specialization(theme, expert, 10 * story + 7) == by_story     # whatever the stories' numbers are
    with pytest.raises(UserError, match="same label"): specialization(torch.arange(4000), expert, story)
