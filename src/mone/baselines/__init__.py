# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Other ways to make a vision transformer cheaper, for comparison."""

from .dense import DenseModel
from .token_merging import TokenMergingModel, merge_tokens, merged_per_layer_for_macs, token_merging_macs


__all__ = ["DenseModel", "TokenMergingModel", "merge_tokens", "merged_per_layer_for_macs", "token_merging_macs"]
