"""The head's loss, the whole model's losses, and what the model promises to everybody who uses it."""
import ast

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from nanomoe.attention import KVCache
from nanomoe.config import ModelConfig, preset
from nanomoe.files import UserError
from nanomoe.model import IGNORE, Block, LossBreakdown, NanoMoE, chunked_cross_entropy
from nanomoe.tokenizer import EOS, PAD
from threads import one_thread     # a fixture, at work in every test of this file

SMALL = dict(vocab_size=40, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=12, max_seq_len=24)


def random_model(seed=0, **changes):
    "A small model in which every weight matters: a new one has zeros in its writing matrices."
    torch.manual_seed(seed)
    model = NanoMoE(ModelConfig(**{**SMALL, **changes}))
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.2) + (p.ndim == 1))
    return model


def random_batch(B=3, T=10, V=40): return torch.randint(V, (B, T)), torch.randint(V, (B, T))


# ---- the head's loss ---------------------------------------------------------------------------

@settings(max_examples=40)
@given(N=st.integers(1, 30), V=st.integers(2, 50), D=st.integers(1, 9), chunk=st.integers(1, 40), ignored=st.floats(0, 0.9),
       size=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 999))
def test_chunked_loss_is_cross_entropy(N, V, D, chunk, ignored, size, seed):
    torch.manual_seed(seed)
    h, weight, targets = torch.randn(N, D) * size, torch.randn(V, D), torch.randint(V, (N,))
    targets[torch.rand(N) < ignored] = IGNORE
    targets[torch.randint(N, ())] = V - 1       # at least one counts
    h.requires_grad_(), weight.requires_grad_()
    ours = chunked_cross_entropy(h, weight, targets, chunk)
    plain = F.cross_entropy((h.double() @ weight.double().T), targets, ignore_index=IGNORE)
    torch.testing.assert_close(ours.double(), plain, atol=1e-5 * size, rtol=1e-5)
    for got, want in zip(torch.autograd.grad(3 * ours, (h, weight)), torch.autograd.grad(3 * plain, (h, weight))):
        torch.testing.assert_close(got, want, atol=1e-5 * size, rtol=1e-4)


def test_targets_that_are_all_ignored_give_zero():
    h, weight = torch.randn(7, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = chunked_cross_entropy(h, weight, torch.full((7,), IGNORE), 3)
    loss.backward()
    assert loss.item() == 0 and not h.grad.any() and not weight.grad.any()      # and not NaN


def test_ignored_rows_have_no_say():
    h, weight, targets = torch.randn(8, 4), torch.randn(9, 4), torch.randint(9, (8,))
    targets[2:5] = IGNORE
    other = h.clone()
    other[2:5] = 1e4
    assert torch.equal(chunked_cross_entropy(h, weight, targets), chunked_cross_entropy(other, weight, targets))


def test_huge_scores_do_not_overflow():
    h = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    loss = chunked_cross_entropy(h, torch.eye(2), torch.tensor([0, 0]))
    torch.testing.assert_close(loss, torch.tensor(5e3))
    loss.backward()
    assert h.grad.isfinite().all()


def test_without_gradients_none_is_formed():
    h, weight, targets = torch.randn(5, 4), torch.randn(9, 4, requires_grad=True), torch.randint(9, (5,))
    with torch.no_grad(): loss = chunked_cross_entropy(h, weight, targets)
    with torch.inference_mode(): again = chunked_cross_entropy(h, weight, targets)
    assert not loss.requires_grad and loss == again
    torch.testing.assert_close(loss, F.cross_entropy(h @ weight.T, targets).detach())


def test_the_scores_of_all_rows_never_exist_at_once():
    "The largest tensor that PyTorch allocates is far smaller than N x V."
    from torch.profiler import ProfilerActivity, profile
    N, V, D = 2_048, 1_000, 8
    h, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets = torch.randint(V, (N,))
    largest = {}
    for name, loss in {"chunked": lambda: chunked_cross_entropy(h, weight, targets, 64),
                       "plain": lambda: F.cross_entropy(h @ weight.T, targets)}.items():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen: loss().backward()
        largest[name] = max(event.cpu_memory_usage for event in seen.events())
    assert largest["chunked"] < N * V * 4 / 4 <= largest["plain"]


def test_what_pytorch_says_of_the_operator():
    h, weight = torch.randn(7, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.nanomoe.chunked_cross_entropy.default, (h, weight, torch.randint(9, (7,)), 3, True),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


# ---- the model's losses ------------------------------------------------------------------------

@settings(max_examples=15)
@given(balance=st.sampled_from(["aux", "bias", "none"]), layers=st.integers(1, 3), experts=st.integers(1, 5), data=st.data(), seed=st.integers(0, 999))
def test_the_total_is_the_sum_of_its_parts_and_so_is_its_gradient(balance, layers, experts, data, seed):
    "A router's loss that is computed and never added would show here."
    model = random_model(seed, n_layers=layers, num_experts=experts, top_k=data.draw(st.integers(1, experts)), balance=balance,
                         load_balance_coef=0.7, z_coef=0.3)
    tokens, targets = random_batch()
    tokens = torch.where(tokens == PAD, EOS, tokens)    # padding does not count
    losses, load, entropy = model.loss_and_routing(tokens, targets)
    assert isinstance(losses, LossBreakdown) and all(part.shape == () for part in losses)

    h, routings = model.hidden(tokens)
    ce = F.cross_entropy(model.head(h).flatten(0, 1), targets.flatten())
    z = sum((r.logits.exp().sum(-1).log() ** 2).mean() for r in routings) / layers
    uneven = 0
    for r, count in zip(routings, load):
        share = torch.stack([(r.experts == e).float().mean() for e in range(experts)])
        assert count.tolist() == [(r.experts == e).sum() for e in range(experts)]
        uneven = uneven + experts * (share * r.probs.mean(0)).sum() / layers
    total = ce + 0.3 * z + (0.7 * uneven if balance == "aux" else 0)
    for got, want in zip(losses, (total, ce, uneven, z)): torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)

    wanted = torch.autograd.grad(total, list(model.parameters()))
    for got, want in zip(torch.autograd.grad(losses.total, list(model.parameters())), wanted):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-3)
    expected = torch.stack([torch.distributions.Categorical(r.probs).entropy().mean() for r in routings])
    torch.testing.assert_close(entropy, expected.detach(), atol=1e-5, rtol=1e-4)


