"""Capacities of training steps."""

import random
from collections import Counter

import pytest

from mone.training import PAPER_GRID, capacity_at_step


def test_paper_grid_is_the_papers():
    assert pytest.approx([0.15 + 0.1 * i for i in range(9)]) == list(PAPER_GRID)


def test_fixed():
    assert {capacity_at_step("fixed", step, capacity=0.4) for step in range(50)} == {0.4}


def test_uniform_draws_all_of_the_grid_evenly():
    counts = Counter(capacity_at_step("uniform", step, capacity=1.0) for step in range(9000))
    assert set(counts) == set(PAPER_GRID)
    assert all(850 < count < 1150 for count in counts.values())


def test_uniform_depends_on_seed_and_step_only():
    draws = [capacity_at_step("uniform", step, capacity=1.0, seed=3) for step in range(100)]
    random.seed(0)  # a rank whose global generator stands elsewhere
    assert [capacity_at_step("uniform", step, capacity=0.2, seed=3) for step in range(100)] == draws
    assert [capacity_at_step("uniform", step, capacity=1.0, seed=4) for step in range(100)] != draws


def test_the_global_generator_is_left_alone():
    state = random.getstate()
    capacity_at_step("uniform", 7, capacity=1.0)
    assert random.getstate() == state


def test_unknown_schedule():
    with pytest.raises(ValueError, match=r"'annealed'.*fixed.*uniform"):
        capacity_at_step("annealed", 0, capacity=1.0)
