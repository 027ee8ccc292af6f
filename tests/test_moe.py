"""Routing, balance and the grouped product, each against a formula written another way."""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from nanomoe.config import ModelConfig
from nanomoe.moe import MoE, expert_load, grouped_swiglu, load_balance_loss, route, z_loss
from threads import one_thread     # a fixture, at work in every test of this file

EXPERTS = st.integers(1, 8).flatmap(lambda E: st.tuples(st.just(E), st.integers(1, E)))    # (E, K), K <= E


def layer(seed=0, **changes):
    "A layer with random weights of unit gain."
    torch.manual_seed(seed)
    moe = MoE(ModelConfig(**{**dict(d_model=12, n_heads=2, n_kv_heads=1, d_ff=10, num_experts=4), **changes}))
    for p in moe.parameters(): torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return moe


def swiglu(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T


def by_definition(moe, x):
    "The layer in float64, one token after another."
    w = {name: p.detach().double() for name, p in moe.named_parameters()}
    out = []
    for token in x.double().flatten(0, -2):
        probs = (token @ w["router.weight"].T).softmax(-1)
        score = probs if moe.bias is None else probs + moe.bias
        chosen = score.argsort(descending=True)[:moe.top_k]
        y = sum(probs[e] / probs[chosen].sum() * swiglu(token, w["gate_up"][e], w["down"][e]) for e in chosen)
        if moe.has_shared: y = y + swiglu(token, w["shared_gate_up"][0], w["shared_down"][0])
        out.append(y)
    return torch.stack(out).view(x.shape)


# ---- routing -----------------------------------------------------------------------------------

@given(EXPERTS, st.integers(1, 9), st.integers(0, 999), st.floats(0.01, 30))
def test_weights_are_a_softmax_over_the_chosen_scores(shape, N, seed, size):
    (E, K), _ = shape, torch.manual_seed(seed)
    logits = torch.randn(N, E) * size
    routing = route(logits, K)
    torch.testing.assert_close(routing.weights, logits.gather(-1, routing.experts).softmax(-1))
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(N))
    assert (routing.weights[:, :-1] >= routing.weights[:, 1:]).all()                    # best first
    assert all(len(set(row)) == K for row in routing.experts.tolist())                  # no expert twice


def test_scores_are_kept_in_float32():
    routing = route(torch.randn(3, 4, dtype=torch.bfloat16), 2)
    assert routing.logits.dtype == routing.probs.dtype == routing.weights.dtype == torch.float32


@given(EXPERTS, st.integers(1, 30), st.integers(0, 999))
def test_load_counts_every_assignment(shape, N, seed):
    (E, K), _ = shape, torch.manual_seed(seed)
    experts = route(torch.randn(N, E), K).experts
    assert expert_load(experts, E).tolist() == [(experts == e).sum().item() for e in range(E)]


@given(EXPERTS, st.integers(0, 999))
def test_the_bias_changes_who_is_chosen_and_not_how_weights_are_made(shape, seed):
    (E, K), _ = shape, torch.manual_seed(seed)
    logits, bias = torch.randn(20, E), torch.randn(E)
    routing = route(logits, K, bias)
    chosen = (logits.softmax(-1) + bias).topk(K).indices
    assert torch.equal(routing.experts.sort().values, chosen.sort().values)
    assert (routing.weights[:, :-1] >= routing.weights[:, 1:]).all()                    # the bias does not say who comes first
    torch.testing.assert_close(routing.weights, logits.gather(-1, routing.experts).softmax(-1))
    torch.testing.assert_close(routing.probs, logits.softmax(-1))


def test_a_large_bias_sends_everybody_to_one_expert():
    logits = torch.randn(50, 4)
    assert (route(logits, 2, torch.tensor([0.0, 0.0, 9.0, 0.0])).experts == 2).any(-1).all()
    assert len(route(logits, 1).experts.unique()) == 4


# ---- the losses --------------------------------------------------------------------------------

@pytest.mark.parametrize("experts", [1, 2, 4, 8, 32])
def test_balance_is_exactly_one_when_routing_is_uniform(experts):
    for top_k in range(1, experts + 1):
        n = torch.arange(experts)
        chosen = (n[:, None] + torch.arange(top_k)) % experts       # every expert is chosen top_k times
        probs = torch.full((experts, experts), 1 / experts)
        assert load_balance_loss(expert_load(chosen, experts), probs).item() == 1.0