def test_loss_is_the_first_part_of_loss_and_routing():
    model, (tokens, targets) = random_model(), random_batch()
    for got, want in zip(model.loss(tokens, targets), model.loss_and_routing(tokens, targets)[0]): assert torch.equal(got, want)


def test_every_parameter_gets_a_gradient_even_when_only_one_expert_works():
    model, (tokens, targets) = random_model(balance="bias"), random_batch()
    for block in model.blocks: block.moe.bias[0] = 9.0
    model.loss(tokens, targets).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_nudge_helps_those_below_the_mean():
    model = random_model(balance="bias", bias_rate=0.25)
    model.nudge_bias(torch.tensor([[9, 3, 6, 6], [0, 0, 0, 24]]))
    assert model.blocks[0].moe.bias.tolist() == [-0.25, 0.25, 0, 0]
    assert model.blocks[1].moe.bias.tolist() == [0.25, 0.25, 0.25, -0.25]


def test_nudging_evens_out_the_load():
    model, (tokens, targets) = random_model(balance="bias", bias_rate=0.005), random_batch(8, 24)
    spread = []
    with torch.no_grad():
        for _ in range(100):
            load = model.loss_and_routing(tokens, targets)[1]
            spread.append(load.float().std(-1).mean().item())
            model.nudge_bias(load)
    assert sum(spread[-5:]) / 5 < spread[0] / 3


@pytest.mark.parametrize("balance", ["aux", "none"])
def test_without_a_bias_the_nudge_does_nothing(balance):
    model = random_model(balance=balance)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.nudge_bias(torch.tensor([[1, 2, 3, 4]] * 2))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


# ---- what the model promises -------------------------------------------------------------------

@settings(max_examples=20)
@given(heads=st.sampled_from([(1, 1), (4, 2), (4, 1), (4, 4)]), shared=st.integers(0, 2), data=st.data(), seed=st.integers(0, 999))
def test_a_later_token_never_changes_earlier_scores(heads, shared, data, seed):
    model = random_model(seed, n_heads=heads[0], n_kv_heads=heads[1], num_shared_experts=shared)
    tokens, _ = random_batch(2, 12)
    t = data.draw(st.integers(0, 11))
    changed = tokens.clone()
    changed[:, t:] = torch.randint(40, changed[:, t:].shape)
    with torch.no_grad(): torch.testing.assert_close(model(tokens)[:, :t], model(changed)[:, :t], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 7], [7, 1, 1, 3], [1, 11]])
@pytest.mark.parametrize("balance", ["aux", "bias"])
def test_cached_is_uncached(sizes, balance):
    "The whole prompt, one token at a time, chunks, and a prompt followed by single tokens."
    model = random_model(3, balance=balance)
    if balance == "bias":
        for block in model.blocks: block.moe.bias.copy_(torch.randn(4) * 0.1)
    tokens, _ = random_batch(3, 12)
    cache = KVCache(model.cfg, batch_size=3, max_len=12)
    with torch.no_grad():
        steps = torch.cat([model(part, cache) for part in tokens.split(sizes, dim=1)], dim=1)
        torch.testing.assert_close(steps, model(tokens), atol=1e-5, rtol=1e-4)
    assert cache.length == 12


