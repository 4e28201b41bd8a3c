# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""How many tokens each nested expert gets: Eq. 3 and Table 2 of "Mixture of Nested Experts" (NeurIPS 2024).

Pure functions on Python floats, without torch. Experts are ordered smallest first, as in the paper: expert i = 1..E
works on the first D / 2**(E-i) features, so its relative width d_i / D is 2**(i-E). A *capacity distribution* c is
the share of tokens of each expert; the *effective capacity* e_c = sum_i c_i d_i / D is the share of the dense
model's projections that is left.
"""

import math
import numbers
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.optimize import minimize


# Shares that a person typed with four digits may miss 1 by half a unit in the last place each.
SUM_TOLERANCE = 5e-4
# Of an effective capacity, beyond its range.
END_TOLERANCE = 1e-9
# Section 5, "Inference time capacity adaptation": sampled uniformly at each training step.
PAPER_GRID = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)


def relative_widths(num_experts: int) -> tuple[float, ...]:
    """d_i / D of every expert, smallest first: `(1/2**(E-1), ..., 1/2, 1)`.

    Raises:
        ValueError: if `num_experts` is not an integer of at least 1.
    """
    if isinstance(num_experts, bool) or not isinstance(num_experts, numbers.Integral) or num_experts < 1:
        raise ValueError(f"num_experts must be an integer of at least 1, got {num_experts!r}.")
    return tuple(2.0 ** (i + 1 - num_experts) for i in range(num_experts))


def effective_capacity(shares: Sequence[float]) -> float:
    """e_c = sum_i c_i d_i / D of a capacity distribution `shares`, smallest expert first (section 4.3)."""
    return sum(share * width for share, width in zip(shares, relative_widths(len(shares)), strict=True))


def solve_capacity_distribution(
    effective_capacity: float, num_experts: int = 4, delta: float = 2.0, beta: float = 10.0
) -> tuple[float, ...]:
    """The capacity distribution of Eq. 3, by SciPy's SLSQP as in the paper.

    Maximises `sum_i c_i / delta**(i-1) - beta * sum_i c_i log c_i` subject to `sum_i c_i = 1` and to the effective
    capacity, which the paper states in its text and leaves out of the printed constraints. As printed, the weight
    `1 / delta**(i-1)` favours the *smallest* expert, although the text says that larger ones are encouraged. This
    solves what is printed; the two readings differ by at most 0.007 in any share at the default `delta` and `beta`.

    Args:
        effective_capacity: e_c in [1 / 2**(E-1), 1]. The end points are the one-hot distributions of the smallest
            and of the full model, and are returned exactly.
        num_experts: E, at least 1.
        delta: weight ratio between experts, greater than 1.
        beta: weight of the entropy, greater than 0. Smaller values are less uniform.

    Returns:
        E shares, smallest expert first, that sum to 1. Cached. Within 1e-6 of the optimum at the default `delta` and
        `beta` for up to six experts; with more, shares at a few small capacities may be off by some 1e-3.

    Raises:
        ValueError: if an argument is out of range.
        RuntimeError: if SLSQP finds none, as happens for `beta` below 1e-5.
    """
    e_c = _check_effective_capacity(effective_capacity, num_experts)
    if not (as_number(delta) or 0) > 1 or not (as_number(beta) or 0) > 0:
        raise ValueError(f"Eq. 3 needs finite delta > 1 and beta > 0, got delta={delta!r} and beta={beta!r}.")
    return _solve(e_c, num_experts, float(delta), float(beta))


@lru_cache(maxsize=4096)
def _solve(e_c: float, num_experts: int, delta: float, beta: float) -> tuple[float, ...]:
    widths = np.array(relative_widths(num_experts))
    # SLSQP fails at the end points, where the feasible set is a single vertex.
    if e_c == 1.0 or num_experts == 1:
        return one_hot_allocation(num_experts - 1, num_experts)
    if e_c == widths[0]:
        return one_hot_allocation(0, num_experts)

    # Divided by beta, so that the curvature, and with it the stopping rule, does not depend on beta.
    weights = delta ** -np.arange(num_experts, dtype=float) / beta
    # In z = log c, where shares that differ by orders of magnitude are equally well scaled. The constraints:
    # sum_i c_i = 1, and sum_i c_i d_i / D relative to e_c.
    constraints = [
        {"type": "eq", "fun": lambda z: np.exp(z).sum() - 1.0, "jac": np.exp},
        {"type": "eq", "fun": lambda z: np.exp(z) @ widths / e_c - 1.0, "jac": lambda z: np.exp(z) * widths / e_c},
    ]
    # A feasible interior start: part of the way from uniform towards the vertex on the other side of e_c.
    uniform = np.full(num_experts, 1.0 / num_experts)
    vertex = np.eye(num_experts)[0 if e_c < uniform @ widths else -1]
    step = (e_c - uniform @ widths) / (vertex @ widths - uniform @ widths)
    result = minimize(
        lambda z: np.exp(z) @ (z - weights),
        np.log((1.0 - step) * uniform + step * vertex),
        jac=lambda z: np.exp(z) * (z - weights + 1.0),
        bounds=[(-50.0, 0.0)] * num_experts,
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    shares = np.exp(result.x)
    # Judged by the constraints: close to an end point SLSQP may report a failed line search at the optimum itself.
    if not (abs(shares.sum() - 1.0) < 1e-6 and abs(shares @ widths - e_c) < 1e-6):
        raise RuntimeError(
            f"SLSQP found no capacity distribution for effective capacity {e_c} with {num_experts} experts, "
            f"delta={delta}, beta={beta}: {result.message}."
        )
    return tuple((shares / shares.sum()).tolist())


def one_hot_allocation(expert: int, num_experts: int = 4) -> tuple[float, ...]:
    """Every token to one expert (0 = smallest): MatViT's nested models, the paper's first baseline."""
    relative_widths(num_experts)
    if isinstance(expert, bool) or not isinstance(expert, numbers.Integral) or not 0 <= expert < num_experts:
        raise ValueError(f"expert must be an integer in [0, {num_experts - 1}], got {expert!r}.")
    return tuple(float(i == expert) for i in range(num_experts))


def uniform_allocation(num_experts: int = 4) -> tuple[float, ...]:
    """The same share for every expert (Table 2, "Uniform"); e_c = 0.469 for four experts."""
    widths = relative_widths(num_experts)
    return (1.0 / len(widths),) * len(widths)


def proportionate_allocation(num_experts: int = 4) -> tuple[float, ...]:
    """Shares inversely proportional to the experts' widths (Table 2, "Proportionate"); e_c = 0.267 for four."""
    inverse = [1.0 / width for width in relative_widths(num_experts)]
    return tuple(value / sum(inverse) for value in inverse)


