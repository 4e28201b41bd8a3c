"""Eq. 3 and Table 2: the solver against reference values and against a closed form that shares no code with it."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from mone.capacity import (
    effective_capacity,
    greedy_allocation,
    one_hot_allocation,
    proportionate_allocation,
    relative_widths,
    resolve_capacity,
    solve_capacity_distribution,
    tokens_per_expert,
    uniform_allocation,
)


def closed_form(e_c, num_experts, delta=2.0, beta=10.0):
    """Stationary point of Eq. 3's Lagrangian, c_i ∝ exp(w_i / beta + mu d_i / D), with mu fixed by e_c."""
    widths = np.array([1 / 2 ** (num_experts - i) for i in range(1, num_experts + 1)])
    weights = np.array([1 / delta ** (i - 1) for i in range(1, num_experts + 1)])

    def shares(mu):
        exponents = weights / beta + mu * widths
        values = np.exp(exponents - exponents.max())
        return values / values.sum()

    return shares(brentq(lambda mu: shares(mu) @ widths - e_c, -1e5, 1e5, xtol=1e-12, rtol=1e-14))


@st.composite
def experts_and_capacity(draw):
    """E and an e_c that stays 0.001 away from both ends of E's range."""
    num_experts = draw(st.integers(2, 6))
    return num_experts, draw(st.floats(max(0.126, 2.0 ** (1 - num_experts) + 1e-3), 0.999))


@pytest.mark.parametrize(
    ("e_c", "expected"),
    [
        (0.2, (0.6054, 0.3048, 0.0833, 0.0065)),
        (0.3, (0.4204, 0.3153, 0.1912, 0.0730)),
        (0.4, (0.3136, 0.2777, 0.2347, 0.1740)),
        (0.5, (0.2326, 0.2312, 0.2462, 0.2900)),
        (0.6, (0.1658, 0.1821, 0.2367, 0.4154)),
    ],
)
def test_solver_matches_the_table_of_reference_values(e_c, expected):
    assert solve_capacity_distribution(e_c) == pytest.approx(expected, abs=1e-3)


@given(experts_and_capacity())
def test_solver_matches_closed_form(case):
    num_experts, e_c = case
    shares = solve_capacity_distribution(e_c, num_experts)
    assert shares == pytest.approx(closed_form(e_c, num_experts), abs=1e-6)


@given(experts_and_capacity(), st.floats(1.1, 6.0), st.floats(0.5, 100.0))
def test_solver_matches_closed_form_at_other_delta_and_beta(case, delta, beta):
    """delta and beta reach the objective; a solver that ignored them would pass at the defaults only."""
    num_experts, e_c = case
    shares = solve_capacity_distribution(e_c, num_experts, delta=delta, beta=beta)
    assert shares == pytest.approx(closed_form(e_c, num_experts, delta, beta), abs=1e-6)


@given(experts_and_capacity())
def test_solution_satisfies_the_constraints(case):
    num_experts, e_c = case
    shares = solve_capacity_distribution(e_c, num_experts)
    assert len(shares) == num_experts
    assert all(type(share) is float and 0.0 <= share <= 1.0 for share in shares)
    assert math.fsum(shares) == pytest.approx(1.0, abs=1e-9)
    assert sum(c / 2 ** (num_experts - 1 - i) for i, c in enumerate(shares)) == pytest.approx(e_c, abs=1e-9)


@pytest.mark.parametrize("e_c", [0.125 + 1e-9, 0.125 + 1e-6, 0.1251, 0.9999, 1 - 1e-6, 1 - 1e-9])
def test_solver_is_close_to_the_end_points_near_them(e_c):
    """SLSQP fails at the end points; the handling of these must not leave a gap or a jump next to them."""
    assert solve_capacity_distribution(e_c) == pytest.approx(closed_form(e_c, 4), abs=1e-5)


@pytest.mark.parametrize(("num_experts", "e_c"), [(5, 0.065517), (6, 0.040325), (7, 0.018219)])
def test_solver_reaches_the_optimum_at_small_capacities_of_many_experts(num_experts, e_c):
    """Allowed capacities of which SLSQP alone stops short (errors of 4e-4 and 3e-3) or fails."""
    expected = closed_form(e_c, num_experts)
    assert solve_capacity_distribution(e_c, num_experts) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_experts", range(1, 7))
def test_end_points_are_exactly_one_hot(num_experts):
    smallest = (1.0,) + (0.0,) * (num_experts - 1)
    assert solve_capacity_distribution(2.0 ** (1 - num_experts), num_experts) == smallest
    assert solve_capacity_distribution(1.0, num_experts) == smallest[::-1]
    assert solve_capacity_distribution(1, num_experts) == smallest[::-1]


