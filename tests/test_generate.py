"""Choosing and writing tokens, against transformers' own rules and its own greedy search."""
import shutil
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanomoe.attention import KVCache
from nanomoe.config import ModelConfig
from nanomoe.files import UserError
from nanomoe.generate import bench_decode, decode_step, generate, keep_likely, penalize, stream, stream_text
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


@settings(max_examples=40)
@given(cfg=shapes(), seed=st.integers(0, 2**16), temperature=st.sampled_from([0, 0.7, 1.5]), cut=st.sampled_from([{}, {"top_k": 5}, {"top_p": 0.8, "repetition_penalty": 1.3}]))
def test_same_tokens_with_and_without_the_cache(cfg, seed, temperature, cut):
    model = random_model(cfg, seed).eval()
    prompt = torch.randint(cfg.vocab_size, (2, 5))
    a, b = (generate(model, prompt, 99, temperature=temperature, seed=seed, use_cache=use, **cut) for use in (True, False))
    assert a.equal(b) and a.shape == (2, cfg.max_seq_len + 1)      # the last token is drawn from a full context


@given(cfg=shapes(), seed=st.integers(0, 2**16))
def test_the_step_on_one_page_is_the_model(cfg, seed):
    model, tokens = random_model(cfg, seed).eval(), torch.randint(cfg.vocab_size, (1, 5))
    one, other = KVCache(cfg), KVCache(cfg)
    with torch.inference_mode():
        model(tokens[:, :2], other)
        for i in range(2, 5): scores = decode_step(model, tokens[0, i:i + 1], torch.tensor([i]), other.keys, other.values)
        torch.testing.assert_close(scores, model(tokens, one)[:, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((other.keys, other.values), (one.keys, one.values), atol=1e-5, rtol=1e-4)


@settings(max_examples=40)
@given(cfg=shapes(), seed=st.integers(0, 2**16), how=st.sampled_from([{"temperature": 0}, {"temperature": 0.9, "top_k": 5}, {"temperature": 1.5, "repetition_penalty": 1.3}]))
def test_a_text_of_such_steps_is_the_same(cfg, seed, how):
    "Without the compiler, which takes seconds for each shape; the next test compiles one."
    model, prompt = random_model(cfg, seed).eval(), torch.randint(cfg.vocab_size, (1, 3))
    with patch("nanomoe.generate._compiled_step", lambda: decode_step): found = generate(model, prompt, 99, seed=seed, compiled=True, **how)
    assert found.equal(generate(model, prompt, 99, seed=seed, **how)) and found.shape == (1, cfg.max_seq_len + 1)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="torch.compile needs a C++ compiler")
def test_a_compiled_text_is_the_same():
    cfg = ModelConfig(vocab_size=64, d_model=16, n_layers=1, n_heads=4, n_kv_heads=2, d_ff=12, max_seq_len=64)
    model, prompt = random_model(cfg, 0).eval(), torch.randint(4, 64, (1, 3))
    for how in ({"temperature": 0}, {"seed": 1}): assert generate(model, prompt, 99, compiled=True, **how).equal(generate(model, prompt, 99, **how))


def test_what_cannot_be_compiled():
    model = tiny(20)
    for prompts, how in (([[4, 5], [6, 7]], {}), ([[4, 5]], {"use_cache": False})):
        with pytest.raises(UserError, match="one prompt and a cache"): generate(model, torch.tensor(prompts), 3, compiled=True, **how)


@settings(max_examples=40)
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
        return ["length"]
    with patch("nanomoe.generate.stream", written): pieces = list(stream_text(tiny(300), TOK, "x"))
    assert "".join(pieces) == TOK.decode(ids) and "" not in pieces


def tiny(vocab_size):
    return random_model(ModelConfig(vocab_size=vocab_size, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=4, max_seq_len=64), 0).eval()


def test_rows_that_have_ended_stay_ended():
    tokens = generate(tiny(6), torch.full((8, 1), 5), 60, seed=0, eos_id=3)
    assert (tokens == 3).any()
    for row in tokens[:, 1:].tolist():
        if 3 in row: assert set(row[row.index(3):]) == {3}


@settings(max_examples=40)
@given(cfg=shapes(), seed=st.integers(0, 2**16), lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), use=st.booleans(),
       how=st.sampled_from([{"temperature": 0}, {"top_p": 0.9}, {"temperature": 0.8, "min_p": 0.05, "repetition_penalty": 1.2}]), eos=st.sampled_from([None, 3]))