@pytest.mark.parametrize("experts, top_k", [(4, 1), (4, 2), (8, 3)])
def test_balance_at_its_worst(experts, top_k):
    logits = torch.full((64, experts), -40.0)
    logits[:, :top_k] = 0.0         # the same top_k experts share every token
    routing = route(logits, top_k)
    torch.testing.assert_close(load_balance_loss(expert_load(routing.experts, experts), routing.probs), torch.tensor(experts / top_k))


@given(EXPERTS, st.integers(2, 40), st.integers(0, 999))
def test_balance_against_transformers(shape, N, seed):
    "Theirs is the sum over the top_k choices, ours the mean."
    theirs = pytest.importorskip("transformers.models.granitemoeshared.modeling_granitemoeshared").load_balancing_loss_func
    (E, K), _ = shape, torch.manual_seed(seed)
    logits = torch.randn(N, E) * 2
    routing = route(logits, K)
    torch.testing.assert_close(K * load_balance_loss(expert_load(routing.experts, E), routing.probs), theirs((logits,), E, K))


def test_the_gradient_of_the_balance_pushes_the_busiest_down():
    logits = torch.tensor([[0.3, 0.0, -0.1]]).repeat(8, 1).requires_grad_()
    routing = route(logits, 1)
    load_balance_loss(expert_load(routing.experts, 3), routing.probs).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 8), st.integers(0, 999))
def test_z_loss_is_its_formula(L, N, E, seed):
    torch.manual_seed(seed)
    logits = torch.randn(L, N, E) * 5
    expected = logits.double().exp().sum(-1).log().pow(2).mean(-1)
    torch.testing.assert_close(z_loss(logits).double(), expected, atol=1e-5, rtol=1e-5)
    assert z_loss(torch.full((2, 4), 200.0)).isfinite()     # the plain formula would overflow


# ---- the product -------------------------------------------------------------------------------

@pytest.mark.parametrize("load", [[5], [2, 0, 3], [0, 4, 0], [0, 0, 6], [1, 1, 1], [0, 0]])
def test_gradcheck(load):
    torch.manual_seed(0)
    shapes = (sum(load), 3), (len(load), 8, 3), (len(load), 3, 4)
    x, gate_up, down = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(lambda *a: grouped_swiglu(*a, torch.tensor(load)), (x, gate_up, down))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_the_product_and_its_gradients_against_autograd(load, D, width, seed):
    torch.manual_seed(seed)
    shapes = (sum(load), D), (len(load), 2 * width, D), (len(load), D, width)
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    ours = grouped_swiglu(*args, torch.tensor(load))
    plain = torch.cat([swiglu(xe, wi, wo) for xe, wi, wo in zip(args[0].split(load), args[1], args[2])])
    torch.testing.assert_close(ours, plain)
    dy = torch.randn_like(ours)
    for got, want in zip(torch.autograd.grad(ours, args, dy), torch.autograd.grad(plain, args, dy)):
        torch.testing.assert_close(got, want)


def test_a_gradient_that_is_not_contiguous():
    "`expand` gives a gradient whose rows share their memory."
    args = [torch.randn(s, requires_grad=True) for s in ((4, 3), (1, 10, 3), (1, 3, 5))]
    for row in (0, 1):
        grads = torch.autograd.grad(grouped_swiglu(*args, torch.tensor([4])).sum(), args)
        plain = torch.autograd.grad(swiglu(args[0], args[1][0], args[2][0]).sum(), args)
        for got, want in zip(grads, plain): torch.testing.assert_close(got, want)