@pytest.mark.parametrize("e_c", [0, 0.1249, 1.0001, -0.3, math.nan, math.inf, -math.inf, True, "0.4", None])
def test_solver_rejects_impossible_capacity(e_c):
    with pytest.raises(ValueError, match=r"0\.125") as error:
        solve_capacity_distribution(e_c)
    assert repr(e_c) in str(error.value)


@pytest.mark.parametrize("name, value", [("delta", 1.0), ("delta", 0.5), ("delta", math.nan), ("delta", math.inf)])
def test_solver_rejects_bad_delta(name, value):
    with pytest.raises(ValueError, match=f"delta.*{value!r}"):
        solve_capacity_distribution(0.4, **{name: value})


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf, "10"])
def test_solver_rejects_bad_beta(beta):
    with pytest.raises(ValueError, match="beta"):
        solve_capacity_distribution(0.4, beta=beta)


@pytest.mark.parametrize("function", [relative_widths, uniform_allocation, proportionate_allocation])
@pytest.mark.parametrize("num_experts", [0, -1, 2.5, True, "4", None])
def test_number_of_experts_is_checked(function, num_experts):
    with pytest.raises(ValueError, match="num_experts"):
        function(num_experts)


def test_relative_widths_are_powers_of_two_smallest_first():
    assert relative_widths(4) == (0.125, 0.25, 0.5, 1.0)
    assert relative_widths(1) == (1.0,)


# --- the other allocations of Table 2 -------------------------------------------------------------------------------


def test_uniform_allocation():
    assert uniform_allocation() == (0.25,) * 4
    assert effective_capacity(uniform_allocation()) == pytest.approx(15 / 32)  # 0.469
    assert uniform_allocation(5) == pytest.approx((0.2,) * 5)


def test_proportionate_allocation():
    """Shares inversely proportional to the width: 8 : 4 : 2 : 1."""
    assert proportionate_allocation() == pytest.approx((8 / 15, 4 / 15, 2 / 15, 1 / 15))
    assert effective_capacity(proportionate_allocation()) == pytest.approx(4 / 15)  # 0.267
    assert proportionate_allocation(2) == pytest.approx((2 / 3, 1 / 3))


@given(st.integers(1, 6), st.floats(0.0, 1.0))
def test_greedy_allocation_hits_its_capacity_with_two_experts(num_experts, position):
    smallest = 2.0 ** (1 - num_experts)
    e_c = min(1.0, smallest + position * (1.0 - smallest))
    shares = greedy_allocation(e_c, num_experts)
    assert len(shares) == num_experts
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert sum(shares) == pytest.approx(1.0, abs=1e-12)
    assert effective_capacity(shares) == pytest.approx(e_c, abs=1e-12)
    assert all(share == 0.0 for share in shares[1:-1])


@pytest.mark.parametrize("e_c", [0.1, 1.1, math.nan, True, "0.4"])
def test_greedy_allocation_rejects_impossible_capacity(e_c):
    with pytest.raises(ValueError, match=r"0\.125"):
        greedy_allocation(e_c)


def test_one_hot_allocation():
    assert [one_hot_allocation(i) for i in range(4)] == [tuple(float(i == j) for j in range(4)) for i in range(4)]
    assert [effective_capacity(one_hot_allocation(i)) for i in range(4)] == [0.125, 0.25, 0.5, 1.0]


@pytest.mark.parametrize("expert", [-1, 4, 1.0, True, None])
def test_one_hot_allocation_rejects_unknown_expert(expert):
    with pytest.raises(ValueError, match=r"\[0, 3\]"):
        one_hot_allocation(expert)


# --- the `capacity` argument ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0.125, 0.4, 1.0, 1, np.float32(0.5), np.float64(0.3), Fraction(1, 2)])
def test_a_number_is_an_effective_capacity(capacity):
    assert resolve_capacity(capacity) == solve_capacity_distribution(float(capacity))


def test_delta_and_beta_reach_the_solver():
    expected = closed_form(0.4, 3, delta=3.0, beta=0.7)
    assert resolve_capacity(0.4, num_experts=3, delta=3.0, beta=0.7) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_a_sequence_is_a_distribution(kind):
    assert resolve_capacity(kind([0.1, 0.2, 0.3, 0.4])) == pytest.approx((0.1, 0.2, 0.3, 0.4), abs=1e-12)
    assert resolve_capacity(kind([0, 0, 1, 0])) == (0.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    "allocation",
    [*map(one_hot_allocation, range(4)), uniform_allocation(), proportionate_allocation(), greedy_allocation(0.4)],
)
def test_every_allocation_is_a_capacity(allocation):
    assert resolve_capacity(allocation) == pytest.approx(allocation, abs=1e-12)


def test_shares_that_were_typed_are_normalised():
    assert math.fsum(resolve_capacity([0.3333, 0.3333, 0.3333, 0.0])) == pytest.approx(1.0, abs=1e-12)


