"""Choosing and writing tokens, against transformers' own rules and its own greedy search."""
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, strategies as st

from nanomoe.config import ModelConfig
from nanomoe.generate import generate, keep_likely, penalize, stream_text
from nanomoe.stories import storybook
from nanomoe.tokenizer import train_tokenizer
from test_oracle import random_model, reference, shapes

transformers = pytest.importorskip("transformers")


def scores(seed, batch=3, vocab=20): return torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed)) * 3


@given(seed=st.integers(0, 999), k=st.integers(1, 25), p=st.floats(0.01, 0.99), low=st.floats(0.001, 0.99))
def test_what_is_kept(seed, k, p, low):
    logits = scores(seed)
    for ours, theirs in ((keep_likely(logits, top_k=k), transformers.TopKLogitsWarper(k)), (keep_likely(logits, top_p=p), transformers.TopPLogitsWarper(p)),
                         (keep_likely(logits, min_p=low), transformers.MinPLogitsWarper(low))):
        torch.testing.assert_close(ours, theirs(None, logits.clone()))


@given(seed=st.integers(0, 999), penalty=st.floats(0.5, 3))
def test_penalty(seed, penalty):
    seen = torch.randint(20, (3, 8), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(penalize(scores(seed), seen, penalty), transformers.RepetitionPenaltyLogitsProcessor(penalty)(seen, scores(seed)))


@given(cfg=shapes(), seed=st.integers(0, 2**16), temperature=st.sampled_from([0, 0.7, 1.5]), cut=st.sampled_from([{}, {"top_k": 5}, {"top_p": 0.8, "repetition_penalty": 1.3}]))
def test_same_tokens_with_and_without_the_cache(cfg, seed, temperature, cut):
    model = random_model(cfg, seed).eval()
    prompt = torch.randint(cfg.vocab_size, (2, 5))
    a, b = (generate(model, prompt, 99, temperature=temperature, seed=seed, use_cache=use, **cut) for use in (True, False))
    assert a.equal(b) and a.shape == (2, cfg.max_seq_len + 1)      # the last token is drawn from a full context


@given(cfg=shapes(), seed=st.integers(0, 2**16))
def test_greedy_text_is_that_of_transformers(cfg, seed):
    model = random_model(cfg, seed).eval()
    prompt = torch.randint(cfg.vocab_size, (1, 5))
    theirs = reference(cfg, model).generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(model, prompt, 15, temperature=0).equal(theirs)


TOK = train_tokenizer([story.text for story in storybook(n=50)], 300)


@given(ids=st.lists(st.integers(4, 299), max_size=40))
def test_pieces_join_to_the_whole_text(ids):
    def written(*_, **__):
        for i in ids: yield torch.tensor([i])
        return "length"
    with patch("nanomoe.generate.stream", written): pieces = list(stream_text(tiny(300), TOK, "x"))
    assert "".join(pieces) == TOK.decode(ids) and "" not in pieces


def tiny(vocab_size):
    return random_model(ModelConfig(vocab_size=vocab_size, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=4, max_seq_len=64), 0).eval()


def test_rows_that_have_ended_stay_ended():
    tokens = generate(tiny(6), torch.full((8, 1), 5), 60, seed=0, eos_id=3)
    assert (tokens == 3).any()
    for row in tokens[:, 1:].tolist():
        if 3 in row: assert set(row[row.index(3):]) == {3}
