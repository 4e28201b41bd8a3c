# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Labels as probabilities: smoothing, and mixup of examples."""

import random

import torch

from ..data import IGNORED


def soft_labels(labels: torch.Tensor, num_labels: int, smoothing: float, dtype: torch.dtype) -> torch.Tensor:
    """(batch,) classes or (batch, num_labels) probabilities -> (batch, num_labels) probabilities.

    Args:
        smoothing: share of an example's weight that is spread evenly over all classes.

    An example that does not count (class -100) has no share in any class.
    """
    counts = 1
    if labels.dim() == 1:
        counts = (labels != IGNORED).unsqueeze(1)
        labels = torch.nn.functional.one_hot(labels.clamp_min(0), num_labels).to(dtype)
    return (labels * (1 - smoothing) + smoothing / num_labels) * counts


def mixup(
    pixel_values: torch.Tensor, labels: torch.Tensor, alpha: float, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each example (batch, ...) and its probabilities (batch, num_labels), mixed with the one before it.

    mixup (Zhang et al., ICLR 2018): one share for the batch, of a beta distribution with both parameters `alpha`.
    """
    share = rng.betavariate(alpha, alpha)
    return tuple(torch.lerp(x, x.roll(1, 0), 1 - share) for x in (pixel_values, labels))
