# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Augmentation that images and videos share."""

import pytest
from pictures import picture
from transformers import ViTImageProcessor

from mone.data import make_image_transforms
from mone.data.augmentation import randaugment


def test_randaugment_on_the_published_scale():
    """At 10 torchvision's operations are at full strength; larger magnitudes stay there."""
    (full,), (more,), (half,) = (randaugment(2, magnitude) for magnitude in (10, 15, 5))
    scale = full._AUGMENTATION_SPACE["Rotate"][0]
    for transform, degrees in ((full, 30), (more, 30), (half, 15)):
        assert transform.num_ops == 2
        assert scale(transform.num_magnitude_bins, 32, 32)[transform.magnitude] == degrees
    assert randaugment(0, 5) == []
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    augment = make_image_transforms(processor, (8, 8), train=True, randaugment_layers=2, randaugment_magnitude=15)
    assert augment(picture(0)).shape == (3, 8, 8)
    for layers, magnitude in ((-1, 5), (2, 31), (2, -1)):
        with pytest.raises(ValueError, match=f"randaugment_layers={layers} .*randaugment_magnitude={magnitude}"):
            make_image_transforms(
                processor, (8, 8), train=True, randaugment_layers=layers, randaugment_magnitude=magnitude
            )