def test_shares_may_be_off_by_a_floats_last_bits():
    third = 1 / 3
    assert resolve_capacity((third, third, third + 1e-17, -1e-17)) == pytest.approx((third, third, third, 0.0))
    assert resolve_capacity((1 + 1e-10, 0, 0, 0)) == (1.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("capacity", [torch.tensor(0.4), torch.full((4,), 0.25), np.array(0.4)])
def test_tensors_are_told_how_to_become_numbers(capacity):
    with pytest.raises(ValueError, match=r"neither a finite number .* Pass capacity\.tolist\(\)\."):
        resolve_capacity(capacity)
    assert sum(resolve_capacity(capacity.tolist())) == pytest.approx(1.0)


def test_sums_of_tenths_reach_the_ends():
    """`np.arange(0.2, 1.01, 0.1)` ends a bit above 1."""
    for capacity in np.arange(0.2, 1.01, 0.1):
        resolve_capacity(capacity)
    assert resolve_capacity(np.float64(1.0000000000000002)) == (0, 0, 0, 1)
    assert resolve_capacity(0.125 - 1e-12) == (1, 0, 0, 0)


@pytest.mark.parametrize(
    "capacity",
    [
        0,
        0.0,
        0.05,
        0.1249,
        1.0001,
        1.2,
        -0.4,
        math.nan,
        math.inf,
        -math.inf,
        10**400,
        True,
        False,
        np.True_,
        np.float64("nan"),
        "high",
        "0.4",
        b"0.4",
        0.4j,
        None,
        ...,
        pytest.param(object(), id="object"),
        {},
        {0.25: 1},
        {0.1, 0.2, 0.3, 0.4},
        np.array(0.4),
        torch.tensor(0.4),
        [],
        (),
        [1.0],
        [0.5, 0.5],
        [0.2] * 5,
        [0.2, 0.2, 0.2, 0.3],  # sums to 0.9
        [0.3, 0.3, 0.3, 0.3],
        [0.0] * 4,
        [-0.5, 0.5, 0.5, 0.5],
        [1.5, -0.5, 0.0, 0.0],
        [0.5, 0.5, 0.0, math.nan],
        [math.inf, 0.0, 0.0, 0.0],
        [True, False, False, False],
        ["0.25"] * 4,
        [None] * 4,
        [[0.25] * 4],
    ],
    ids=lambda value: repr(value)[:30],
)
def test_anything_else_is_a_value_error_with_the_value_and_what_is_allowed(capacity):
    with pytest.raises(ValueError) as error:
        resolve_capacity(capacity)
    message = str(error.value)
    assert str(capacity) in message or repr(capacity) in message
    assert "[0.125, 1]" in message
    assert "4 shares" in message


def test_the_allowed_range_follows_the_number_of_experts():
    with pytest.raises(ValueError, match=r"0\.3.*\[0\.5, 1\].*2 shares"):
        resolve_capacity(0.3, num_experts=2)
    assert resolve_capacity(0.3, num_experts=3) == pytest.approx(closed_form(0.3, 3), abs=1e-6)


@given(experts_and_capacity(), st.integers(0, 2000))
def test_tokens_per_expert_of_a_solved_capacity(case, num_tokens):
    num_experts, e_c = case
    shares = solve_capacity_distribution(e_c, num_experts)
    counts = tokens_per_expert(shares, num_tokens)
    assert sum(counts) == num_tokens
    assert all(type(count) is int and count >= 0 for count in counts)
    # All but the smallest expert get floor(c_j N); at most one token each is left over for the smallest.
    assert all(share * num_tokens - 1 < count for share, count in zip(shares[1:], counts[1:], strict=True))
    assert all(count <= share * num_tokens + 1e-6 for share, count in zip(shares[1:], counts[1:], strict=True))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(sum), st.integers(1, 40))
def test_tokens_per_expert_is_exact_for_shares_that_divide_the_tokens(parts, factor):
    """k / n * n must give back k: a floor without tolerance loses a token to the last bit of a float."""
    shares = [part / sum(parts) for part in parts]
    assert tokens_per_expert(shares, factor * sum(parts)) == tuple(factor * part for part in parts)


@pytest.mark.parametrize(
    ("shares", "num_tokens", "expected"),
    [
        ((0.25, 0.25, 0.25, 0.25), 196, (49, 49, 49, 49)),
        ((0.25, 0.25, 0.25, 0.25), 7, (4, 1, 1, 1)),
        ((0.25, 0.25, 0.25, 0.25), 1, (1, 0, 0, 0)),
        ((0.7, 0.0, 0.0, 0.3), 10, (7, 0, 0, 3)),
        ((0.0, 0.0, 0.0, 1.0), 1, (0, 0, 0, 1)),
        ((0.4, 0.6), 0, (0, 0)),
    ],
)
def test_tokens_per_expert_by_hand(shares, num_tokens, expected):
    assert tokens_per_expert(shares, num_tokens) == expected
