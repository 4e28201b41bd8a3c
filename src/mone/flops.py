# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Multiply-accumulates (MACs) of a MoNE model, counted from its config. The paper's "GFLOPs" are these.

Counted are the matrix products: embedding, routers, projections, attention and classifier, for one image or clip.
Norms, activations and additions are not, as in the paper and in PyTorch's `FlopCounterMode`. Attention and patch
embedding do not depend on the capacity.
"""

from collections.abc import Sequence

from .capacity import check_number, relative_widths, tokens_per_expert
from .configuration_mone import MoNEConfig, as_pair


def count_macs(
    config: MoNEConfig,
    capacity: float | Sequence[float] | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> int:
    """MACs of a classifier on one image, or on one clip for a video model.

    Args:
        config: of the model.
        capacity: as in the model's forward; default `config.capacity`. An arg-max router ignores it and runs at the
            dense model's cost.
        image_size: pixels (height, width) where they differ from `config.image_size`.

    Raises:
        TypeError: no config of a MoNE, such as the model itself.
        ValueError: if `capacity` is not allowed, or patches do not divide `image_size`.
    """
    _check_config(config)
    d, e = config.hidden_size, config.num_experts
    patch, n = as_pair(config.patch_size), num_patches(config, image_size)
    prefix = config.num_prefix_tokens
    counts = tokens_per_expert(config.resolve_capacity(capacity), n)

    # Tokens at full width that cost as much as all tokens of the routed layers.
    widths = relative_widths(e)
    routed = prefix + sum(count * width for count, width in zip(counts, widths, strict=True))
    if config.router_type == "argmax":
        routed = prefix + n
    dense_layers = config.router_layers[0]
    routed_layers = config.num_hidden_layers - dense_layers
    total = dense_layers * layer_macs(config, prefix + n, prefix + n)
    total += routed_layers * layer_macs(config, prefix + n, routed)
    if config.router_type != "random":
        total += len(config.router_layers) * n * d * e
    total += n * config.num_channels * patch[0] * patch[1] * d

    if hasattr(config, "num_temporal_indices"):  # a video model
        # One spatial encoder pass for each temporal index; a tubelet's kernel spans its frames.
        time = config.num_temporal_indices
        total = time * (total + n * config.num_channels * patch[0] * patch[1] * d * (config.tubelet_size[0] - 1))
        total += config.num_temporal_layers * layer_macs(config, prefix + time, prefix + time)
    return round(total) + config.pooled_size * config.num_labels


def attention_macs(config: MoNEConfig, image_size: int | tuple[int, int] | None = None) -> int:
    """MACs of attention, queries with keys and weights with values: a part of `count_macs`, the same at any capacity.

    Args:
        config, image_size: as in `count_macs`.
    """
    prefix = config.num_prefix_tokens
    sequences = config.num_hidden_layers * (prefix + num_patches(config, image_size)) ** 2
    if hasattr(config, "num_temporal_indices"):  # a video model
        time = config.num_temporal_indices
        sequences = time * sequences + config.num_temporal_layers * (prefix + time) ** 2
    return 2 * config.hidden_size * sequences


def num_patches(config: MoNEConfig, image_size: int | tuple[int, int] | None = None) -> int:
    """Patches of an image, of a clip in each temporal index.

    Args:
        config, image_size: as in `count_macs`.

    Raises:
        ValueError: if patches do not divide the image.
    """
    image, patch = as_pair(config.image_size if image_size is None else image_size), as_pair(config.patch_size)
    if any(pixels < step or pixels % step for pixels, step in zip(image, patch, strict=True)):
        raise ValueError(f"image_size={image} must be a positive multiple of patch_size={config.patch_size}.")
    return (image[0] // patch[0]) * (image[1] // patch[1])


def layer_macs(config: MoNEConfig, sequence: int, full_width_tokens: float) -> float:
    """MACs of one layer: its projections for so many tokens at full width, attention over the whole sequence."""
    d = config.hidden_size
    projections = d * (4 * d + 2 * config.intermediate_size)  # query, key, value, output; both of the MLP
    return full_width_tokens * projections + 2 * sequence * sequence * d


def capacity_for_macs(config: MoNEConfig, gmacs: float, image_size: int | tuple[int, int] | None = None) -> float:
    """An effective capacity at which one image or clip costs at most `gmacs` times 10^9 MACs, and hardly less.

    Whole tokens make the cost a staircase, not quite monotone. What is returned always fits the budget; the largest
    capacity that does may be larger by less than a token's worth of each expert.

    Args:
        config, image_size: as in `count_macs`.
        gmacs: the budget for one image or clip. One at or above the dense model's cost gives 1.0.

    Raises:
        TypeError: no config of a MoNE, or a budget that is no number.
        ValueError: if even the smallest capacity costs more; the message gives the least budget that works.
    """
    _check_config(config)
    check_number(gmacs=gmacs)
    low, high = relative_widths(config.num_experts)[0], 1.0
    least = count_macs(config, low, image_size)
    budget = gmacs * 1e9
    if not least <= budget:
        raise ValueError(
            f"A budget of {gmacs} GMACs cannot be met: capacity {low:g} already costs {least / 1e9:.6g} GMACs. "
            "Attention and embedding do not shrink with the capacity; with smaller images they do."
        )
    if count_macs(config, high, image_size) <= budget:
        return high
    # `low` always fits.
    while high - low > 1e-6:
        middle = (low + high) / 2
        if count_macs(config, middle, image_size) <= budget:
            low = middle
        else:
            high = middle
    return low


def _check_config(config: MoNEConfig) -> None:
    # Not by class: it may be that of the code beside a checkpoint.
    if not hasattr(config, "resolve_capacity"):
        raise TypeError(f"config must be a MoNEConfig, such as model.config, got {type(config).__name__}.")
