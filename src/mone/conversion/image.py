# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Any plain pre-norm ViT -> MoNE."""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import BaseImageProcessor, BaseVideoProcessor, PreTrainedConfig, PreTrainedModel

from ..configuration_mone import MoNEConfig, MoNEViViTConfig, as_pair
from ..modeling_mone import MoNEForImageClassification, MoNEModel, patch_grid
from ..modeling_mone_vivit import MoNEViViTForVideoClassification
from .calibration import check_untrained
from .processors import fit_image_processor, load_image_processor, make_video_processor, output_size
from .scenic import from_scenic, is_factorised, parameters, vivit_from_scenic
from .sources import NO_KEY, check_source, load_all, load_classifier, load_pretrained, read_weights
from .state_dicts import infer_config, strip_prefixes
from .timm_vits import from_timm
from .tower import LABEL_FIELDS, STATED_FIELDS, Tower, build_image_model, check_fields, check_stated
from .transformers_vits import from_transformers


logger = logging.getLogger(__name__)

Source = nn.Module | Mapping | str | Path
MoNE = MoNEForImageClassification | MoNEModel | MoNEViViTForVideoClassification


def mone_from_vit(
    source: Source,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    **config,
) -> MoNE:
    """A MoNE that is exactly the source at capacity 1.0, with fresh routers.

    Sources and what becomes of them (`transformers_vits.FAMILIES` lists the former's types):

    - transformers' ViT (DINO's, too), DeiT, MSN, MAE's encoder, I-JEPA, DINOv2 with and without registers, CLIP and
      SigLIP. With a classifier they become a [`MoNEForImageClassification`] with its labels; without one, a
      [`MoNEModel`]. DeiT's two averaged heads become one that reads both tokens, DINOv2's reads class token and mean.
      Of CLIP and SigLIP the image tower is converted; poolers, attention pooling and text towers are left behind.
    - timm's `VisionTransformer`, as a model, a state dict or a checkpoint on the Hub.
    - Flax parameters of Scenic: ViT, MatViT and AugReg's `.npz`; those of ViViT-FE become the video model.
    - The DINOv2 backbone in an ONNX file.

    Stochastic depth and dropout come along as rates; training with them differs in detail.

    Args:
        source: a model; a state dict or nested dict of arrays; a file of weights (.safetensors, .bin, .pth, .npz,
            .onnx); a folder or a name on the Hub. A bare state dict does not show everything: up to a width of 1024
            heads are taken to have 64 features, patches to be a square, and the rest to be the architecture's default,
            unless `config` says otherwise (`num_attention_heads`, `image_size`, ...). A warning says what was taken.
        revision, token, cache_dir: for the Hub, as in `from_pretrained`.
        config: fields of [`MoNEConfig`] to set, such as `num_experts`, `router_layers` or `capacity`. Another
            `image_size` resizes the positions; labels (`num_labels`, `id2label`) of another number bring a new
            classifier, which starts at zero; without one, `pooling` may change, too: with "mean" the class token
            becomes a register.

    Returns:
        The model; in evaluation mode, unless the source is a model in training.

    Raises:
        TypeError: for a name that is no field, or a source of another type.
        ValueError: names an architecture that cannot be mapped, and why; lists keys that are missing, have no
            counterpart or another shape; a field that the source states otherwise and weights do not show, such as
            `num_attention_heads`; or a width that is not divisible by 2**(num_experts - 1).
        OSError: no folder, file or repo on the Hub of that name.
    """
    check_fields(config, MoNEConfig, MoNEViViTConfig)  # before any weights are read
    name = str(source) if isinstance(source, (str, Path)) else f"this {type(source).__name__}"
    if isinstance(source, (str, Path)):
        path, hub = Path(source), {"revision": revision, "token": token, "cache_dir": cache_dir}
        source = read_weights(path) if path.is_file() else load_pretrained(source, **hub).eval()
    if not isinstance(source, (nn.Module, Mapping)):
        raise TypeError(
            f"source is {type(source).__name__}; allowed are a model, a state dict or nested dict of arrays, a file, "
            "a folder and a name on the Hub."
        )
    if isinstance(source, nn.Module):
        source = extract_model_from_parallel(source, keep_torch_compile=False)
        others = [key for key, value in source.state_dict().items() if not isinstance(value, torch.Tensor)]
        if others:
            raise ValueError(f"{name} holds values that are no tensors, {others[:3]}: convert it before quantisation.")
        if any(value.is_meta for value in source.state_dict().values()):
            raise ValueError(
                f"Weights of {name} are on the meta device, not loaded or offloaded: load it to one device."
            )
        attention = source.config._attn_implementation if isinstance(source, PreTrainedModel) else None
        model = build_image_model(tower_of_model(source, name), attention, **config)
        return model.to(next(source.parameters()).device).train(source.training)
    state = strip_prefixes(parameters(source))
    if is_factorised(state):
        return vivit_from_scenic(state, name, **config).eval()
    return build_image_model(tower_of_state(state, name, config), **config).eval()


