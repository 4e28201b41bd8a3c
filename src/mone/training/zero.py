# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Weights under DeepSpeed's ZeRO, where the optimiser steps on float32 copies of its own."""

import torch
from torch import nn

from ..routing import Router, clamp_alpha_


def local_shard(parameter: nn.Parameter) -> torch.Tensor:
    """This process's part of a parameter that ZeRO-3 or FSDP2 shards, else all of it."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3; the last shards are longer than what is in them
        size = parameter.ds_tensor.numel()
        start = size * torch.distributed.get_rank(parameter.ds_process_group)
        return parameter.ds_tensor.detach()[: max(parameter.ds_numel - start, 0)]
    return parameter.detach().to_local() if hasattr(parameter, "to_local") else parameter.detach()


def project_zero_alpha_(model: nn.Module) -> None:
    """What `model.project_alpha_()` leaves out under ZeRO: the optimiser's copies of alpha, and ZeRO-3's shards.

    The next step would overwrite the model's own alpha with them. Every process must call it.
    """
    for module in model.modules():
        if not isinstance(module, Router) or module.router_type == "random" or not module.alpha.requires_grad:
            continue
        alpha = module.alpha
        if hasattr(alpha, "ds_tensor"):  # stage 3
            from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

            safe_set_local_fp32_param(alpha, clamp_alpha_(safe_get_local_fp32_param(alpha)))
            clamp_alpha_(alpha.ds_tensor)
        elif hasattr(alpha, "_hp_mapping"):  # stages 1 and 2
            from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

            safe_set_full_fp32_param(alpha, clamp_alpha_(safe_get_full_fp32_param(alpha)))
