# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Image MoNE -> video MoNE."""

import torch

from ..configuration_mone import MoNEConfig, MoNEViViTConfig, as_pair
from ..modeling_mone import MoNEForImageClassification, MoNEModel, patch_grid
from ..modeling_mone_vivit import MoNEViViTForVideoClassification
from .tower import LABEL_FIELDS, check_fields


@torch.no_grad()
def mone_vivit_from_mone(
    image_model: MoNEForImageClassification | MoNEModel, **config
) -> MoNEViViTForVideoClassification:
    """A video model that starts from an image model, as ViViT does (Arnab et al., 2021; Scenic, `projects/vivit`).

    The spatial encoder gets the image model's layers, routers, class token and positions, resized where its frames
    are of another size. The tubelet kernel is the patch kernel at the central frame, index t // 2, and zero at the
    others. The temporal encoder is new, and the classifier starts at zero.

    Args:
        image_model: of the layers and widths that the spatial encoder is to have.
        config: fields of [`MoNEViViTConfig`] to set. By default `tubelet_size` is 2 frames of the image model's
            patches; `pooling="mean"` leaves a class token away.

    Raises:
        TypeError: for a name that is no field.
        ValueError: names the weights for which the image model has none of the same shape.
    """
    known = {*MoNEConfig.__annotations__, *MoNEViViTConfig.__annotations__, *LABEL_FIELDS}
    check_fields(config, known, "MoNEViViTConfig")
    source = image_model.config
    of_image = {name: getattr(source, name) for name in MoNEConfig.__annotations__ if name != "patch_size"}
    tubelet_size = (2, *as_pair(source.patch_size))
    model = MoNEViViTForVideoClassification._from_config(
        MoNEViViTConfig(**{**of_image, "tubelet_size": tubelet_size, **config}),
        attn_implementation=source._attn_implementation,
        dtype=image_model.dtype,
    )
    video, image = model.mone_vivit, image_model.base_model
    if video.spatial.num_prefix > image.embeddings.num_prefix:
        raise ValueError("pooling='cls' needs an image model that has a class token; pooling='mean' does not.")

    weights = {
        f"spatial.{name}": value for name, value in image.state_dict().items() if not name.startswith("embeddings.")
    }
    if model.config.router_layers != source.router_layers or model.config.num_experts != source.num_experts:
        weights = {name: value for name, value in weights.items() if not name.startswith("spatial.routers.")}
    positions = image.embeddings.interpolate_positions(patch_grid(model.config, as_pair(model.config.image_size)))
    weights["spatial.position_embeddings"] = positions[:, image.embeddings.num_prefix - video.spatial.num_prefix :]
    if video.spatial.num_prefix:
        weights["spatial.cls_token"] = image.embeddings.cls_token
    patches = image.embeddings.patch_embeddings.projection
    time = model.config.tubelet_size[0]
    kernel = torch.zeros_like(patches.weight).unsqueeze(2).repeat(1, 1, time, 1, 1)
    kernel[:, :, time // 2] = patches.weight
    weights["embeddings.patch_embeddings.projection.weight"] = kernel
    weights["embeddings.patch_embeddings.projection.bias"] = patches.bias
    try:
        result = video.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # lists names and shapes
        raise ValueError(f"The image model does not fit the spatial encoder: {error}") from error
    missing = [name for name in result.missing_keys if not name.startswith(("temporal.", "spatial.routers."))]
    if missing or result.unexpected_keys:
        raise ValueError(f"Weights of the image model missing: {missing}; too many: {result.unexpected_keys}.")
    if model.config.num_labels > 0:
        torch.nn.init.zeros_(model.classifier.weight)
        torch.nn.init.zeros_(model.classifier.bias)
    return model.to(image_model.device).train(image_model.training)
