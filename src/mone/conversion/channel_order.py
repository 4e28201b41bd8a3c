# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Order the channels of the residual stream, so that the nested experts get the important ones.

A transformer does not change when the D channels of its residual stream are numbered otherwise, together with all
weights that read or write them. An expert of width d works on the first d; in a checkpoint trained without nesting
these are any d.
"""

import torch
from torch import nn

from ..modeling_mone import MoNEPreTrainedModel, PositionedTokens
from ..nested_linear import NestedIn, NestedOut
from ..routing import Router


@torch.no_grad()
def permute_channels(model: MoNEPreTrainedModel, order: torch.Tensor) -> None:
    """Number the residual stream's channels anew, in place: the new channel i is the old one `order[i]`.

    At capacity 1.0 the model's outputs stay the same, `last_hidden_state` and `hidden_states` up to this order.

    Args:
        order: (D,) a permutation of 0..D-1.
    """
    width = model.config.hidden_size
    if not torch.equal(order.sort().values.cpu(), torch.arange(width)):
        raise ValueError(f"order must be a permutation of the channels 0 to {width - 1}.")

    def permute(parameter: nn.Parameter | None, dim: int) -> None:
        if parameter is not None:
            tokens = parameter.unflatten(dim, (-1, width))  # some poolings put several tokens side by side
            parameter.copy_(tokens.index_select(dim + 1, order.to(parameter.device)).flatten(dim, dim + 1))

    for name, module in model.named_modules():
        if isinstance(module, (NestedOut, nn.LayerNorm, nn.Conv2d, nn.Conv3d)):
            permute(module.weight, 0)
            permute(module.bias, 0)
        elif isinstance(module, NestedIn):
            permute(module.weight, 1)
        elif isinstance(module, Router) and module.router_type != "random":
            permute(module.proj.weight, 1)
        elif isinstance(module, PositionedTokens):
            for parameter in (module.cls_token, module.register_tokens, module.position_embeddings):
                permute(parameter, 2)
        elif name == "classifier" and isinstance(module, nn.Linear):
            permute(module.weight, 1)


@torch.no_grad()
def order_channels(model: MoNEPreTrainedModel, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
    """Order the channels by importance, the most important first, in place.

    Args:
        model: an image or video model.
        pixel_values: a few dozen inputs, as the model takes them. A channel's importance is then how much the layers
            change it. Without them it is the size of the weights that do.

    Returns:
        (D,) the order: which old channel is now where, as in [`permute_channels`].
    """
    importance = weight_importance(model) if pixel_values is None else write_importance(model, pixel_values)
    order = importance.argsort(descending=True, stable=True)
    permute_channels(model, order)
    return order


def out_projections(model: MoNEPreTrainedModel) -> list[NestedOut]:
    """The layers' two out-projections each, which alone change the residual stream."""
    return [module for module in model.modules() if isinstance(module, NestedOut)]


def weight_importance(model: MoNEPreTrainedModel) -> torch.Tensor:
    """(D,) share of a channel's weights in the squared norm of each out-projection, summed over these."""
    norms = [module.weight.float().square().sum(dim=1) for module in out_projections(model)]
    return sum(norm / norm.sum() for norm in norms)


def write_importance(model: MoNEPreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """(D,) share of a channel in the variance of each out-projection's output, summed over these."""
    sums = {module: torch.zeros(3, model.config.hidden_size) for module in out_projections(model)}

    def record(module, args, output):  # of some of the tokens
        rows = output.double().flatten(0, -2).cpu()
        sums[module] = sums[module] + torch.stack([torch.ones_like(rows), rows, rows.square()]).sum(dim=1)

    hooks = [module.register_forward_hook(record) for module in sums]
    training = model.training
    try:
        model.eval()(pixel_values.to(model.device), capacity=1.0)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    variances = [squares / count - (total / count).square() for count, total, squares in sums.values()]
    return sum(variance / variance.sum() for variance in variances)
