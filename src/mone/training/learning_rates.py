# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Learning rates that differ: of the routers, and of layers far from the classifier."""

import torch
from torch import nn

from ..modeling_mone import MoNELayer
from ..routing import Router


def set_learning_rates(
    optimizer: torch.optim.Optimizer, model: nn.Module, router_learning_rate: float | None, layer_decay: float
) -> None:
    """Split the groups of an optimiser that has not stepped, in place, so that parameters learn at their own rates.

    Args:
        optimizer: its groups have the classifier's learning rate.
        model: whose parameters the groups hold.
        router_learning_rate: of the routers and their alpha. None: the classifier's, whatever their layer.
        layer_decay: what the rate is multiplied by from each layer to the one before, in (0, 1], as BEiT's and MAE's
            fine-tuning do (arXiv 2106.08254, 2111.06377): with L layers, that of the embeddings by its power L + 1.
    """
    depths = layer_depths(model)
    last = max(depths.values())
    routers = {p for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    for group in list(optimizer.param_groups):
        parts = {group["lr"]: []}  # first: Trainer logs the rate of the first group
        for parameter in group["params"]:
            rate = group["lr"]
            if parameter in routers:
                rate = rate if router_learning_rate is None else router_learning_rate
            else:
                rate *= layer_decay ** (last - depths[parameter])
            parts.setdefault(rate, []).append(parameter)
        group["params"] = parts.pop(group["lr"])
        for rate, parameters in parts.items():
            optimizer.add_param_group({**group, "params": parameters, "lr": rate})


def layer_depths(model: nn.Module) -> dict[nn.Parameter, int]:
    """0 for the embeddings, 1 for the first of L layers, L + 1 for what follows the last, such as the classifier.

    The temporal encoder's layers count on from the spatial encoder's; what lies between has the depth of the layer
    that follows.
    """
    depths, passed = {}, 0
    for module in model.modules():  # in the order in which tokens pass them
        if isinstance(module, MoNELayer):
            passed += 1
            depths |= dict.fromkeys(module.parameters(), passed)
        else:
            for parameter in module.parameters(recurse=False):
                depths.setdefault(parameter, passed + (passed > 0))
    return depths
