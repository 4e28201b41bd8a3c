# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Other ways to make a vision transformer cheaper, for comparison."""

from .dense import DenseModel
from .mixture_of_depths import MixtureOfDepthsModel, mixture_of_depths_macs
from .token_merging import TokenMergingModel, merge_tokens, merged_per_layer_for_macs, token_merging_macs


__all__ = [
    "DenseModel",
    "MixtureOfDepthsModel",
    "TokenMergingModel",
    "merge_tokens",
    "merged_per_layer_for_macs",
    "mixture_of_depths_macs",
    "token_merging_macs",
]