def greedy_allocation(effective_capacity: float, num_experts: int = 4) -> tuple[float, ...]:
    """As many tokens to the full model as e_c affords, the rest to the smallest expert (Table 2, "Greedy").

    Raises:
        ValueError: if `effective_capacity` is not in [1 / 2**(E-1), 1].
    """
    e_c = _check_effective_capacity(effective_capacity, num_experts)
    if num_experts == 1:
        return (1.0,)
    smallest = relative_widths(num_experts)[0]
    largest = (e_c - smallest) / (1.0 - smallest)
    return (1.0 - largest, *(0.0,) * (num_experts - 2), largest)


def paper_grid(num_experts: int) -> tuple[float, ...]:
    """The capacities of [`PAPER_GRID`] that E experts have: with fewer than four the smallest is larger than 0.15."""
    return tuple(capacity for capacity in PAPER_GRID if capacity >= relative_widths(num_experts)[0]) or (1.0,)


def resolve_capacity(
    capacity: float | Sequence[float], num_experts: int = 4, delta: float = 2.0, beta: float = 10.0
) -> tuple[float, ...]:
    """The capacity distribution that a user's `capacity` argument stands for.

    Args:
        capacity: a number is an effective capacity in [1 / 2**(E-1), 1] (within 1e-9, which a sum of tenths may be
            off) and is solved by Eq. 3. A sequence is E shares in [0, 1] (within 1e-9), smallest expert first, that
            sum to 1 (within 5e-4, then normalised).
        num_experts: E.
        delta, beta: parameters of Eq. 3.

    Returns:
        E shares, smallest expert first, that sum to 1.

    Raises:
        ValueError: for anything else: out of range, NaN, a bool, a string, the wrong length, a wrong sum.
    """
    smallest = relative_widths(num_experts)[0]
    allowed = (
        f"Allowed are an effective capacity in [{smallest:g}, 1], or {num_experts} shares in [0, 1], smallest "
        "expert first, that sum to 1."
    )
    number = as_number(capacity)
    if number is not None:
        if not smallest - END_TOLERANCE <= number <= 1.0 + END_TOLERANCE:
            raise ValueError(f"capacity={capacity!r} is out of range. {allowed}")
        return solve_capacity_distribution(min(max(number, smallest), 1.0), num_experts, delta, beta)
    sequence = isinstance(capacity, Sequence) or (isinstance(capacity, np.ndarray) and capacity.ndim > 0)
    if not sequence or isinstance(capacity, (str, bytes)):
        hint = " Pass capacity.tolist()." if hasattr(capacity, "tolist") else ""  # a tensor's; NumPy's under dynamo
        raise ValueError(f"capacity={capacity!r} is neither a finite number nor a sequence of shares. {allowed}{hint}")
    shares = [as_number(share) for share in capacity]
    if len(shares) != num_experts:
        raise ValueError(f"capacity={capacity!r} has {len(shares)} shares for {num_experts} experts. {allowed}")
    if any(share is None or not -END_TOLERANCE <= share <= 1.0 + END_TOLERANCE for share in shares):
        raise ValueError(f"capacity={capacity!r} holds a share that is not a number in [0, 1]. {allowed}")
    shares = [min(max(share, 0.0), 1.0) for share in shares]
    total = math.fsum(shares)
    if abs(total - 1.0) > SUM_TOLERANCE:
        raise ValueError(f"capacity={capacity!r} sums to {total:g}. {allowed}")
    return tuple(share / total for share in shares)


