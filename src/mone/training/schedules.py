# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Which capacities a training step runs at, and how many steps a budget of compute pays for. Pure functions."""

import math
import numbers
import random
from collections.abc import Callable
from dataclasses import dataclass

from ..capacity import PAPER_GRID, one_hot_allocation


CAPACITY_SCHEDULES = ("fixed", "uniform", "anneal", "joint")

# Capacities between two others come in such steps: for each, Eq. 3 is solved and the layers are compiled once.
RANGE_STEP = 0.01
ANNEAL_STEP = 0.05

Capacity = float | tuple[float, ...]


@dataclass(frozen=True)
class CapacitySchedule:
    """The capacities of each optimiser step.

    A pure function of the step, so that every rank, every micro-batch of a step and a resumed run agree without
    communication, and the global random generators are left alone.

    Args:
        name: "fixed": `capacity` at every step. "uniform": drawn from `grid` at every step (paper, section 5).
            "anneal": from the dense model at the first step linearly to `capacity` at step `anneal_steps`, in steps
            of 0.05. "joint": every nested width at every step, the full model first; their losses are summed (MatViT).
        capacity: of the fixed schedule, and the end of annealing (a number).
        grid: capacities to draw from.
        anneal_steps: optimiser steps until annealing has reached `capacity`.
        num_experts: E, the number of nested widths.
        dense_first: run the dense model at every step before the others, which it teaches.
        seed: of the draws.

    Raises:
        ValueError: for an unknown name, or annealing to a capacity that is not a number.
    """

    name: str = "fixed"
    capacity: Capacity = 1.0
    grid: tuple[float, ...] = PAPER_GRID
    anneal_steps: int = 0
    num_experts: int = 4
    dense_first: bool = False
    seed: int = 42

    def __post_init__(self):
        if self.name not in CAPACITY_SCHEDULES:
            raise ValueError(f"capacity_schedule={self.name!r} must be one of {CAPACITY_SCHEDULES}.")
        if self.name == "anneal" and not isinstance(self.capacity, (int, float)):
            raise ValueError(f"capacity_schedule='anneal' needs a number as capacity to go to, got {self.capacity!r}.")

    def __call__(self, step: int) -> tuple[Capacity, ...]:
        """The capacities of optimiser step `step` (steps already done), in the order in which they run."""
        if self.name == "joint":
            return tuple(one_hot_allocation(expert, self.num_experts) for expert in reversed(range(self.num_experts)))
        if self.name == "uniform":
            capacity = random.Random(f"{self.seed}-{step}").choice(self.grid)
        elif self.name == "anneal" and step < self.anneal_steps:
            exact = 1.0 - (1.0 - self.capacity) * step / self.anneal_steps
            capacity = max(self.capacity, round(math.ceil(exact / ANNEAL_STEP - 1e-6) * ANNEAL_STEP, 2))
        else:
            capacity = self.capacity
        return (1.0, capacity) if self.dense_first and not is_dense(capacity) else (capacity,)


def is_dense(capacity: Capacity) -> bool:
    """Whether a capacity stands for the dense model."""
    return (capacity if isinstance(capacity, numbers.Real) else capacity[-1]) == 1


def capacity_range(low: float, high: float) -> tuple[float, ...]:
    """The grid of capacities from `low` to `high`, 0.01 apart and with both ends.

    Raises:
        ValueError: unless low < high.
    """
    if not low < high:
        raise ValueError(f"capacity_range={[low, high]} must be two capacities, the smaller one first.")
    count = math.ceil((high - low) / RANGE_STEP - 1e-6)
    return (*(round(low + i * RANGE_STEP, 6) for i in range(count)), high)


def steps_for_budget(macs_of_step: Callable[[int], float], budget: float) -> tuple[int, float]:
    """How many steps come closest to spending `budget` multiply-accumulates, at least one, and what they spend."""
    steps, spent = 1, macs_of_step(0)
    while True:
        macs = macs_of_step(steps)
        if spent + macs / 2 > budget:
            return steps, spent
        steps, spent = steps + 1, spent + macs
