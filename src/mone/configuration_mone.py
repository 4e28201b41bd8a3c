# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Configurations of the image and the video model: ViT's and ViViT's fields, and those of MoNE."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .capacity import as_plain, relative_widths, resolve_capacity


ROUTER_TYPES = ("learned", "random", "argmax")
POOLINGS = ("mean", "cls", "cls_mean", "cls_registers")
FINAL_NORMS = ("tokens", "pooled", "none")


@strict
class MoNEConfig(PreTrainedConfig):
    r"""
    Configuration of [`MoNEModel`] and [`MoNEForImageClassification`]. The defaults are ViT-B/16 at 224².

    Args:
        hidden_size (`int`, *optional*, defaults to 768):
            Width D of the tokens. 2**(num_experts - 1) must divide it.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of transformer layers.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Number of attention heads. Must divide `hidden_size`.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Hidden width of the MLP, the same for every expert.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLP.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after the embeddings, the attention and the MLP.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout of the attention weights.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth in training: the probability, in [0, 1), to skip the last layer's attention or MLP for an
            example. It grows linearly from 0 in the first layer of an encoder.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-12):
            Epsilon of the layer norms.
        image_size (`int` or pair of `int`, *optional*, defaults to 224):
            Image size (height, width) in pixels.
        patch_size (`int` or pair of `int`, *optional*, defaults to 16):
            Patch size (height, width) in pixels. Must divide `image_size`.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the image.
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether the query, key and value projections have a bias.
        pooling (`str`, *optional*, defaults to `"mean"`):
            `"mean"`: global average over the final patch tokens, as in the paper. `"cls"`: class token, for
            checkpoints that have one. `"cls_mean"`: both, side by side (DINOv2's classifiers), and
            `"cls_registers"`: class and register tokens side by side (DeiT's two heads); the classifier is then as
            many times wider.
        num_register_tokens (`int`, *optional*, defaults to 0):
            Learned tokens without a position that lead the sequence, after the class token. Like it, they are not
            routed and always take the full model.
        embedding_norm (`bool`, *optional*, defaults to `False`):
            A layer norm between the embeddings and the layers, as in CLIP.
        final_norm (`str`, *optional*, defaults to `"tokens"`):
            `"tokens"`: the last layer norm acts on every token before pooling, as in ViT. `"pooled"`: after pooling,
            on its result (CLIP, fine-tuned MAE). `"none"`: there is none.
        position_antialias (`bool`, *optional*, defaults to `False`):
            Interpolate positions with an anti-aliasing filter (DINOv2 with registers, timm).
        num_experts (`int`, *optional*, defaults to 4):
            Number E of nested experts; expert i = 1..E has width `hidden_size / 2**(E-i)`.
        router_layers (sequence of `int`, *optional*, defaults to `(0,)`):
            Layers that carry a router, increasing. A decision holds until the next router. Layers before the first
            run the full model.
        router_type (`str`, *optional*, defaults to `"learned"`):
            `"learned"`; `"random"`: Expert Preferred Routing on random scores, without a gate; `"argmax"`: token
            choice without a capacity bound (paper, section A.3), as slow as the dense model.
        capacity (`float` or sequence of `float`, *optional*, defaults to 1.0):
            What a call runs at that gives no `capacity` of its own: an effective capacity in
            [1 / 2**(E-1), 1] or E shares, smallest expert first.
        capacity_delta (`float`, *optional*, defaults to 2.0):
            delta of the paper's Eq. 3.
        capacity_beta (`float`, *optional*, defaults to 10.0):
            beta of the paper's Eq. 3.

    Example:

    ```python
    >>> from mone import MoNEConfig, MoNEForImageClassification

    >>> model = MoNEForImageClassification(MoNEConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768))
    ```"""

    model_type = "mone"
    # Trainer would hand these to `compute_metrics` beside the logits.
    keys_to_ignore_at_inference = [
        *("router_logits", "expert_indices", "hidden_states", "attentions"),
        *("temporal_hidden_states", "temporal_attentions"),
    ]

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    pooling: str = "mean"
    num_register_tokens: int = 0
    embedding_norm: bool = False
    final_norm: str = "tokens"
    position_antialias: bool = False
    num_experts: int = 4
    router_layers: list[int] | tuple[int, ...] = (0,)
    router_type: str = "learned"
    capacity: Any = 1.0  # `resolve_capacity` says what is allowed, as for the argument of a call
    capacity_delta: float | int = 2.0
    capacity_beta: float | int = 10.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check()

    def __setattr__(self, name, value):
        super().__setattr__(name, as_plain(value) if name == "capacity" else value)

    def check(self) -> None:
        """Raise ValueError for fields that do not fit together.

        Called when a config and when a model is made. `validate()`, which `@strict` runs after this, and transformers
        before saving, calls the same methods, but raises StrictDataclassClassValidationError, which is no ValueError.
        """
        self.validate_widths()
        self.validate_sizes()
        self.validate_tokens()
        self.validate_routing()

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens that lead the sequence and take the full model: the class token, if any, and the registers."""
        return (self.pooling != "mean") + self.num_register_tokens

    @property
    def pooled_size(self) -> int:
        """Features of the pooled tokens, which the classifier reads."""
        parts = {"cls_mean": 2, "cls_registers": self.num_prefix_tokens}
        return self.hidden_size * parts.get(self.pooling, 1)

    def validate_widths(self):
        divisor = round(1 / relative_widths(self.num_experts)[0])
        if self.hidden_size < 1 or self.hidden_size % divisor:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a positive multiple of 2**(num_experts - 1) = {divisor}, "
                f"for {self.num_experts} nested experts."
            )
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be positive and divide "
                f"hidden_size={self.hidden_size}."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} must be one of {sorted(ACT2FN)}.")
        if min(self.intermediate_size, self.num_channels, self.num_hidden_layers) < 1:
            raise ValueError(
                f"intermediate_size={self.intermediate_size}, num_channels={self.num_channels} and "
                f"num_hidden_layers={self.num_hidden_layers} must be at least 1."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={self.drop_path_rate} must be in [0, 1).")

    def validate_sizes(self):
        image, patch = as_pair(self.image_size), as_pair(self.patch_size)
        if min(patch) < 1 or any(i < p or i % p for i, p in zip(image, patch, strict=True)):
            raise ValueError(
                f"image_size={self.image_size} must be a positive multiple of patch_size={self.patch_size} "
                "in height and width."
            )

    def validate_tokens(self):
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r} must be one of {POOLINGS}.")
        if self.final_norm not in FINAL_NORMS:
            raise ValueError(f"final_norm={self.final_norm!r} must be one of {FINAL_NORMS}.")
        if self.num_register_tokens < (self.pooling == "cls_registers"):
            raise ValueError(
                f"num_register_tokens={self.num_register_tokens} must not be negative, and at least 1 with "
                f"pooling='cls_registers' (it is {self.pooling!r})."
            )

    def validate_routing(self):
        layers = list(self.router_layers)
        if layers != sorted(set(layers)) or not layers or layers[0] < 0 or layers[-1] >= self.num_hidden_layers:
            raise ValueError(
                f"router_layers={self.router_layers} must hold increasing layer numbers from 0 to "
                f"num_hidden_layers - 1 = {self.num_hidden_layers - 1}, at least one."
            )
        if self.router_type not in ROUTER_TYPES:
            raise ValueError(f"router_type={self.router_type!r} must be one of {ROUTER_TYPES}.")
        self.resolve_capacity(1.0)  # Eq. 3's delta and beta, which shares do not need
        self.resolve_capacity()

    def resolve_capacity(self, capacity=None) -> tuple[float, ...]:
        """The capacity distribution, smallest expert first, of a call's `capacity` (`None`: the config's own).

        Raises:
            ValueError: gives the value and what is allowed.
        """
        return resolve_capacity(
            self.capacity if capacity is None else capacity,
            self.num_experts,
            self.capacity_delta,
            self.capacity_beta,
        )


@strict
class MoNEViViTConfig(MoNEConfig):
    r"""
    Configuration of [`MoNEViViTModel`] and [`MoNEViViTForVideoClassification`]: the factorised encoder (Model 2) of
    ViViT. The defaults are ViViT-FE-B/16x2 with 32 frames at 224².

    Args:
        num_frames (`int`, *optional*, defaults to 32):
            Frames of a clip. The tubelet's duration must divide it.
        tubelet_size (triple of `int`, *optional*, defaults to `(2, 16, 16)`):
            Frames, height and width in pixels of one token.
        num_temporal_layers (`int`, *optional*, defaults to 4):
            Layers of the temporal encoder, which runs at full width. `num_hidden_layers` are the spatial encoder's.
        patch_size:
            Height and width of `tubelet_size`; there is no need to give it.
        all others:
            As in [`MoNEConfig`]. Routers stand in the spatial encoder. `pooling` is `"mean"` or `"cls"`; register
            tokens, an embedding norm and another `final_norm` are for images only.
    """

    model_type = "mone_vivit"

    layer_norm_eps: float = 1e-6
    patch_size: int | list[int] | tuple[int, int] | None = None
    num_frames: int = 32
    tubelet_size: list[int] | tuple[int, ...] = (2, 16, 16)
    num_temporal_layers: int = 4

    def __post_init__(self, **kwargs):
        self.validate_tubelets()
        self.patch_size = list(self.tubelet_size[1:])
        super().__post_init__(**kwargs)

    @property
    def num_temporal_indices(self) -> int:
        """T, the tubelets of a clip one after the other: passes of the spatial encoder, tokens of the temporal one."""
        return self.num_frames // self.tubelet_size[0]

    def check(self) -> None:
        self.validate_tubelets()
        super().check()

    def validate_tokens(self):
        super().validate_tokens()
        plain = {"num_register_tokens": 0, "embedding_norm": False, "final_norm": "tokens"}
        given = {name: getattr(self, name) for name, value in plain.items() if getattr(self, name) != value}
        if self.pooling not in ("mean", "cls"):
            given["pooling"] = self.pooling
        if given:
            raise ValueError(f"The video model has no {given}; allowed are {plain} and pooling='mean' or 'cls'.")

    def validate_tubelets(self):
        if len(self.tubelet_size) != 3 or min(self.tubelet_size) < 1:
            raise ValueError(
                f"tubelet_size={self.tubelet_size} must be three positive integers: frames, height, width."
            )
        if self.patch_size is not None and as_pair(self.patch_size) != tuple(self.tubelet_size[1:]):
            raise ValueError(
                f"patch_size={self.patch_size} differs from tubelet_size={self.tubelet_size}: give only that."
            )
        if self.num_frames < 1 or self.num_frames % self.tubelet_size[0]:
            raise ValueError(
                f"num_frames={self.num_frames} must be a positive multiple of tubelet_size[0]={self.tubelet_size[0]}."
            )
        if self.num_temporal_layers < 1:
            raise ValueError(f"num_temporal_layers={self.num_temporal_layers} must be at least 1.")


def as_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """A size as (height, width)."""
    if isinstance(size, int):
        return (size, size)
    if len(size) != 2:
        raise ValueError(f"A size must be one integer or a pair (height, width), got {size!r}.")
    return tuple(size)


__all__ = ["MoNEConfig", "MoNEViViTConfig"]