def test_a_text_longer_than_the_context_is_one_sentence():
    model = random_model()
    assert model(torch.zeros(1, 24, dtype=torch.int64)).shape == (1, 24, 40)
    with pytest.raises(UserError, match="^25 tokens are more than the model's context of 24; .*[.]$"):
        model(torch.zeros(1, 25, dtype=torch.int64))
    cache = KVCache(model.cfg)
    model(torch.zeros(1, 20, dtype=torch.int64), cache)
    with pytest.raises(UserError, match="^25 tokens"): model(torch.zeros(1, 5, dtype=torch.int64), cache)
    assert cache.length == 20       # and what was there is still there


@pytest.mark.parametrize("shared", [0, 1])
def test_bfloat16_autocast_is_close(shared):
    model, (tokens, targets) = random_model(num_shared_experts=shared), random_batch()
    exact = model.loss(tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(tokens, targets)
        scores = model(tokens)
    losses.total.backward()
    torch.testing.assert_close(losses.total, exact.total, atol=0.1, rtol=0.03)
    torch.testing.assert_close(scores.float(), model(tokens), atol=0.5, rtol=0.1)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_a_new_model_repeats_what_it_reads():
    "What writes into the stream begins at zero, so each token goes straight to the head; the norms begin at one."
    torch.manual_seed(0)
    model = NanoMoE(ModelConfig(**{**SMALL, "d_model": 64}))
    tokens, _ = random_batch()
    assert torch.equal(model(tokens).argmax(-1), tokens)
    for name, p in model.named_parameters():
        if name.endswith(("out.weight", "down")): assert not p.any(), name
        elif p.ndim == 1: assert (p == 1).all(), name
        else: assert abs(p.std() * p.shape[-1] ** 0.5 - 1) < 0.25, name


def test_a_block_adds_to_the_stream():
    model = random_model()
    block, x = model.blocks[0], torch.randn(2, 5, 16)
    assert isinstance(block, Block)
    for p in (block.attn.out.weight, block.moe.down, block.moe.shared_down): p.data.zero_()
    assert torch.equal(block(x, model.cos[:5], model.sin[:5])[0], x)


@pytest.mark.parametrize("name, total, active", [("full", 11_327_424, 7_788_480)])
def test_parameter_counts(name, total, active):
    model = NanoMoE(preset(name).model)
    assert (model.num_parameters(), model.num_parameters(active=True)) == (total, active)


@given(experts=st.integers(1, 5), shared=st.integers(0, 2), layers=st.integers(1, 3), data=st.data())
def test_active_parameters_are_those_with_a_gradient_for_one_token(experts, shared, layers, data):
    model = random_model(num_experts=experts, top_k=data.draw(st.integers(1, experts)), num_shared_experts=shared, n_layers=layers)
    model(torch.tensor([[5]])).sum().backward()
    asleep = sum(p.grad[e].numel() for name, p in model.named_parameters() if name.endswith((".gate_up", ".down"))
                 for e in range(experts) if not p.grad[e].any())
    assert model.num_parameters(active=True) == model.num_parameters() - asleep


def test_rotary_angles_are_not_saved():
    assert not {"cos", "sin"} & set(random_model().state_dict())


def test_a_tiny_model_learns_a_sentence_by_heart():
    torch.manual_seed(0)
    model = NanoMoE(ModelConfig(**SMALL))
    tokens, _ = random_batch(2, 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(80):
        losses = model.loss(tokens[:, :-1], tokens[:, 1:])
        losses.total.backward()
        optimizer.step(), optimizer.zero_grad()
    assert losses.ce < 0.2


def code_lines(path):
    "Lines of a module that are neither blank nor comment nor part of a docstring."
    text = path.read_text(encoding="utf-8")
    docstrings = {line for node in ast.walk(ast.parse(text)) for part in [getattr(node, "body", None)]
                  if isinstance(part, list) and part and isinstance(part[0], ast.Expr) and isinstance(getattr(part[0].value, "value", None), str)
                  for line in range(part[0].lineno, part[0].end_lineno + 1)}
    return sum(bool(line.strip()) and not line.strip().startswith("#") and number not in docstrings
               for number, line in enumerate(text.splitlines(), 1))


def test_the_model_can_be_read_in_one_sitting(root):
    lines = {name: code_lines(root / "nanomoe" / f"{name}.py") for name in ("config", "attention", "moe", "model")}
    assert sum(lines.values()) < 450, lines
