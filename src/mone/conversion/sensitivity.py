# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""What the layers of the dense model read, and how much its prediction depends on it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from ..modeling_mone import MoNEForImageClassification, MoNEModel


# Images at once: the activations of all layers are kept, as in a training step.
BATCH_SIZE = 8


class Reading(NamedTuple):
    """The patch tokens (N, B, D) at the norm before an attention or an MLP."""

    norm: nn.LayerNorm
    tokens: torch.Tensor
    """What enters the norm."""
    normed: torch.Tensor
    """What it passes on."""
    gradient: torch.Tensor
    """Of the prediction with respect to `normed`."""


def read_layers(model: MoNEForImageClassification | MoNEModel, pixel_values: torch.Tensor) -> Iterator[list[Reading]]:
    """For some images at a time, two readings of each layer at capacity 1.0: of its attention and of its MLP.

    The prediction is an image's largest logit or, where the classifier is missing or all zeros, half the squared
    length of its pooled output.

    Args:
        pixel_values: (B, C, height, width).

    Raises:
        TypeError: no floating tensor.
        ValueError: no images, or values that are not finite.
    """
    if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
        kind = pixel_values.dtype if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
        raise TypeError(f"pixel_values must be a floating tensor, as an image processor makes it, got {kind}.")
    if len(pixel_values) == 0 or not pixel_values.isfinite().all():
        raise ValueError(
            f"pixel_values of shape {tuple(pixel_values.shape)} must be at least one image of finite values."
        )
    norms = [norm for layer in model.base_model.layers for norm in (layer.layernorm_before, layer.layernorm_after)]
    prefix = model.config.num_prefix_tokens
    modes = [(module, module.training) for module in model.modules()]
    classifier = getattr(model, "classifier", None)
    if not isinstance(classifier, nn.Linear) or not classifier.weight.any():
        classifier = None
    for images in logging.tqdm(pixel_values.split(BATCH_SIZE), desc="Reading layers"):
        entered, left = [], []

        def keep(norm, args, output, entered=entered, left=left):
            entered.append(args[0])
            left.append(output)

        hooks = [norm.register_forward_hook(keep) for norm in norms]
        try:
            with torch.enable_grad():
                # For gradients also where all weights are frozen.
                images = images.to(model.device).detach().requires_grad_()
                pooled = model.eval().base_model(images, capacity=1.0, return_dict=True).pooler_output
                prediction = pooled.square() / 2 if classifier is None else classifier(pooled).amax(dim=-1)
                gradients = torch.autograd.grad(prediction.sum(), left)
        finally:
            for module, mode in modes:
                module.training = mode
            for hook in hooks:
                hook.remove()
        yield [
            Reading(norm, *(x.detach()[:, prefix:].transpose(0, 1) for x in reading))
            for norm, *reading in zip(norms, entered, left, gradients, strict=True)
        ]
