"""Attention, its positions and its cache, against formulas that are written out here in float64."""
import math

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch.nn import functional as F

from nanomoe.attention import Attention, KVCache, RMSNorm, causal_mask, rope_angles, rotate
from nanomoe.config import ModelConfig
from nanomoe.files import UserError
from threads import one_thread     # a fixture, at work in every test of this file


@st.composite
def shapes(draw, max_len=24):
    "A small model's shape, any number of query heads to a key head."
    n_kv_heads, group, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 4)), 2 * draw(st.integers(1, 5))
    heads = n_kv_heads * group
    return ModelConfig(d_model=heads * head_dim, n_heads=heads, n_kv_heads=n_kv_heads, n_layers=draw(st.integers(1, 3)),
                       max_seq_len=max_len, rope_theta=draw(st.sampled_from([100.0, 10_000.0])))


def make(cfg, batch, length, seed=0):
    "A layer with random weights, an input and the angles of every position."
    torch.manual_seed(seed)
    return Attention(cfg), torch.randn(batch, length, cfg.d_model), *rope_angles(cfg)


def turn(x, start, theta):
    "Rotary positions of x (..., T, head_dim) by complex multiplication in float64."
    T, half = x.shape[-2], x.shape[-1] // 2
    rates = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(start, start + T, dtype=torch.float64)[:, None] * rates
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.exp(1j * angles)
    return torch.cat((z.real, z.imag), -1)


def reference(x, qkv, out, cfg):
    "Attention in float64, one head of one sequence at a time, with an explicit softmax."
    q_rows, kv_rows = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    W_q, W_k, W_v = qkv.split((q_rows, kv_rows, kv_rows))
    rows = lambda W, h: W[h * cfg.head_dim:(h + 1) * cfg.head_dim]
    T, answers = x.shape[1], []
    for sequence in x:
        heads = []
        for h in range(cfg.n_heads):
            g = h // (cfg.n_heads // cfg.n_kv_heads)
            q, k = (turn(sequence @ rows(W, i).T, 0, cfg.rope_theta) for W, i in ((W_q, h), (W_k, g)))
            scores = q @ k.T / math.sqrt(cfg.head_dim)
            shares = torch.stack([torch.cat((F.softmax(scores[t, :t + 1], 0), scores.new_zeros(T - t - 1))) for t in range(T)])
            heads.append(shares @ (sequence @ rows(W_v, g).T))
        answers.append(torch.cat(heads, -1) @ out.T)
    return torch.stack(answers)


@settings(max_examples=40)
@given(cfg=shapes(), batch=st.integers(1, 3), length=st.integers(1, 12))
def test_attention_and_its_gradients_against_float64(cfg, batch, length):
    layer, x, cos, sin = make(cfg, batch, length)
    x.requires_grad_()
    y = layer(x, cos[:length], sin[:length])
    exact = [t.detach().double().requires_grad_() for t in (x, layer.qkv.weight, layer.out.weight)]
    y_exact = reference(*exact, cfg)
    torch.testing.assert_close(y.double(), y_exact, atol=1e-5, rtol=1e-4)
    direction = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, layer.qkv.weight, layer.out.weight), direction)
    for got, want in zip(grads, torch.autograd.grad(y_exact, exact, direction.double())):
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-3)


