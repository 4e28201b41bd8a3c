# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Pixels as bytes and what becomes of them, against what processors make."""

import numpy as np
import pytest
import torch
from pictures import picture
from transformers import EfficientNetImageProcessor, MobileViTImageProcessor, ViTImageProcessor

from mone.data import make_image_transforms
from mone.pixels import bytes_to_pixels


@pytest.mark.parametrize(
    "options",
    [{}, {"do_normalize": False}, {"image_mean": [0.1, 0.2, 0.3], "rescale_factor": 1 / 127.5}, {"do_rescale": False}],
)
def test_bytes_become_the_same_pixels(options):
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, **options)
    scale, shift = bytes_to_pixels(processor, 3)
    results = []
    for as_bytes in (False, True):
        torch.manual_seed(0)
        transform = make_image_transforms(processor, (16, 24), train=True, randaugment_layers=2, as_bytes=as_bytes)
        results.append(transform(picture(0, size=(48, 40))))
    floats, given = results
    assert given.dtype == torch.uint8 and given.shape == floats.shape == (3, 16, 24)
    torch.testing.assert_close(given * scale + shift, floats, atol=1e-6, rtol=0)
    image = picture(0, size=(32, 32))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) * scale + shift
    torch.testing.assert_close(pixels, processor(image, return_tensors="pt").pixel_values[0], atol=1e-5, rtol=1e-6)
    evaluated = make_image_transforms(processor, (32, 32), train=False, as_bytes=True)(picture(0))
    assert evaluated.dtype == torch.float32, "what an evaluation sees is the processor's own"


@pytest.mark.parametrize("as_bytes", [False, True])
def test_processors_that_do_more_to_pixels_are_refused(as_bytes):
    size = {"height": 16, "width": 16}
    for processor, message in (
        (MobileViTImageProcessor(), "MobileViTImageProcessor has do_flip_channel_order=True"),
        (EfficientNetImageProcessor(size=size, rescale_offset=True), "EfficientNetImageProcessor has rescale_offset="),
    ):
        with pytest.raises(ValueError, match=message):
            make_image_transforms(processor, (16, 16), train=True, as_bytes=as_bytes)
