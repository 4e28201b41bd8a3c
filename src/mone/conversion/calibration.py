# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Fit a converted ViT to some images before it is trained: what small experts keep, and which tokens they get."""

import torch
from transformers import PreTrainedModel

from ..capacity import relative_widths
from ..modeling_mone import MoNEForImageClassification, MoNEModel
from .channel_order import check_image_model, order_channels, run_dense


# Of the mean variance of the regression's inputs.
RIDGE = 1e-3
# Training at capacity 1.0 leaves an alpha that is hardly above 0 and does nothing.
ALPHA_OF_DENSE = 1e-3
# Of the logits between neighbouring experts, for a token one standard deviation more in need of channels.
LOGIT_STEP = 0.5
# Standard deviations above the mean. Below, every expert but the smallest prefers the token with the higher score.
LOGIT_ZERO = 2.0


def calibrate(model: MoNEForImageClassification | MoNEModel, pixel_values: torch.Tensor) -> None:
    """Order the channels ([`order_channels`]) and start the routers ([`start_routers`]), in place.

    At capacity 1.0 the model stays the same, at smaller ones it stays closer to that before any training.

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
    """Let the learned routers prefer tokens for which small experts lack most, in place.

    A token's score is what its layers, up to the next router, read in the channels that experts lack, as the dense
    model has it, summed over the experts. The router predicts it by ridge regression on the tokens that it sees.

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
    routed, ends = config.router_layers, (*config.router_layers[1:], config.num_hidden_layers)
    widths = [int(config.hidden_size * width) for width in relative_widths(config.num_experts)[:-1]]
    seen, missing = {}, [torch.zeros(()) for _ in routed]

    def see(layer, args):
        seen[layer] = args[0][config.num_prefix_tokens :].double().flatten(0, 1)  # (N * B, D)

    def add(number):
        def read(norm, args, output):
            normed = output[config.num_prefix_tokens :].double().square().flatten(0, 1)
            missing[number] = missing[number] + sum(normed[:, width:].sum(dim=1) for width in widths)

        return read

    hooks = [base.layers[index].register_forward_pre_hook(see) for index in routed]
    for number, (start, end) in enumerate(zip(routed, ends, strict=True)):
        for layer in base.layers[start:end]:
            hooks += [
                norm.register_forward_hook(add(number)) for norm in (layer.layernorm_before, layer.layernorm_after)
            ]
    run_dense(model, pixel_values, hooks)
    for router, index, score in zip(base.routers, routed, missing, strict=True):
        weight, bias = predict(seen[base.layers[index]], (score - score.mean()) / score.std().clamp_min(1e-12))
        steps = LOGIT_STEP * torch.arange(config.num_experts, device=weight.device)
        router.alpha.zero_()
        router.proj.weight.copy_(steps.unsqueeze(1) * weight)
        router.proj.bias.copy_(steps * (bias - LOGIT_ZERO))


def check_untrained(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose routers have been trained, which shows in alpha: it starts at 0."""
    alphas = {name: value.item() for name, value in model.named_parameters() if name.endswith(".alpha")}
    trained = [f"{name} = {alpha:.2g}" for name, alpha in alphas.items() if alpha > ALPHA_OF_DENSE]
    if trained:
        raise ValueError(
            f"This model was trained as a MoNE, and would lose what it has learned: {', '.join(trained)}."
        )


def predict(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, D), (R,) -> weight (D,) and bias () of a ridge regression."""
    mean = x.mean(dim=0)
    moments = (x - mean).T @ (x - mean) / len(x)
    moments.diagonal().add_(RIDGE * moments.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(moments, (x - mean).T @ (y - y.mean()) / len(x))
    return weight, y.mean() - weight @ mean
