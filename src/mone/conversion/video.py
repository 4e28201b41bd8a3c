# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Image MoNE -> video MoNE, and a video MoNE for other clips and labels."""

import copy
from pathlib import Path

import torch
from torch import nn

from ..configuration_mone import MoNEConfig, MoNEViViTConfig, as_pair
from ..modeling_mone import MoNEForImageClassification, MoNEModel, make_classifier, patch_grid
from ..modeling_mone_vivit import MoNEViViTForVideoClassification, MoNEViViTModel
from .sources import load_classifier, load_config
from .tower import check_fields, check_stated, follow_labels, start_new_classifier


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
        TypeError: for a name that is no field, or a model that is no image model.
        ValueError: names the weights for which the image model has none of the same shape, or the fields for which
            its trained or calibrated routers would be lost, or that its weights are not for.
    """
    if not isinstance(image_model, (MoNEForImageClassification, MoNEModel)):
        raise TypeError(
            f"{type(image_model).__name__} is no image model; allowed are MoNEForImageClassification and MoNEModel."
        )
    check_fields(config, MoNEViViTConfig)
    source = image_model.config
    check_stated(config, vars(source), "the image model")
    of_image = {name: getattr(source, name) for name in MoNEConfig.__annotations__ if name != "patch_size"}
    tubelet_size = (2, *as_pair(source.patch_size))
    video_config = MoNEViViTConfig(**{**of_image, "tubelet_size": tubelet_size, **config})
    keeps_routers = check_routers(image_model, video_config)
    model = MoNEViViTForVideoClassification._from_config(
        video_config,
        attn_implementation=source._attn_implementation,
        dtype=image_model.dtype,
    )
    video, image = model.mone_vivit, image_model.base_model
    if video.spatial.num_cls > image.embeddings.num_cls:
        raise ValueError("pooling='cls' needs an image model that has a class token; pooling='mean' does not.")

    weights = {
        f"spatial.{name}": value for name, value in image.state_dict().items() if not name.startswith("embeddings.")
    }
    if not keeps_routers:
        weights = {name: value for name, value in weights.items() if not name.startswith("spatial.routers.")}
    positions = image.embeddings.interpolate_positions(patch_grid(model.config, as_pair(model.config.image_size)))
    weights["spatial.position_embeddings"] = positions[:, image.embeddings.num_cls - video.spatial.num_cls :]
    if video.spatial.num_cls:
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
        start_new_classifier(model)
    return model.to(image_model.device).train(image_model.training)


def check_routers(image_model: MoNEForImageClassification | MoNEModel, config: MoNEViViTConfig) -> bool:
    """Whether a video model of `config` can have the image model's routers.

    Raises:
        ValueError: it cannot, and they are trained or calibrated; names the fields that differ.
    """
    have, want = (
        {
            "router_layers": tuple(fields.router_layers),
            "num_experts": fields.num_experts,
            "router_type": fields.router_type,
        }
        for fields in (image_model.config, config)
    )
    differing = [name for name in have if have[name] != want[name]]
    # Training moves alpha from 0, and calibration the biases; only the weights start at random.
    parameters = image_model.base_model.routers.named_parameters()
    fitted = any(value.any() for name, value in parameters if not name.endswith(".weight"))
    if differing and fitted:
        raise ValueError(
            f"The image model's routers are trained or calibrated and would be lost with "
            f"{', '.join(f'{name}={want[name]!r}' for name in differing)}; allowed is the image model's own "
            f"{', '.join(f'{name}={have[name]!r}' for name in differing)}."
        )
    return not differing


def load_video_model(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    **config,
) -> MoNEViViTForVideoClassification:
    """A video MoNE from its own checkpoint, with other fields where they fit its weights.

    Another `image_size` or `num_frames` resizes its positions, once and for all; another number of labels brings a
    new classifier, which starts at zero.

    Args:
        source: a folder or a name on the Hub.
        revision, token, cache_dir: for the Hub, as in `from_pretrained`.
        config: fields of [`MoNEViViTConfig`] to set.

    Raises:
        TypeError: for a name that is no field.
        ValueError: another kind of model; values that are not allowed; or lists the weights that are missing, too
            many or of another shape.
    """
    check_fields(config, MoNEViViTConfig)
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
    before = load_config(source, **hub)
    if before.model_type != "mone_vivit":
        raise ValueError(f"{source} is a {before.model_type!r} model; allowed is 'mone_vivit'.")
    check_stated(config, vars(before), str(source))
    sizes = {name: config.pop(name) for name in ("image_size", "num_frames") if name in config}
    model = load_classifier(MoNEViViTForVideoClassification, source, before, MoNEViViTModel, **hub, **config)
    resize_video_model(model, **sizes)
    return model


@torch.no_grad()
def resize_video_model(model: MoNEViViTForVideoClassification, **sizes) -> None:
    """Let a model take clips of another size or length, in place: its positions are resized, once and for all.

    Those in space bicubically, as for images; those in time linearly.

    Args:
        sizes: `image_size` in pixels, (height, width) or one number for both; `num_frames`.

    Raises:
        ValueError: one that the tubelets do not divide.
    """
    changed = copy.deepcopy(model.config)
    changed.update(sizes)
    changed.check()
    model.config.update(sizes)
    spatial, temporal = model.base_model.spatial, model.base_model.temporal
    spatial.set_grid(patch_grid(changed, as_pair(changed.image_size)))
    time = changed.num_temporal_indices
    cls_token, times = temporal.position_embeddings.tensor_split([temporal.num_cls], dim=1)
    # float32, as in `resize_positions`.
    times = nn.functional.interpolate(times.transpose(1, 2).float(), size=time, mode="linear").transpose(1, 2)
    temporal.position_embeddings = nn.Parameter(torch.cat([cls_token, times.to(cls_token.dtype)], dim=1))
    temporal.grid = (1, time)


def set_labels(model: MoNEViViTForVideoClassification, **labels) -> None:
    """Give a model other labels, in place; another number of them brings a new classifier.

    Args:
        labels: `num_labels`, `id2label`, `label2id` and `problem_type`, as in a config.
    """
    before = model.config.id2label
    model.config.update(labels)
    if model.config.num_labels == len(before):
        follow_labels(model, before)
    else:
        model.num_labels = model.config.num_labels
        model.classifier = make_classifier(model.config).to(model.device, model.dtype)
        start_new_classifier(model)
