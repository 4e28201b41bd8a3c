# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Fit a converted ViT to some images before it is trained: what small experts keep, and which tokens they get."""

import torch
from transformers import PreTrainedModel

from ..capacity import relative_widths
from ..modeling_mone import MoNEForImageClassification, MoNEModel
from .channel_order import check_image_model, order_channels
from .sensitivity import read_layers


# Of the mean variance of the regression's inputs.
RIDGE = 1e-3
# Training at capacity 1.0 leaves an alpha that is hardly above 0 and does nothing.
ALPHA_OF_DENSE = 1e-3
# Of the logits between neighbouring experts, for a token whose predicted score is one standard deviation higher.
LOGIT_STEP = 0.5
# Standard deviations above the mean. Below, every expert but the smallest prefers the token with the higher score.
LOGIT_ZERO = 2.0


def calibrate(model: MoNEForImageClassification | MoNEModel, pixel_values: torch.Tensor) -> None:
    """Order the channels ([`order_channels`]) and start the routers ([`start_routers`]), in place.

    At capacity 1.0 the model stays the same, at smaller ones it stays closer to that before any training.

    It runs the dense model forward and backward over the inputs, twice.

    Args:
        pixel_values: (B, C, height, width), some dozens of inputs as the model takes them.

    Raises:
        TypeError: a model that is no image model.
        ValueError: a model that has a norm in its embeddings (CLIP), or was trained as a MoNE: what its small experts
            and routers have learned would be lost.
    """
    check_image_model(model)
    check_untrained(model)
    order_channels(model, pixel_values)
    start_routers(model, pixel_values)


@torch.no_grad()
def start_routers(model: MoNEForImageClassification | MoNEModel, pixel_values: torch.Tensor) -> None:
    """Let the learned routers prefer the tokens that the prediction needs most from large experts, in place.

    A token's score is how much, to first order, the dense model's prediction changes when one of the token's layers,
    up to the next router, does not read the channels that an expert lacks, summed over layers and experts. The router
    predicts how it differs between the tokens of an image, by ridge regression on the tokens that it sees.

    Args:
        pixel_values: (B, C, height, width).

    Raises:
        TypeError: a model that is no image model.
        ValueError: a model that was trained as a MoNE.
    """
    check_image_model(model)
    check_untrained(model)
    base, config = model.base_model, model.config
    if config.router_type != "learned":
        return
    starts, ends = config.router_layers, (*config.router_layers[1:], config.num_hidden_layers)
    widths = [int(config.hidden_size * width) for width in relative_widths(config.num_experts)[:-1]]
    seen, scores = [[] for _ in starts], [[] for _ in starts]
    for readings in read_layers(model, pixel_values):
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            seen[number].append(readings[2 * start].tokens.double())
            effects = [r.gradient.double() * r.normed.double() for r in readings[2 * start : 2 * end]]
            scores[number].append(sum(e[..., width:].sum(dim=-1).abs() for e in effects for width in widths))
    steps = LOGIT_STEP * torch.arange(config.num_experts, device=base.device)
    for router, x, score in zip(base.routers, seen, scores, strict=True):
        x, score = torch.cat(x, dim=1), torch.cat(score, dim=1)  # (N, B, D), (N, B)
        # An image's tokens compete among themselves only.
        differences = (x - x.mean(dim=0)).flatten(0, 1)
        weight = predict(differences, (score - score.mean(dim=0)).flatten())
        weight /= (differences @ weight).std().clamp_min(1e-12)
        router.alpha.zero_()
        router.proj.weight.copy_(steps.unsqueeze(1) * weight)
        router.proj.bias.copy_(-steps * (x.flatten(0, 1).mean(dim=0) @ weight + LOGIT_ZERO))


def check_untrained(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose routers have been trained, which shows in alpha: it starts at 0."""
    alphas = {name: value.item() for name, value in model.named_parameters() if name.endswith(".alpha")}
    trained = [f"{name} = {alpha:.2g}" for name, alpha in alphas.items() if alpha > ALPHA_OF_DENSE]
    if trained:
        raise ValueError(
            f"This model was trained as a MoNE, and would lose what it has learned: {', '.join(trained)}."
        )


def predict(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(R, D), (R,), both with mean 0 -> weight (D,) of a ridge regression."""
    moments = x.T @ x / len(x)
    moments.diagonal().add_(RIDGE * moments.diagonal().mean() + 1e-12)
    return torch.linalg.solve(moments, x.T @ y / len(x))