def test_each_prompt_of_a_batch_gives_what_it_gives_alone(cfg, seed, lengths, use, how, eos):
    model, prompts = random_model(cfg, seed).eval(), [torch.randint(4, 64, (n,)) for n in lengths]
    together = generate(model, prompts, 15, seed=seed, use_cache=use, eos_id=eos, **how)
    for i, (row, prompt) in enumerate(zip(together, prompts)):
        assert row.equal(generate(model, prompt[None], 15, seed=seed + i, eos_id=eos, **how)[0])


def test_a_batch_of_greedy_texts_is_that_of_transformers():
    cfg = ModelConfig(vocab_size=64, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=12, max_seq_len=64)
    model, prompts = random_model(cfg, 0).eval(), [torch.randint(4, 64, (n,)) for n in (3, 9, 5)]
    padded = torch.stack([torch.cat((torch.zeros(9 - len(p), dtype=torch.long), p)) for p in prompts])
    theirs = reference(cfg, model).generate(padded, attention_mask=(padded > 0).long(), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    for row, prompt, expected in zip(generate(model, prompts, 20, temperature=0), prompts, theirs):
        assert row.equal(expected[9 - len(prompt):])


def reasons(*args, **kwargs):
    steps = stream(*args, **kwargs)
    while True:
        try: next(steps)
        except StopIteration as end: return end.value


def test_every_row_says_why_it_ended():
    model = tiny(8)     # room for 64 tokens
    prompts = [torch.full((n,), 5) for n in (60, 10, 64)]
    assert reasons(model, prompts, 5, temperature=0) == ["length", "length", "context"]
    assert reasons(model, prompts, 500, temperature=0) == ["context"] * 3
    assert reasons(model, prompts, 0) == ["length"] * 3
    first = next(stream(model, prompts[1][None], 1, temperature=0)).item()
    assert reasons(model, [prompts[1], torch.full((3,), 6)], 4, temperature=0, eos_id=first)[0] == "stop"


@pytest.mark.parametrize("length", [None, 0, 65])
def test_prompts_that_cannot_be_gone_on_with_are_sentences(length):
    with pytest.raises(UserError, match=r"\.$"): generate(tiny(8), [] if length is None else [torch.ones(length, dtype=torch.long)], 4)


@pytest.mark.parametrize("prompts", [torch.tensor([2, 5]), torch.tensor([[[2]]]), torch.tensor([[2, 9_999]]), torch.tensor([[2, -1]])], ids=["no batch", "too deep", "beyond the vocabulary", "negative"])
def test_prompts_that_are_none_are_sentences(prompts):
    with pytest.raises(UserError, match=r"\.$"): generate(tiny(8), prompts, 4)


@pytest.mark.parametrize("name, values", {"temperature": (-1, 1e-40, float("nan"), float("inf")), "repetition_penalty": (0, 1e-40, float("nan"), float("inf")), "seed": (2 ** 64, -2 ** 63), "top_k": (-1,),
                                          "top_p": (-0.1, 1.1, float("nan")), "min_p": (-0.1, 1.5), "max_new_tokens": (-1,)}.items())
def test_mistakes_are_sentences(name, values):
    for value in values:
        with pytest.raises(UserError, match=rf"{name.replace('_', '.')}.*\.$"): generate(tiny(8), [torch.ones(2, dtype=torch.long)], **{name: value})


def test_no_piece_ends_inside_a_character():
    text = "".join(chr(x) for x in (0x2603, 0x1F409, 0xE9)) * 2
    ids = TOK.encode(text).ids      # several tokens for each character
    assert len(ids) > len(text)
    def written(*_, **__):
        for i in ids: yield torch.tensor([i])
        return ["length"]
    with patch("nanomoe.generate.stream", written): pieces = list(stream_text(tiny(300), TOK, "x"))
    assert "".join(pieces) == text and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_the_benchmark_lets_others_join():
    cfg, calls = ModelConfig(vocab_size=64, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=8, max_seq_len=32), []
    threads = torch.get_num_threads()
    speeds = bench_decode(cfg, prompt=4, new=6, runs=2, threads=1, also={"other": lambda prompt, new: calls.append((prompt.shape, new))})
    assert list(speeds) == ["with cache", "without cache", "8 prompts, with cache", "transformers", "other"] and min(speeds.values()) > 0
    assert calls == [((1, 4), 6)] * 3 and torch.get_num_threads() == threads     # once to warm up


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_decoding_step_is_the_same_model(batch):
    "Few rows without gradients take another path than training does."
    cfg = ModelConfig(vocab_size=63, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=12)     # an odd vocabulary has no halves
    model, tokens = random_model(cfg, 0).eval(), torch.randint(63, (batch, 1))
    with torch.no_grad(): quick = model(tokens)
    torch.testing.assert_close(quick, model(tokens), atol=1e-5, rtol=1e-5)
