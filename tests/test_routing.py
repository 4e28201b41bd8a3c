"""Algorithm 1 against a per-token loop written from the paper, and what the Router module promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mone.routing import Router, argmax_routing, expert_preferred_routing


def naive_epr(probabilities, counts):
    """Algorithm 1 for one image, one token at a time: (N, E) probabilities -> N experts.

    From the largest expert down, take the unassigned token with the largest probability (the first of equals), k_j
    times. All tokens that are left are the smallest expert's.
    """
    rows = probabilities.tolist()
    experts = [None] * len(rows)
    for expert in range(len(counts) - 1, 0, -1):
        for _ in range(counts[expert]):
            best = None
            for token, row in enumerate(rows):
                if experts[token] is None and (best is None or row[expert] > rows[best][expert]):
                    best = token
            experts[best] = expert
    return [0 if expert is None else expert for expert in experts]


def random_counts(rng, num_tokens, num_experts):
    """E non-negative integers that sum to N; some are often 0."""
    cuts = np.sort(rng.integers(0, num_tokens + 1, num_experts - 1))
    return tuple(int(count) for count in np.diff([0, *cuts, num_tokens]))


@st.composite
def routing_cases(draw):
    """(B, N, E) probabilities, with and without ties and zeros, and token counts."""
    num_experts = draw(st.integers(2, 5))
    num_tokens = draw(st.integers(1, 400))
    batch = draw(st.integers(1, 3))
    levels = draw(st.sampled_from([None, 1, 2, 4, 16]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = torch.from_numpy(rng.standard_normal((batch, num_tokens, num_experts)) * 2)
    probabilities = scores.softmax(dim=-1)
    if levels is not None:
        # Few distinct values, 0 among them: most tokens tie, also with what Algorithm 1 nulls out.
        probabilities = (probabilities * levels).floor() / levels
    return probabilities.to(dtype), random_counts(rng, num_tokens, num_experts)


@settings(max_examples=80)
@given(routing_cases())
def test_epr_equals_the_naive_loop(case):
    probabilities, counts = case
    before = probabilities.clone()
    experts = expert_preferred_routing(probabilities, counts)
    assert experts.dtype == torch.int64
    assert experts.tolist() == [naive_epr(image, counts) for image in probabilities]
    assert torch.equal(probabilities, before)  # Algorithm 1 overwrites r; the caller still needs it


@settings(max_examples=60)
@given(routing_cases())
def test_every_expert_gets_exactly_its_count(case):
    probabilities, counts = case
    for image in expert_preferred_routing(probabilities, counts):
        assert tuple(torch.bincount(image, minlength=len(counts)).tolist()) == counts


def test_epr_of_probabilities_that_are_all_zero():
    """With the paper's 0 as the mark of assigned tokens, a later expert would take the same tokens again."""
    experts = expert_preferred_routing(torch.zeros(6, 3), (1, 2, 3))
    assert experts.tolist() == [2, 2, 2, 1, 1, 0]


def test_epr_by_hand():
    """Expert 3 takes token 1 first although token 1 likes expert 2 better: larger experts choose first."""
    probabilities = torch.tensor([[0.5, 0.4, 0.1], [0.0, 0.6, 0.4], [0.2, 0.5, 0.3], [0.1, 0.7, 0.2]])
    assert expert_preferred_routing(probabilities, (2, 1, 1)).tolist() == [0, 2, 0, 1]
    assert expert_preferred_routing(probabilities, (0, 2, 2)).tolist() == [1, 2, 2, 1]
    assert expert_preferred_routing(probabilities, (4, 0, 0)).tolist() == [0, 0, 0, 0]