def test_what_pytorch_says_of_the_operator():
    "Schema, fake shapes and autograd registration, as torch.compile needs them."
    args = [torch.randn(s, requires_grad=True) for s in ((5, 3), (2, 8, 3), (2, 3, 4))]
    torch.library.opcheck(torch.ops.nanomoe.grouped_swiglu.default, (*args, torch.tensor([2, 3])),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


# ---- the layer ---------------------------------------------------------------------------------

@settings(max_examples=25)
@given(EXPERTS, st.integers(0, 2), st.sampled_from(["aux", "bias"]), st.integers(0, 999))
def test_the_layer_is_its_definition(shape, shared, balance, seed):
    E, K = shape
    moe = layer(seed, num_experts=E, top_k=K, num_shared_experts=shared, balance=balance)
    if balance == "bias": moe.bias.copy_(torch.randn(E) * 0.1)
    x = torch.randn(2, 7, 12)
    y, routing = moe(x)
    torch.testing.assert_close(y, by_definition(moe, x).float(), atol=1e-5, rtol=1e-4)
    assert routing.experts.shape == (14, K)


@given(EXPERTS, st.integers(1, 9), st.integers(0, 2), st.sampled_from(["aux", "bias"]), st.integers(0, 999))
def test_few_tokens_without_gradients_meet_the_same_layer(shape, N, shared, balance, seed):
    "Decoding takes a way of its own for up to eight tokens, and slices the experts that were chosen."
    E, K = shape
    moe, x = layer(seed, num_experts=E, top_k=K, num_shared_experts=shared, balance=balance), torch.randn(N, 1, 12)
    with torch.no_grad(): quick, routing = moe(x)
    torch.testing.assert_close(quick, by_definition(moe, x).float(), atol=1e-5, rtol=1e-4)
    assert quick.shape == x.shape and torch.equal(routing.experts, moe(x)[1].experts)


@pytest.mark.parametrize("N", [1, 8])
def test_an_expert_that_nobody_chose_is_not_multiplied(N):
    "Of four experts, the two chosen are a slice with a step: what lies between them may be anything."
    moe, x = layer(balance="bias"), torch.randn(N, 1, 12)
    moe.bias.copy_(torch.tensor([9.0, 0.0, 0.0, 9.0]))
    with torch.no_grad():
        expected = moe(x)[0]
        for p in (moe.gate_up, moe.down): p[1:3] = torch.nan
        assert torch.equal(moe(x)[0], expected)


def test_few_tokens_in_bfloat16():
    moe, x = layer(), torch.randn(2, 1, 12)
    with torch.no_grad():
        exact = moe(x)[0]
        with torch.autocast("cpu", torch.bfloat16): torch.testing.assert_close(moe(x)[0].float(), exact, atol=0.1, rtol=0.05)
        y = moe.to(torch.bfloat16)(x.to(torch.bfloat16))[0]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, atol=0.2, rtol=0.1)


@pytest.mark.parametrize("shared", [0, 1])
def test_experts_without_tokens_have_a_gradient_of_zero(shared):
    moe = layer(num_shared_experts=shared, balance="bias", top_k=1)
    moe.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
    y, _ = moe(torch.randn(1, 6, 12))
    y.sum().backward()
    assert all(p.grad is not None for p in moe.parameters())
    for e in (0, 2, 3): assert not moe.gate_up.grad[e].any() and not moe.down.grad[e].any()
    assert moe.gate_up.grad[1].any()


def test_the_router_learns_through_the_weights():
    "With two choices the answer depends on the router smoothly; the derivative is that of a finite difference."
    moe = layer().double()
    x, direction = torch.randn(1, 9, 12, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64)
    moe(x)[0].pow(2).sum().backward()
    slope = (moe.router.weight.grad * direction).sum()
    values = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):      # route works in float32, so the step is not a tiny one
            moe.router.weight += step * direction
            values.append(moe(x)[0].pow(2).sum())
    torch.testing.assert_close((values[0] - values[1]) / 2e-3, slope, atol=1e-2, rtol=1e-2)


def test_tokens_do_not_see_each_other():
    moe, x = layer(), torch.randn(2, 5, 12)
    other = x.clone()
    other[1, 3] += 1
    same = torch.ones(2, 5, dtype=torch.bool)
    same[1, 3] = False
    torch.testing.assert_close(moe(x)[0][same], moe(other)[0][same])
    assert not torch.allclose(moe(x)[0][1, 3], moe(other)[0][1, 3])


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_autocast_is_close_and_routes_in_float32(shared):
    moe, x = layer(num_shared_experts=shared, num_experts=8), torch.randn(4, 64, 12)
    y, exact = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        low, routing = moe(x)
        low.float().sum().backward()
    assert torch.equal(routing.experts, exact.experts)
    torch.testing.assert_close(routing.logits, exact.logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(low.float(), y, atol=0.1, rtol=0.05)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in moe.parameters())


def test_a_layer_in_bfloat16_altogether():
    moe, x = layer(), torch.randn(2, 8, 12)
    y = moe.to(torch.bfloat16)(x.to(torch.bfloat16))[0]
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


@pytest.mark.parametrize("balance, has_bias", [("aux", False), ("none", False), ("bias", True)])
def test_only_the_bias_method_has_a_bias(balance, has_bias):
    moe = layer(balance=balance)
    assert ("bias" in moe.state_dict()) == has_bias     # it is saved with the weights
    assert "bias" not in dict(moe.named_parameters())   # and no optimiser touches it
