"""Capacities of training steps, and how many steps a budget pays for."""

import random
from collections import Counter

import numpy as np
import pytest

from mone.capacity import PAPER_GRID
from mone.training import CapacitySchedule
from mone.training.schedules import capacity_range, is_dense, steps_for_budget


def test_paper_grid_is_the_papers():
    assert pytest.approx([0.15 + 0.1 * i for i in range(9)]) == list(PAPER_GRID)


def test_fixed():
    schedule = CapacitySchedule("fixed", capacity=0.4)
    assert {schedule(step) for step in range(50)} == {(0.4,)}


def test_uniform_draws_all_of_the_grid_evenly():
    counts = Counter(CapacitySchedule("uniform")(step) for step in range(9000))
    assert set(counts) == {(capacity,) for capacity in PAPER_GRID}
    assert all(850 < count < 1150 for count in counts.values())


def test_uniform_depends_on_seed_and_step_only():
    draws = [CapacitySchedule("uniform", seed=3)(step) for step in range(100)]
    random.seed(0)  # a rank whose global generator stands elsewhere
    assert [CapacitySchedule("uniform", capacity=0.2, seed=3)(step) for step in range(100)] == draws
    assert [CapacitySchedule("uniform", seed=4)(step) for step in range(100)] != draws


def test_the_global_generator_is_left_alone():
    state = random.getstate()
    CapacitySchedule("uniform")(7)
    assert random.getstate() == state


def test_annealing_goes_from_the_dense_model_to_the_capacity_and_stays():
    capacities = [CapacitySchedule("anneal", capacity=0.3, anneal_steps=100)(step)[0] for step in range(120)]
    assert capacities[0] == 1.0
    assert capacities[100:] == [0.3] * 20
    assert capacities == sorted(capacities, reverse=True)
    for step, capacity in enumerate(capacities[:100]):
        line = 1.0 - 0.7 * step / 100
        assert line - 1e-6 <= capacity < line + 0.05
    assert set(capacities) == {round(0.3 + 0.05 * i, 2) for i in range(15)}, "few, as each is solved and compiled"


def test_annealing_ends_where_it_is_told():
    assert {CapacitySchedule("anneal", capacity=0.3, anneal_steps=0)(step) for step in range(3)} == {(0.3,)}
    odd = [CapacitySchedule("anneal", capacity=0.33, anneal_steps=7)(step)[0] for step in range(9)]
    assert min(odd) == odd[7] == 0.33
    with pytest.raises(ValueError, match=r"anneal.*number.*\(0, 0, 1, 0\)"):
        CapacitySchedule("anneal", capacity=(0, 0, 1, 0))


def test_joint_runs_every_nested_width_the_full_model_first():
    assert CapacitySchedule("joint", num_experts=3)(5) == ((0, 0, 1), (0, 1, 0), (1, 0, 0))


def test_the_dense_model_first_where_it_teaches():
    assert CapacitySchedule("fixed", capacity=0.4, dense_first=True)(0) == (1.0, 0.4)
    assert CapacitySchedule("fixed", capacity=1, dense_first=True)(0) == (1,)
    joint = CapacitySchedule("joint", dense_first=True)(0)
    assert len(joint) == 4 and is_dense(joint[0])


def test_is_dense():
    assert is_dense(1) and is_dense(1.0) and is_dense(np.float32(1)) and is_dense((0.0, 0.0, 1.0))
    assert not is_dense(0.999) and not is_dense((0.0, 0.5, 0.5))


def test_a_range_has_both_ends_and_hundredths_between():
    assert capacity_range(0.2, 0.25) == (0.2, 0.21, 0.22, 0.23, 0.24, 0.25)
    assert capacity_range(0.125, 0.142) == (0.125, 0.135, 0.142)
    with pytest.raises(ValueError, match=r"\[0\.5, 0\.2\]"):
        capacity_range(0.5, 0.2)


def test_steps_for_a_budget():
    assert steps_for_budget(lambda step: 2.0, 11.1) == (6, 12.0)
    assert steps_for_budget(lambda step: 2.0, 10.9) == (5, 10.0)
    assert steps_for_budget(lambda step: 2.0, 0.1) == (1, 2.0)
    assert steps_for_budget(lambda step: step + 1.0, 10.0) == (4, 10.0)


def test_unknown_schedule():
    with pytest.raises(ValueError, match=r"'annealed'.*fixed.*uniform.*anneal.*joint"):
        CapacitySchedule("annealed")