def test_leading_axes_are_routed_independently():
    """Video routes per frame: (B, T, N, E) must equal B * T separate images."""
    probabilities = torch.rand(2, 3, 20, 4, generator=torch.Generator().manual_seed(0))
    counts = (8, 6, 4, 2)
    experts = expert_preferred_routing(probabilities, counts)
    assert experts.shape == (2, 3, 20)
    for b in range(2):
        for t in range(3):
            assert experts[b, t].tolist() == naive_epr(probabilities[b, t], counts)
    # And no leading axis at all.
    assert torch.equal(expert_preferred_routing(probabilities[1, 2], counts), experts[1, 2])


@settings(max_examples=40)
@given(st.integers(1, 100), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_permuting_the_tokens_permutes_the_assignment(num_tokens, num_experts, seed):
    rng = np.random.default_rng(seed)
    # Each column is a permutation of 0..N-1, so that nothing ties.
    columns = [rng.permutation(num_tokens) for _ in range(num_experts)]
    probabilities = torch.tensor(np.stack(columns, axis=-1), dtype=torch.float32)
    counts = random_counts(rng, num_tokens, num_experts)
    order = torch.from_numpy(rng.permutation(num_tokens))
    experts = expert_preferred_routing(probabilities, counts)
    assert torch.equal(expert_preferred_routing(probabilities[order], counts), experts[order])


def test_epr_takes_probabilities_that_need_gradients():
    probabilities = torch.rand(2, 9, 4, requires_grad=True)
    assert not expert_preferred_routing(probabilities, (3, 3, 2, 1)).requires_grad


@pytest.mark.parametrize("counts", [(5, 5), (5, 5, 0, 0), (4, 4, 1), (5, 6, -1), (11, 0, 0)])
def test_epr_rejects_counts_that_do_not_fit(counts):
    """Also a sum that is short: the left-over tokens would silently go to the smallest expert."""
    with pytest.raises(ValueError) as error:
        expert_preferred_routing(torch.rand(10, 3), counts)
    assert str(counts) in str(error.value)
    assert "10 tokens" in str(error.value)


def test_argmax_routing():
    probabilities = torch.tensor([[0.5, 0.4, 0.1], [0.0, 0.6, 0.4], [0.2, 0.3, 0.5], [0.1, 0.7, 0.2]])
    assert argmax_routing(probabilities).tolist() == [0, 1, 2, 1]
    assert argmax_routing(probabilities.expand(2, 5, 4, 3)).shape == (2, 5, 4)


# --- Router ---------------------------------------------------------------------------------------------------------


def make_router(router_type="learned", alpha=0.5, num_experts=4):
    torch.manual_seed(0)
    router = Router(16, num_experts, router_type)
    if router_type != "random":
        with torch.no_grad():
            router.proj.weight.normal_()
            router.proj.bias.normal_()
            router.alpha.fill_(alpha)
    return router


def make_tokens(batch=3, num_tokens=20):
    return torch.randn(batch, num_tokens, 16, generator=torch.Generator().manual_seed(1))


COUNTS = (9, 6, 3, 2)


@pytest.mark.parametrize("router_type", ["learned", "argmax"])
def test_router_follows_section_4_1(router_type):
    """r = softmax(W_r x + b_r), the assignment from r, and the factor 1 + alpha r_j of the chosen expert j."""
    router, x = make_router(router_type), make_tokens()
    logits, experts, gate = router(x, COUNTS)
    assert logits.shape == (3, 20, 4) and experts.shape == (3, 20) and gate.shape == (3, 20, 1)
    for b in range(3):
        r = torch.softmax(x[b] @ router.proj.weight.T + router.proj.bias, dim=-1)
        torch.testing.assert_close(logits[b].softmax(-1), r, rtol=0, atol=1e-6)
        expected = naive_epr(r, COUNTS) if router_type == "learned" else [row.index(max(row)) for row in r.tolist()]
        assert experts[b].tolist() == expected
        for n, j in enumerate(expected):
            assert gate[b, n, 0].item() == pytest.approx(1 + 0.5 * r[n, j].item(), abs=1e-6)


def test_argmax_router_ignores_the_capacity():
    router, x = make_router("argmax"), make_tokens()
    first, second = router(x, (20, 0, 0, 0)), router(x, (0, 0, 0, 20))
    assert torch.equal(first.experts, second.experts)
    assert first.experts.unique().numel() > 1


def test_learned_router_starts_without_a_gate():
    """alpha starts at 0: the factor is exactly 1, so that a fine-tuned checkpoint starts from what it was."""
    router = Router(16, 4)
    assert torch.equal(router.alpha, torch.zeros_like(router.alpha))
    assert router.alpha.numel() == 1
    assert torch.equal(router(make_tokens(), COUNTS).gate, torch.ones(3, 20, 1))


def test_random_router_has_neither_parameters_nor_gate():
    router = Router(16, 4, "random")
    assert list(router.parameters()) == [] and router.state_dict() == {}
    routing = router(make_tokens(), COUNTS, torch.Generator().manual_seed(0))
    assert routing.gate is None
    router.project_alpha_()  # a model calls it on every router


def test_random_router_is_epr_on_the_scores_of_its_generator():
    router, x = Router(16, 4, "random"), make_tokens()
    first = router(x, COUNTS, torch.Generator().manual_seed(0))
    again = router(x, COUNTS, torch.Generator().manual_seed(0))
    other = router(x, COUNTS, torch.Generator().manual_seed(1))
    assert torch.equal(first.experts, again.experts) and torch.equal(first.logits, again.logits)
    assert not torch.equal(first.experts, other.experts)
    assert first.experts.tolist() == [naive_epr(image, COUNTS) for image in first.logits]
    # Images of a batch draw their own scores, and the tokens' content has no say.
    assert not torch.equal(first.experts[0], first.experts[1])
    assert torch.equal(first.experts, router(-x, COUNTS, torch.Generator().manual_seed(0)).experts)


def test_random_router_with_a_generator_leaves_the_global_one_alone():
    router, x = Router(16, 4, "random"), make_tokens()
    state = torch.get_rng_state()
    router(x, COUNTS, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    first = router(x, COUNTS)
    torch.manual_seed(5)
    assert torch.equal(router(x, COUNTS).experts, first.experts)


def test_random_router_is_uniform_over_tokens():
    """Every position gets expert j with probability c_j; a bias (say, to early tokens) would show at once."""
    router = Router(16, 4, "random")
    experts = router(torch.zeros(4000, 20, 16), COUNTS, torch.Generator().manual_seed(0)).experts
    for expert, count in enumerate(COUNTS):
        frequency = (experts == expert).float().mean(dim=0)
        # 5 standard deviations of a share of 4000 draws.
        assert (frequency - count / 20).abs().max() < 5 * (0.25 / 4000) ** 0.5


@pytest.mark.parametrize("router_type", ["learned", "random", "argmax"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_in_half_precision(router_type, dtype):
    router = make_router(router_type).to(dtype)
    routing = router(make_tokens().to(dtype), COUNTS)
    if router_type != "argmax":
        assert torch.bincount(routing.experts.flatten(), minlength=4).tolist() == [3 * count for count in COUNTS]
    if router_type != "random":
        assert routing.gate.dtype == dtype  # it multiplies the MLP's update
        assert routing.gate.isfinite().all() and (routing.gate > 1).any()


def test_tokens_of_half_precision_are_ranked_by_float32_probabilities():
    """In bfloat16 many of the 196 tokens would share one probability, and the earlier of them would go first."""
    torch.manual_seed(0)
    router, counts = Router(32, 4).to(torch.bfloat16), (49,) * 4
    routing = router(torch.randn(8, 196, 32).bfloat16(), counts)
    assert torch.equal(routing.experts, expert_preferred_routing(routing.logits.float().softmax(-1), counts))


# --- alpha ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-1000.0, -2.5, -1e-4, 0.0, 1e-4, 0.3, 0.999, 1.0, 1.5, 2.0, 10.0, 100.0, 1e4, 1e9])
def test_effective_alpha_is_clamped_and_its_gradient_passes(alpha):
    """Straight-through: the value is in [0, 1) wherever alpha itself has gone, the gradient is that of alpha."""
    router = make_router(alpha=alpha)
    effective = router.effective_alpha()
    assert 0.0 <= effective.item() < 1.0
    assert effective.item() == pytest.approx(min(max(alpha, 0.0), 1.0), abs=1e-5)
    effective.sum().backward()
    assert router.alpha.grad.item() == 1.0


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.5, 1.5])
def test_the_gate_uses_the_effective_alpha(alpha):
    router, x = make_router(alpha=alpha), make_tokens()
    routing = router(x, COUNTS)
    chosen = routing.logits.softmax(-1).gather(-1, routing.experts[..., None])
    torch.testing.assert_close(routing.gate, 1 + min(max(alpha, 0.0), 1.0) * chosen, rtol=0, atol=1e-5)
    routing.gate.sum().backward()
    # d gate / d alpha = r_j, whether or not alpha is clamped.
    torch.testing.assert_close(router.alpha.grad, chosen.sum().reshape(router.alpha.shape), rtol=1e-5, atol=0)


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_alpha_recovers_from_a_negative_value_under_an_optimiser(optimiser):
    """With a plain clamp the gradient is 0 below 0 and alpha stays there for ever."""
    router, x = make_router(alpha=-0.05), make_tokens()
    optimiser = optimiser([router.alpha], lr=0.01, weight_decay=0.0)
    for _ in range(20):
        optimiser.zero_grad()
        (-router(x, COUNTS).gate.mean()).backward()
        optimiser.step()
    assert router.alpha.item() > 0
    assert router.effective_alpha().item() == pytest.approx(router.alpha.item(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [-3.0, -0.01, 0.0, 0.25, 0.99, 1.0, 7.0])
def test_project_alpha(alpha, dtype):
    router = make_router(alpha=alpha).to(dtype)
    before = router.alpha.item()
    router.project_alpha_()
    assert 0.0 <= router.alpha.item() < 1.0
    if 0.0 <= before < 1.0:
        assert router.alpha.item() == before
    else:
        assert router.alpha.item() == pytest.approx(min(max(before, 0.0), 1.0), abs=0.01)
    assert router.alpha.requires_grad and router.alpha.is_leaf


def test_projection_after_each_step_keeps_alpha_from_drifting_away():
    """Without it alpha would need as many steps back as it took below 0."""
    router = make_router(alpha=0.0)
    optimiser = torch.optim.SGD([router.alpha], lr=0.1)
    for sign in (1.0, 1.0, 1.0, 1.0, -1.0):
        optimiser.zero_grad()
        (sign * router.effective_alpha().sum()).backward()
        optimiser.step()
        router.project_alpha_()
    assert router.alpha.item() == pytest.approx(0.1)


def test_router_gets_gradients_from_the_gate_once_alpha_is_positive():
    x = make_tokens()
    for alpha, reaches in ((0.0, False), (0.5, True)):
        router = make_router(alpha=alpha)
        (router(x, COUNTS).gate * torch.linspace(-1, 1, 20)[:, None]).sum().backward()
        assert router.alpha.grad.abs().item() > 0
        assert bool(router.proj.weight.grad.abs().max() > 0) == reaches
        assert bool(router.proj.bias.grad.abs().max() > 0) == reaches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_effective_alpha_of_half_precision_is_below_one(dtype):
    """Where the upper end of its range itself would round to 1."""
    assert make_router(alpha=5.0).to(dtype).effective_alpha() < 1


def test_the_gate_of_double_precision_has_its_precision():
    router = make_router(alpha=0.5).double()
    x = make_tokens().double().requires_grad_()
    # Finite differences of 1e-6 see nothing through float32.
    assert torch.autograd.gradcheck(lambda x: router(x, COUNTS).gate, x)
