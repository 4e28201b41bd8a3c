# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Timing that compares: the variants run in turn in one process, so that a slow minute slows all of them."""

import time
from collections.abc import Callable

import torch


def interleaved_seconds(
    variants: dict[str, Callable[[], object]], *, rounds: int = 10, warmup: int = 2
) -> dict[str, list[float]]:
    """Time each variant once per round.

    Args:
        variants: name -> a call without arguments.
        rounds: timed calls of each variant.
        warmup: rounds before, whose times are dropped.

    Returns:
        Name -> seconds of the timed calls, in the order they ran. Compare medians.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(warmup + rounds):
        for name, call in variants.items():
            _wait_for_device()
            start = time.perf_counter()
            call()
            _wait_for_device()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[warmup:] for name, times in seconds.items()}


def _wait_for_device() -> None:
    """Accelerators run behind Python; without one there is nothing to wait for."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