def as_plain(capacity: object) -> object:
    """A capacity in Python's own numbers, which JSON can hold; they, and what is no capacity, stay as they are."""
    if isinstance(capacity, np.ndarray) and capacity.ndim == 1:
        capacity = list(capacity)
    if isinstance(capacity, (list, tuple)):
        return type(capacity)(map(as_plain, capacity))
    number = as_number(capacity)
    return capacity if number is None or type(capacity) in (int, float) else number


def tokens_per_expert(shares: Sequence[float], num_tokens: int) -> tuple[int, ...]:
    """k_j of Algorithm 1: floor(c_j N) tokens for experts E..2; all that remain go to expert 1.

    Args:
        shares: a capacity distribution, smallest expert first.
        num_tokens: N.

    Returns:
        E counts, smallest expert first, that sum to N.
    """
    # 1e-6: a share such as 0.3 * 10 must not lose a token to the last bit of a float.
    larger = [math.floor(share * num_tokens + 1e-6) for share in shares[1:]]
    return (num_tokens - sum(larger), *larger)


def _check_effective_capacity(value: object, num_experts: int) -> float:
    smallest = relative_widths(num_experts)[0]
    number = as_number(value)
    if number is None or not smallest <= number <= 1.0:
        raise ValueError(
            f"effective capacity must be a number in [{smallest:g}, 1] for {num_experts} experts, got {value!r}."
        )
    return number


def as_number(value: object) -> float | None:
    """`value` as a finite float, or None where it is not a real number (bool and NaN are not)."""
    if not _is_real(value):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond every float
        return None
    return number if math.isfinite(number) else None


def check_number(**named: object) -> None:
    """Raise TypeError, which names it, for what is no real number. Infinity and NaN are some."""
    for name, value in named.items():
        if not _is_real(value):
            raise TypeError(f"{name}={value!r} must be a number.")


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
