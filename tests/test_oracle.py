"""The whole model against transformers' GraniteMoeShared: logits, loss and every gradient, on random shapes and weights."""
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanomoe.attention import KVCache
from nanomoe.config import ModelConfig
from nanomoe.model import NanoMoE

transformers = pytest.importorskip("transformers")


def reference(cfg: ModelConfig, model: NanoMoE):
    "The same model built from transformers' classes, with the same weights."
    config = transformers.GraniteMoeSharedConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.d_ff, num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads, num_local_experts=cfg.num_experts,
        num_experts_per_tok=cfg.top_k, shared_intermediate_size=cfg.num_shared_experts * cfg.d_ff,
        max_position_embeddings=cfg.max_seq_len, rms_norm_eps=cfg.norm_eps, attention_multiplier=cfg.head_dim ** -0.5,
        embedding_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0, tie_word_embeddings=True)
    config._experts_implementation = "eager"
    theirs = transformers.GraniteMoeSharedForCausalLM(config).eval()
    with torch.no_grad():
        for ours, p in pairs(cfg, model, theirs): p.copy_(ours)
    return theirs


def pairs(cfg, model, theirs, what=lambda p: p):
    "Ours beside theirs, weight by weight; `what` picks the weight or its gradient."
    yield what(model.embed.weight), what(theirs.model.embed_tokens.weight)
    yield what(model.norm.weight), what(theirs.model.norm.weight)
    sizes = [heads * cfg.head_dim for heads in (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)]
    for block, layer in zip(model.blocks, theirs.model.layers):
        attn = layer.self_attn
        yield from zip(what(block.attn.qkv.weight).split(sizes), (what(p.weight) for p in (attn.q_proj, attn.k_proj, attn.v_proj)))
        yield what(block.attn.out.weight), what(attn.o_proj.weight)
        yield what(block.attn_norm.weight), what(layer.input_layernorm.weight)
        yield what(block.moe_norm.weight), what(layer.post_attention_layernorm.weight)
        moe = layer.block_sparse_moe
        yield what(block.moe.router.weight), what(moe.router.weight)
        yield what(block.moe.gate_up), what(moe.experts.gate_up_proj)
        yield what(block.moe.down), what(moe.experts.down_proj)
        if cfg.num_shared_experts:
            yield what(block.moe.shared_gate_up)[0], what(layer.shared_mlp.input_linear.weight)
            yield what(block.moe.shared_down)[0], what(layer.shared_mlp.output_linear.weight)


@st.composite
def shapes(draw):
    kv, group, experts = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 6))
    return ModelConfig(vocab_size=64, d_model=kv * group * draw(st.sampled_from([2, 4, 8])), n_layers=draw(st.integers(1, 3)),
                       n_heads=kv * group, n_kv_heads=kv, d_ff=draw(st.sampled_from([4, 12])), num_experts=experts,
                       top_k=draw(st.integers(1, experts)), num_shared_experts=draw(st.integers(0, 2)), max_seq_len=32,
                       load_balance_coef=0.0, z_coef=0.0)


def random_model(cfg, seed):
    torch.manual_seed(seed)
    model = NanoMoE(cfg)
    with torch.no_grad():   # weights of unit size in and out, so that nothing hides behind small numbers
        for p in model.parameters(): p.copy_(torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.2) + (p.ndim == 1))
    return model


@settings(max_examples=25, deadline=None)
@given(cfg=shapes(), seed=st.integers(0, 2**16))
def test_logits_loss_and_gradients(cfg, seed):
    model = random_model(cfg, seed)
    theirs = reference(cfg, model)
    tokens = torch.randint(cfg.vocab_size, (2, 17))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    ours = model.loss(tokens[:, :-1], tokens[:, 1:].contiguous())
    expected = theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(ours.ce, expected, atol=1e-4, rtol=1e-4)
    ours.total.backward()
    expected.backward()
    for got, want in pairs(cfg, model, theirs, lambda p: p.grad):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, atol=1e-4, rtol=1e-3)


@settings(max_examples=15, deadline=None)
@given(cfg=shapes(), seed=st.integers(0, 2**16), cuts=st.lists(st.integers(1, 19), max_size=4, unique=True))
def test_cached_equals_uncached_in_any_chunks(cfg, seed, cuts):
    model = random_model(cfg, seed).eval()
    tokens = torch.randint(cfg.vocab_size, (3, 20))
    cache, edges = KVCache(cfg, batch_size=3), [0, *sorted(cuts), 20]
    with torch.inference_mode():
        whole = model(tokens)
        parts = [model(tokens[:, a:b], cache) for a, b in zip(edges, edges[1:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_parameter_counts():
    model = NanoMoE(ModelConfig())
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) == 11_327_424
    assert model.num_parameters(active=True) == 7_788_480
