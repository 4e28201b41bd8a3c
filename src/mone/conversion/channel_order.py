# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Put what matters in the residual stream into its first channels, which are all that a nested expert has.

An expert of width d works on the first d channels; in a checkpoint trained without nesting these are any d. But a
pre-norm transformer stays the same when its residual stream x is rotated to Q x, together with the weights that write
it and read it, if Q keeps the mean of the channels: a layer norm then returns Q times what it returned, once its scale
and shift are moved into the projections behind it. SliceGPT (Ashkboos et al., ICLR 2024) rotates language models with
RMS norms to delete channels; here the rotation may not touch the mean, and nothing is deleted.
"""

import logging

import scipy.linalg
import torch
from torch import nn

from ..modeling_mone import MoNEForImageClassification, MoNELayer, MoNEModel, PositionedTokens
from ..nested_linear import NestedIn, NestedOut
from ..routing import Router
from .sensitivity import read_layers


logger = logging.getLogger(__name__)

# Weight of the gradients' moments beside the inputs'. On a fine-tuned DINOv2-S 0.3 was better than 0, 0.1 and 1.
GRADIENT_SHARE = 0.3


@torch.no_grad()
def order_channels(model: MoNEForImageClassification | MoNEModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Rotate the residual stream, in place, so that the first channels hold what the layers read most of.

    The first d channels get the d - 1 leading principal components of the tokens behind the layer norms, all norms
    together, and their share of the mean. At capacity 1.0 the model stays the same, as [`rotate_channels`] says. It is
    meant for a model that was not trained as a MoNE: what small experts have learned is lost.

    Args:
        pixel_values: (B, C, height, width), some dozens of inputs as the model takes them.

    Returns:
        (D, D) the rotation, float64.

    Raises:
        TypeError, ValueError: as [`rotate_channels`]; or inputs that are no tensor of floats, no images, or values
            that are not finite.
    """
    check_rotatable(model)
    rotation = principal_rotation(read_moments(model, pixel_values))
    rotate_channels(model, rotation)
    return rotation


@torch.no_grad()
def rotate_channels(model: MoNEForImageClassification | MoNEModel, rotation: torch.Tensor) -> None:
    """Rotate the residual stream x to `rotation @ x`, in place.

    At capacity 1.0 logits and router logits stay the same, and `hidden_states` up to the rotation. The norms keep no
    scale and shift; so a model without a classifier, which could take those of the last one, loses them:
    `last_hidden_state` is the rotated one before that norm's scale and shift.

    Args:
        rotation: (D, D), orthogonal, with rows that sum to 1. A permutation is one.

    Raises:
        TypeError: a model that is no image model.
        ValueError: another matrix, or a model that has a norm in its embeddings (CLIP).
    """
    check_rotatable(model)
    width = model.config.hidden_size
    rotation = rotation.to(model.device, torch.float64)
    ones, identity = rotation.new_ones(width), torch.eye(width, dtype=rotation.dtype, device=rotation.device)
    if (
        rotation.shape != (width, width)
        or not torch.allclose(rotation @ rotation.T, identity, atol=1e-6)
        or not torch.allclose(rotation @ ones, ones, atol=1e-6)
    ):
        raise ValueError(f"rotation must be an orthogonal {width}x{width} matrix whose rows sum to 1.")

    def write(parameter: nn.Parameter | None, dim: int) -> None:
        """Rotate an axis of D channels, or of several tokens' side by side."""
        if parameter is not None:
            tokens = parameter.double().unflatten(dim, (-1, width)).movedim(dim + 1, -1)
            parameter.copy_((tokens @ rotation.T).movedim(-1, dim + 1).flatten(dim, dim + 1))

    for module in model.modules():
        if isinstance(module, MoNELayer):
            attention = module.attention
            fold_norm(module.layernorm_before, [attention.q_proj, attention.k_proj, attention.v_proj])
            fold_norm(module.layernorm_after, [module.mlp.fc1])
    model.config.qkv_bias = True  # which takes up the shifts
    base = model.base_model
    has_classifier = isinstance(getattr(model, "classifier", None), nn.Linear)
    if isinstance(base.layernorm, nn.LayerNorm):
        if not has_classifier:
            logger.warning(
                "Without a classifier to take them, scale and shift of the last norm are lost: last_hidden_state and "
                "pooler_output are no longer the source's features, but a start for training."
            )
        fold_norm(base.layernorm, [model.classifier] if has_classifier else [])

    for module in model.modules():
        if isinstance(module, (NestedOut, nn.Conv2d)):
            write(module.weight, 0)
            write(module.bias, 0)
        elif isinstance(module, NestedIn):
            write(module.weight, 1)
        elif isinstance(module, Router) and module.router_type != "random":
            write(module.proj.weight, 1)
        elif isinstance(module, PositionedTokens):
            for parameter in (module.cls_token, module.register_tokens, module.position_embeddings):
                write(parameter, 2)
    if has_classifier:
        write(model.classifier.weight, 1)


