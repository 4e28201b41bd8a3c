# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Which capacity a training step runs at."""

import random


CAPACITY_SCHEDULES = ("fixed", "uniform")

# Section 5, "Inference time capacity adaptation": sampled uniformly at each training step.
PAPER_GRID = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)


def capacity_at_step(
    schedule: str, step: int, *, capacity: float, seed: int = 42, grid: tuple[float, ...] = PAPER_GRID
) -> float:
    """The effective capacity of optimiser step `step`.

    A pure function of its arguments, so that every rank, every micro-batch of a step and a resumed run agree
    without communication, and the global random generators are left alone.

    Args:
        schedule: "fixed": `capacity` at every step. "uniform": drawn from `grid` at every step.
        step: number of optimiser steps already done.
        capacity: of the fixed schedule.
        seed: of the draws.
        grid: capacities to draw from; the paper's by default.

    Raises:
        ValueError: for another schedule.
    """
    if schedule == "fixed":
        return capacity
    if schedule == "uniform":
        return random.Random(f"{seed}-{step}").choice(grid)
    raise ValueError(f"capacity schedule {schedule!r} must be one of {CAPACITY_SCHEDULES}.")
