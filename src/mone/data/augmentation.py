# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Augmentation that images and videos share."""

from torchvision.transforms import v2


# RandAugment's published scale has its operations at full strength at 10, and goes on from there.
FULL_STRENGTH = 10


def randaugment(layers: int, magnitude: int) -> list[v2.Transform]:
    """torchvision's RandAugment on the scale of the published settings (https://arxiv.org/abs/1909.13719).

    torchvision's operations go as far as the published magnitude 10 (such as a rotation by 30 degrees): a larger one
    is cut to that. They go both ways from no change at magnitude 0, where TensorFlow's have strong contrasts.

    Args:
        layers: number of operations, drawn anew for each image or clip; 0 for none.
        magnitude: in [0, 30].

    Returns:
        A list of one transform of uint8 images, empty for no layers.

    Raises:
        ValueError: `layers` or `magnitude` are not allowed.
    """
    if layers < 0 or not 0 <= magnitude <= 30:
        raise ValueError(
            f"randaugment_layers={layers} must be at least 0 and randaugment_magnitude={magnitude} in [0, 30]."
        )
    if not layers:
        return []
    return [v2.RandAugment(layers, min(magnitude, FULL_STRENGTH), num_magnitude_bins=FULL_STRENGTH + 1)]