def tower_of_model(model: nn.Module, name: str) -> Tower:
    """The tower of a model of transformers or timm."""
    timm_model = getattr(model, "timm_model", model)  # transformers wraps it
    if isinstance(model, PreTrainedModel) and timm_model is model:
        return from_transformers(model.config, model.state_dict(), name)
    if not hasattr(timm_model, "blocks") or not hasattr(timm_model, "patch_embed"):
        raise ValueError(f"A {type(timm_model).__name__} cannot become a MoNE: it is no ViT of transformers or timm.")
    tower = from_timm(timm_model.state_dict(), name, timm_model)
    if "num_labels" in tower.fields and isinstance(model, PreTrainedModel):
        tower.fields.update({key: getattr(model.config, key) for key in LABEL_FIELDS if key != "num_labels"})
        del tower.fields["num_labels"]
    return tower


def tower_of_state(state: Mapping[str, torch.Tensor], name: str, config: Mapping) -> Tower:
    """The tower of a flat state dict, by its keys."""
    if any("/" in key for key in state):
        return from_scenic(state, name)
    heads, size = config.get("num_attention_heads"), config.get("image_size")
    if any(key.startswith("blocks.0.") for key in state):
        pooling = config.get("pooling")
        tower = from_timm(state, name, num_attention_heads=heads, image_size=size, pooling=pooling)
        others = ["pre-norm blocks"] if pooling else [f"pooling={tower.fields['pooling']}", "pre-norm blocks"]
    else:
        tower, others = from_transformers(infer_config(state, heads, size), state, name), []
    guessed = [f"{key}={tower.fields[key]}" for key in STATED_FIELDS if key not in config] + others
    if guessed:
        logger.warning("%s has weights only, which do not show all. Taken: %s.", name, ", ".join(guessed))
    tower.fields.update({key: config[key] for key in STATED_FIELDS if key in config})
    return tower


def load_image_model(source: str | Path, **options) -> MoNE:
    """An image MoNE from its own checkpoint, or made from any source that [`mone_from_vit`] takes.

    Args:
        source: a folder, a name on the Hub or a file of weights.
        options: as in [`mone_from_vit`].

    Raises:
        TypeError, ValueError, OSError: as in [`mone_from_vit`].
        ValueError: trained routers would come to other layers.
    """
    return _load_checked(source, check_source(source, **_hub(options)), options)


def _load_checked(source: str | Path, config: PreTrainedConfig | None, options: dict) -> MoNE:
    """[`load_image_model`] of a source whose config [`check_source`] has read."""
    if config is None or config.model_type != "mone":
        return mone_from_vit(source, **options)
    check_stated(options, vars(config), str(source))
    size = options.pop("image_size", None)
    if config.architectures == [MoNEModel.__name__] and not {"num_labels", "id2label"} & set(options):
        model = load_all(MoNEModel, source, NO_KEY, **options)
    else:
        model = load_classifier(MoNEForImageClassification, source, config, MoNEModel, **options)
    if tuple(model.config.router_layers) != tuple(config.router_layers):
        try:
            check_untrained(model)
        except ValueError as error:
            raise ValueError(
                f"router_layers={tuple(model.config.router_layers)}: the routers of {source} were trained in layers "
                f"{tuple(config.router_layers)}. {error}"
            ) from None
    if size is not None:
        resize_image_model(model, size)
    return model


def resize_image_model(model: MoNEForImageClassification | MoNEModel, image_size: int | tuple[int, int]) -> None:
    """Let a model take images of another size, in place: its positions are resized, once and for all.

    Args:
        image_size: in pixels, a multiple of the patch size; (height, width), or one number for both.

    Raises:
        ValueError: another size.
    """
    changed = copy.deepcopy(model.config)
    changed.image_size = image_size
    changed.check()
    model.config.image_size = image_size
    model.base_model.embeddings.set_grid(patch_grid(changed, as_pair(image_size)))


def load_image_model_and_processor(
    source: str | Path, **options
) -> tuple[MoNE, BaseImageProcessor | BaseVideoProcessor]:
    """[`load_image_model`] with the source's image processor, both of one image size.

    That is `image_size` where it is given, else the processor's: DINOv2's positions are for images of 518 pixels,
    and its processor makes 224. A ViViT-FE comes with a video processor.
    """
    config = check_source(source, **_hub(options))  # first, as its error says more
    processor = load_image_processor(source, **_hub(options))
    size = None if processor is None else output_size(processor)
    if size is not None:
        options = {"image_size": size, **options}
    model = _load_checked(source, config, options)
    if isinstance(model, MoNEViViTForVideoClassification):
        return model, make_video_processor(model.config)
    return model, fit_image_processor(processor, source, model.config)


def _hub(options: Mapping) -> dict:
    return {key: options.get(key) for key in ("revision", "token", "cache_dir")}