@settings(max_examples=40)
@given(cfg=shapes(), length=st.integers(1, 24))
def test_attention_is_torchs_sdpa(cfg, length):
    "The same from torch's function, with copied key heads and complex positions, in float64."
    layer, x, cos, sin = make(cfg, 2, length)
    group, rows = cfg.n_heads // cfg.n_kv_heads, (x @ layer.qkv.weight.T).double()
    q, k, v = (t.unflatten(-1, (-1, cfg.head_dim)).transpose(1, 2)
               for t in rows.split([n * cfg.head_dim for n in (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)], -1))
    q, k, v = turn(q, 0, cfg.rope_theta), *(t.repeat_interleave(group, 1) for t in (turn(k, 0, cfg.rope_theta), v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2) @ layer.out.weight.double().T
    torch.testing.assert_close(layer(x, cos[:length], sin[:length]).double(), y, atol=1e-5, rtol=1e-4)


@settings(max_examples=40)
@given(cfg=shapes(), start=st.integers(0, 12), length=st.integers(1, 12))
def test_rope_is_complex_multiplication(cfg, start, length):
    x = torch.randn(2, length, cfg.n_heads, cfg.head_dim, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_angles(cfg)
    assert cos.shape == sin.shape == (cfg.max_seq_len, cfg.head_dim)
    got = rotate(x, cos[start:start + length], sin[start:start + length])
    want = turn(x.transpose(1, 2), start, cfg.rope_theta).transpose(1, 2)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)


def test_rope_is_exact_in_float64_and_far_out():
    cfg = ModelConfig(max_seq_len=4096)
    x = torch.randn(1, 4096, 1, cfg.head_dim, dtype=torch.float64)
    rates = 10_000 ** (-torch.arange(12, dtype=torch.float64) / 12)
    angles = (torch.arange(4096)[:, None] * rates).repeat(1, 2)
    want = turn(x[0, :, 0], 0, 10_000.0)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin())[0, :, 0], want, atol=1e-10, rtol=0)
    torch.testing.assert_close(rotate(x, *rope_angles(cfg))[0, :, 0].double(), want, atol=2e-3, rtol=0)


def test_scores_depend_on_distance_alone():
    cfg = ModelConfig()
    cos, sin = rope_angles(cfg)
    q, k = (rotate(torch.randn(1, 1, 1, cfg.head_dim).expand(1, 512, -1, -1), cos, sin)[0, :, 0] for _ in range(2))
    scores = q @ k.T
    torch.testing.assert_close(scores[100:, 100:], scores[:-100, :-100], atol=1e-3, rtol=0)


@settings(max_examples=60)
@given(cfg=shapes(), batch=st.integers(1, 3), sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), spare=st.integers(0, 3))
@example(cfg=ModelConfig(n_layers=2, max_seq_len=24), batch=2, sizes=[24], spare=0)
@example(cfg=ModelConfig(n_layers=2, max_seq_len=24), batch=2, sizes=[1] * 24, spare=0)
@example(cfg=ModelConfig(n_layers=1, max_seq_len=24), batch=2, sizes=[5, 1, 1, 7, 10], spare=0)
@torch.no_grad()
def test_cached_is_uncached(cfg, batch, sizes, spare):
    "Prefill, chunks and single tokens, through several layers that share one cache."
    length = sum(sizes)
    torch.manual_seed(0)
    layers, (cos, sin) = [Attention(cfg) for _ in range(cfg.n_layers)], rope_angles(cfg)
    x = whole = torch.randn(batch, length, cfg.d_model)
    for layer in layers: whole = whole + layer(whole, cos[:length], sin[:length])
    cache, pieces = KVCache(cfg, batch, length + spare), []
    for piece in x.split(sizes, 1):
        places = slice(cache.length, cache.length + piece.shape[1])
        for i, layer in enumerate(layers): piece = piece + layer(piece, cos[places], sin[places], cache, i)
        cache.advance(piece.shape[1])
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-4)
    assert cache.length == length
    assert not cache.keys[..., length:, :].any() and not cache.values[..., length:, :].any()


@settings(max_examples=30)
@given(cfg=shapes(), length=st.integers(2, 12), data=st.data())
@torch.no_grad()
def test_nothing_leaks_from_the_future(cfg, length, data):
    at = data.draw(st.integers(1, length - 1))
    layer, x, cos, sin = make(cfg, 2, length)
    before = layer(x, cos[:length], sin[:length])
    x[:, at:] = 1e3 * torch.randn_like(x[:, at:])
    after = layer(x, cos[:length], sin[:length])
    torch.testing.assert_close(after[:, :at], before[:, :at])
    assert not torch.allclose(after[:, at:], before[:, at:])


@given(queries=st.integers(1, 9), before=st.integers(0, 9))
def test_the_mask_is_the_end_of_the_square_one(queries, before):
    keys = queries + before
    square = torch.tensor([[j <= i for j in range(keys)] for i in range(keys)])
    assert causal_mask(queries, keys).equal(square[before:])