def check_image_model(model: nn.Module) -> None:
    """Raise TypeError for any other: what is fitted to images is an image model, and a video model made of that."""
    if not isinstance(model, (MoNEForImageClassification, MoNEModel)):
        raise TypeError(f"{type(model).__name__} is no image model: calibrate one, and make the video model of that.")


def check_rotatable(model: nn.Module) -> None:
    """Raise TypeError or ValueError for a model whose residual stream cannot be rotated."""
    check_image_model(model)
    if model.config.embedding_norm:
        raise ValueError(
            "embedding_norm=True: scale and shift of the norm in the embeddings, as CLIP has one, belong to single "
            "channels, so that these cannot be ordered."
        )


def fold_norm(norm: nn.LayerNorm, readers: list[nn.Linear]) -> None:
    """Move scale and shift of a norm into the projections that read it, be it several tokens side by side."""
    scale, shift = norm.weight.double(), norm.bias.double()
    for reader in readers:
        count = reader.in_features // len(scale)
        weight = reader.weight.double()
        constant = weight @ shift.repeat(count)
        if reader.bias is None:
            reader.bias = nn.Parameter(constant.to(reader.weight.dtype))
        else:
            reader.bias.copy_(reader.bias.double() + constant)
        reader.weight.copy_(weight * scale.repeat(count))
    norm.weight.fill_(1.0)
    norm.bias.zero_()


@torch.no_grad()
def read_moments(model: MoNEForImageClassification | MoNEModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """(D, D) second moments of what the dense model's layers read, and of the prediction's gradient there.

    Of patch tokens behind the norms, before scale and shift. Both moments are divided by their trace.
    """
    moments = torch.zeros(2, *2 * (model.config.hidden_size,), dtype=torch.float64, device=model.device)
    for readings in read_layers(model, pixel_values):
        for norm, tokens, _, gradient in readings:
            normed = nn.functional.layer_norm(tokens.double(), norm.normalized_shape, eps=norm.eps)
            for moment, x in zip(moments, (normed, gradient.double() * norm.weight), strict=True):
                moment.add_(x.flatten(0, 1).T @ x.flatten(0, 1))
    inputs, gradients = (moment / moment.trace() for moment in moments)
    return inputs + GRADIENT_SHARE * gradients


def principal_rotation(moments: torch.Tensor) -> torch.Tensor:
    """The rotation that keeps the mean and puts the k leading principal components into the first k + 1 channels.

    Args:
        moments: (D, D) second moments, about 0 and not about the mean: for an expert that lacks a channel, this
            channel's mean is missing like the rest of it.
    """
    basis = torch.from_numpy(scipy.linalg.helmert(len(moments)).T).to(moments)  # (D, D - 1), orthogonal to the ones
    components = basis @ torch.linalg.eigh(basis.T @ moments @ basis).eigenvectors.flip(1)  # eigh's are ascending
    return basis @ components.T + 1 / len(moments)
