# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Fit a converted ViT to some images before it is trained: what small experts keep, and which tokens they get."""

import torch
from transformers import PreTrainedModel

from ..modeling_mone import MoNEForImageClassification, MoNEModel, expert_widths
from .channel_order import check_image_model, order_channels
from .sensitivity import read_layers


# What the scripts take. On a fine-tuned DINOv2-S fewer predict the scores of other images worse, more hardly better.
CALIBRATION_IMAGES = 256
# Of the mean variance of the regression's inputs. A tenth of it predicts worse after up to 256 images, and no better
# after more.
RIDGE = 1e-2
# Of the logits between neighbouring experts, for a token whose predicted score is one standard deviation higher.
LOGIT_STEP = 0.5
# Standard deviations above the mean. Below, every expert but the smallest prefers the token with the higher score.
LOGIT_ZERO = 2.0


def calibrate(model: MoNEForImageClassification | MoNEModel, pixel_values: torch.Tensor) -> None:
    """Order the channels ([`order_channels`]) and start the routers ([`start_routers`]), in place.

    At capacity 1.0 logits stay the same, at smaller ones they stay closer to that before any training. A model without
    a classifier has other features afterwards, as [`rotate_channels`] says: calibrate those that are trained on.

    It runs the dense model forward and backward over the inputs, twice.

    Args:
        pixel_values: (B, C, height, width), inputs as the model takes them, some hundreds: more hardly help.
            `conversion.calibration_images` reads those of a folder.

    Raises:
        TypeError: a model that is no image model, or inputs that are no tensor of floats.
        ValueError: no images, or values that are not finite; a model that has a norm in its embeddings (CLIP), or was
            trained as a MoNE: what its small experts and routers have learned would be lost.
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
    predicts how far it is from the mean of its image, in the image's standard deviations, by ridge regression on the
    tokens that it sees.

    Args:
        pixel_values: (B, C, height, width).

    Raises:
        TypeError: as [`calibrate`].
        ValueError: as [`calibrate`], but for CLIP.
    """
    check_image_model(model)
    check_untrained(model)
    base, config = model.base_model, model.config
    if config.router_type != "learned":
        return
    starts, ends = config.router_layers, (*config.router_layers[1:], config.num_hidden_layers)
    fits = [RidgeRegression(config.hidden_size, base.device) for _ in starts]
    for readings in read_layers(model, pixel_values):
        for fit, start, end in zip(fits, starts, ends, strict=True):
            effects = [r.gradient.double() * r.normed.double() for r in readings[2 * start : 2 * end]]
            score = sum(e[..., width:].sum(dim=-1).abs() for e in effects for width in expert_widths(config)[:-1])
            fit.add(readings[2 * start].tokens.double(), score)
    steps = LOGIT_STEP * torch.arange(config.num_experts, device=base.device)
    for router, fit in zip(base.routers, fits, strict=True):
        weight = fit.solve()
        router.alpha.zero_()
        router.proj.weight.copy_(steps.unsqueeze(1) * weight)
        router.proj.bias.copy_(-steps * (fit.mean() @ weight + LOGIT_ZERO))


def check_untrained(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose routers have been trained, which shows in alpha.

    It starts at 0, and training at capacity 1.0 leaves it there. Random routers have none, so that a training of small
    experts beside them does not show.
    """
    alphas = {name: value.item() for name, value in model.named_parameters() if name.endswith(".alpha")}
    trained = [f"{name} = {alpha:.2g}" for name, alpha in alphas.items() if alpha != 0]
    if trained:
        raise ValueError(
            f"This model was trained as a MoNE, and would lose what it has learned: {', '.join(trained)}. If it was "
            "not, set that to 0."
        )


class RidgeRegression:
    """Of the scores within images, whose tokens compete among themselves only, on the tokens, in sums over images."""

    def __init__(self, width: int, device: torch.device):
        self.count, self.total = 0, torch.zeros(width, dtype=torch.float64, device=device)
        self.moments, self.products = torch.zeros_like(self.total.expand(width, -1)), torch.zeros_like(self.total)

    def add(self, tokens: torch.Tensor, scores: torch.Tensor) -> None:
        """(N, B, D), (N, B) of N tokens of B images. No image counts more than another."""
        x = (tokens - tokens.mean(dim=0)).flatten(0, 1)
        scores = (scores - scores.mean(dim=0)) / scores.std(dim=0, correction=0).clamp_min(1e-12)
        self.count += len(x)
        self.total += tokens.sum(dim=(0, 1))
        self.moments += x.T @ x
        self.products += x.T @ scores.flatten()

    def mean(self) -> torch.Tensor:
        """(D,) of all tokens."""
        return self.total / self.count

    def solve(self) -> torch.Tensor:
        """(D,) weight, so long that what it predicts has standard deviation 1 within images."""
        moments = self.moments / self.count
        ridge = RIDGE * moments.diagonal().mean() + 1e-12
        weight = torch.linalg.solve(moments + ridge * torch.eye(len(moments)).to(moments), self.products / self.count)
        return weight / (weight @ moments @ weight).sqrt().clamp_min(1e-12)