@pytest.mark.parametrize("have, more", [(0, 9), (8, 1), (5, 4), (3, 6)])
def test_a_full_cache_says_so_and_stays_as_it_is(have, more):
    cfg = ModelConfig(n_layers=2, max_seq_len=512)
    layer, x, cos, sin = make(cfg, 2, 9)
    cache = KVCache(cfg, 2, max_len=8)
    with torch.no_grad():
        if have:
            for i in range(2): layer(x[:, :have], cos[:have], sin[:have], cache, i)
            cache.advance(have)
        keys, values = cache.keys.clone(), cache.values.clone()
        with pytest.raises(UserError, match=f"^The KV cache is full: it holds {have} of 8 tokens, and {more} more do not fit; .*[.]$"):
            layer(x[:, :more], cos[:more], sin[:more], cache, 0)
        assert cache.length == have and cache.keys.equal(keys) and cache.values.equal(values)
        rest = 8 - have
        if rest: layer(x[:, :rest], cos[have:8], sin[have:8], cache, 0)     # and what fits still fits


def test_the_cache_takes_the_bytes_it_says():
    cfg = ModelConfig()
    assert KVCache(cfg).max_len == cfg.max_seq_len
    assert KVCache(cfg).nbytes() == 2 * 6 * 2 * 512 * 24 * 4
    half = KVCache(cfg, batch_size=3, max_len=10, dtype=torch.bfloat16)
    assert half.nbytes() == 2 * 6 * 3 * 2 * 10 * 24 * 2
    assert half.keys.dtype == half.values.dtype == torch.bfloat16
    assert KVCache(cfg, device="meta").keys.is_meta


@settings(max_examples=40)
@given(dim=st.integers(1, 40), scale=st.sampled_from([1e-3, 1.0, 1e3]), eps=st.sampled_from([1e-6, 1e-2]))
def test_rmsnorm_and_its_gradients_against_float64(dim, scale, eps):
    torch.manual_seed(0)
    norm = RMSNorm(dim, eps)
    assert norm.weight.eq(1).all() and [name for name, _ in norm.named_parameters()] == ["weight"]
    with torch.no_grad(): norm.weight.normal_()
    x = (scale * torch.randn(3, 5, dim)).requires_grad_()
    exact, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    y, y_exact = norm(x), exact / torch.sqrt((exact ** 2).mean(-1, keepdim=True) + eps) * weight
    torch.testing.assert_close(y.double(), y_exact, atol=1e-5, rtol=1e-4)
    direction = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, norm.weight), direction)
    want = torch.autograd.grad(y_exact, (exact, weight), direction.double())
    torch.testing.assert_close(got[0].double(), want[0], atol=1e-4 / scale, rtol=1e-3)
    torch.testing.assert_close(got[1].double(), want[1], atol=1e-4, rtol=1e-3)


def test_rmsnorm_survives_zeros():
    x = torch.zeros(2, 8, requires_grad=True)
    y = RMSNorm(8)(x)
    y.sum().backward()
    assert y.eq(0).all() and x.grad.isfinite().all()


def test_attention_has_the_parameters_of_its_shape():
    cfg = ModelConfig()
    assert sum(p.numel() for p in Attention(cfg).parameters()) == 192 * (8 + 2 + 2) * 24 + 192 * 192
    assert {name for name, _ in Attention(cfg).named_parameters()} == {"qkv.weight", "out.weight"}


def test_attention_under_autocast():
    "With and without a cache of the model's own dtype."
    layer, x, cos, sin = make(ModelConfig(n_layers=1), 2, 6)
    with torch.no_grad():
        exact = layer(x, cos[:6], sin[:6])
        with torch.autocast("cpu", torch.bfloat16):
            plain, cached = layer(x, cos[:6], sin[:6]), layer(x, cos[:6], sin[:6], KVCache(ModelConfig(n_layers=1), 2))
    for y in (plain, cached):
        torch.testing.assert_close(y.float(), exact, atol=3e-2, rtol=3e-2)
