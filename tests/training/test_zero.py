# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Shards of weights. What needs DeepSpeed itself is in test_many_devices.py."""

import pytest
import torch

from mone.training.zero import local_shard


@pytest.mark.parametrize(("rank", "expected"), [(0, [0.0, 1.0]), (1, [2.0]), (2, [])])
def test_what_fills_up_the_last_shards_of_zero3_is_left_out(monkeypatch, rank, expected):
    """DeepSpeed does not set it: it may be NaN."""
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_numel, parameter.ds_process_group = 3, "group"
    parameter.ds_tensor = torch.tensor([expected + [float("nan")] * (2 - len(expected))]).flatten()
    monkeypatch.setattr(torch.distributed, "get_rank", {"group": rank}.get)
    assert local_shard(parameter).tolist() == expected


def test_a_parameter_that_is_not_sharded():
    assert torch.equal(local_shard(torch.nn.Parameter(torch.ones(2))), torch.ones(2))
