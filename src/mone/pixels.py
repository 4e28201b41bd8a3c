# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Pixels on their way to a model: those of more than 8 bits, and bytes, a quarter of what floats take to hand over."""

import torch


def check_bit_depth(mode: str, name: str) -> None:
    """Raise ValueError for a mode of Pillow's with more than 8 bits a channel, which it would cut to 0 and 255.

    Args:
        mode: of an image.
        name: of the image, for the message.
    """
    if mode.startswith(("I", "F")):
        raise ValueError(f"{name} has mode {mode!r}, grey levels of more than 8 bits: scale them to 8.")


def normalisation(processor, num_channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, (channels, 1, 1) each, that a processor normalises rescaled pixels by."""
    if not processor.do_normalize:
        return torch.zeros(num_channels, 1, 1), torch.ones(num_channels, 1, 1)
    mean, std = (torch.tensor(values, dtype=torch.float32) for values in (processor.image_mean, processor.image_std))
    return tuple(values.view(-1, 1, 1).expand(num_channels, 1, 1) for values in (mean, std))


def bytes_to_pixels(processor, num_channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift), (channels, 1, 1) each: `bytes * scale + shift` are the `pixel_values` of an image or video.

    Args:
        processor: of images or videos; its rescaling and normalisation count.
        num_channels: of the images.

    Raises:
        ValueError: a processor that does more to pixels than this.
    """
    further = [
        name for name in ("offset", "rescale_offset", "do_flip_channel_order") if getattr(processor, name, False)
    ]
    if further or not hasattr(processor, "do_normalize"):
        what = f"has {further[0]}=True" if further else "does not say how it normalises"
        raise ValueError(
            f"{type(processor).__name__} {what}: bytes cannot be made its pixels. Hand over its pixel_values instead."
        )
    mean, std = normalisation(processor, num_channels)
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    return factor / std, -mean / std
