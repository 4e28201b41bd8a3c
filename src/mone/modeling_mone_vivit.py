# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""MoNE for video: the factorised encoder of ViViT with nested experts in its spatial encoder (section 4.4).

Tubelets of a few frames become tokens. A spatial encoder lets the tokens of one temporal index attend to one another:
this is where MoNE routes, frame by frame, with the layers of the image model. Its pooled outputs, one token per
index, go through a temporal encoder at full width. This is Model 2 of "ViViT: A Video Vision Transformer" (Arnab et
al., 2021); transformers' `VivitModel` is the unfactorised Model 1.

Axis letters:
    B  batch of clips
    F  frames, T temporal indices: T = F / tubelet_size[0]
    N  tokens of one temporal index; with class-token pooling each sequence is one longer
    D  width of the model
    E  experts, smallest first
    H  attention heads
    C, height, width  channels and pixels of a frame
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_mone import MoNEViViTConfig, as_pair
from .modeling_mone import (
    ClassifierMixin,
    EncoderOutput,
    MoNEImageClassifierOutput,
    MoNEModelOutput,
    MoNEPreTrainedModel,
    PositionedTokens,
    check_kwargs,
    check_pixel_values,
    make_classifier,
    make_layers,
    make_routers,
    nested_encoder,
    patch_grid,
    pool,
    restore_recorded,
    token_counts,
)


@dataclass
class MoNEViViTModelOutput(MoNEModelOutput):
    """
    Output of [`MoNEViViTModel`]. Everything is in the original order of the tokens.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, time, hidden_size)`):
            Tokens of the temporal encoder after its norm; its class token, where there is one, comes first.
        pooler_output (`torch.FloatTensor` of shape `(batch, hidden_size)`):
            Mean of these tokens, or the class token, by `config.pooling`.
        hidden_states (tuple of `torch.FloatTensor`, with `output_hidden_states=True`):
            Spatial encoder: its input and the output of each layer, `(batch, time, tokens, hidden_size)`.
        attentions (tuple of `torch.FloatTensor`, with `output_attentions=True`):
            Spatial encoder: weights of each layer, `(batch, time, heads, tokens, tokens)`.
        router_logits (tuple of `torch.FloatTensor`, with `output_router_logits=True`):
            One `(batch, time, patches, num_experts)` per router.
        expert_indices (tuple of `torch.LongTensor`, with `output_router_logits=True`):
            One `(batch, time, patches)` per router: the expert of every token, 0 = smallest.
        temporal_hidden_states (tuple of `torch.FloatTensor`, with `output_hidden_states=True`):
            Temporal encoder: the output of each layer, `(batch, time, hidden_size)`.
        temporal_attentions (tuple of `torch.FloatTensor`, with `output_attentions=True`):
            Temporal encoder: weights of each layer, `(batch, heads, time, time)`.
    """

    temporal_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    temporal_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class MoNEVideoClassifierOutput(MoNEImageClassifierOutput):
    """Output of [`MoNEViViTForVideoClassification`]: loss, logits, and the rest as in [`MoNEViViTModelOutput`]."""

    temporal_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    temporal_attentions: tuple[torch.FloatTensor, ...] | None = None


class MoNEViViTTubeletEmbeddings(nn.Module):
    """(B, F, C, height, width) -> (B, T, N, D): one token per tubelet."""

    def __init__(self, config: MoNEViViTConfig):
        super().__init__()
        tubelet_size = tuple(config.tubelet_size)
        self.projection = nn.Conv3d(
            config.num_channels, config.hidden_size, kernel_size=tubelet_size, stride=tubelet_size
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, frames, C, height, width) -> (B, T, N, D)."""
        return self.projection(pixel_values.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)


class MoNEViViTEmbeddings(nn.Module):
    """Tubelet embeddings. Positions belong to the encoders, since all temporal indices share the spatial ones."""

    def __init__(self, config: MoNEViViTConfig):
        super().__init__()
        self.patch_embeddings = MoNEViViTTubeletEmbeddings(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.patch_embeddings(pixel_values)


class MoNEViViTEncoder(PositionedTokens):
    """Positions, a class token where there is one, transformer layers, and the norm after them.

    Args:
        grid: of the tokens it is trained for.
        num_layers: its depth.
        routed: whether it has the config's routers; else it runs at full width.
    """

    run_layers = staticmethod(nested_encoder)

    def __init__(self, config: MoNEViViTConfig, grid: tuple[int, int], num_layers: int, routed: bool):
        super().__init__(config, grid)
        self.config = config
        self.routers = make_routers(config) if routed else nn.ModuleList()
        self.layers = make_layers(config, num_layers)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        tokens: torch.Tensor,
        grid: tuple[int, int],
        counts: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EncoderOutput:
        """(B, N, D) -> (B, num_prefix + N, D) after the norm, and what `nested_encoder` returns."""
        tokens = self.add_positions(tokens, grid)
        output = self.run_layers(
            self.config, self.layers, self.routers, tokens, self.num_prefix, counts, generator, **kwargs
        )
        output.last_hidden_state = self.layernorm(output.last_hidden_state)
        return output


class MoNEViViTPreTrainedModel(MoNEPreTrainedModel):
    """What the video models have beyond [`MoNEPreTrainedModel`]."""

    config: MoNEViViTConfig
    base_model_prefix = "mone_vivit"
    input_modalities = ("video",)
    _no_split_modules = ["MoNEViViTEmbeddings", "MoNELayer"]
    _auto_map = {"AutoModel": "MoNEViViTModel", "AutoModelForVideoClassification": "MoNEViViTForVideoClassification"}


class MoNEViViTModel(MoNEViViTPreTrainedModel):
    """MoNE factorised video transformer without a head."""

    def __init__(self, config: MoNEViViTConfig):
        super().__init__(config)
        self.embeddings = MoNEViViTEmbeddings(config)
        grid = patch_grid(config, as_pair(config.image_size))
        self.spatial = MoNEViViTEncoder(config, grid, config.num_hidden_layers, routed=True)
        self.temporal = MoNEViViTEncoder(
            config, (1, config.num_temporal_indices), config.num_temporal_layers, routed=False
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        capacity: float | list[float] | tuple[float, ...] | None = None,
        interpolate_pos_encoding: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoNEViViTModelOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, num_frames, num_channels, height, width)`):
                Clips, as a video processor makes them.
            capacity (`float` or sequence of `float`, *optional*, defaults to `config.capacity`):
                Of the spatial encoder: effective capacity in [1 / 2**(E-1), 1], or E shares of the tokens, smallest
                expert first, that sum to 1. Each temporal index is routed for itself. 1.0 is the dense model.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Take frames of another size than `config.image_size`.
            generator (`torch.Generator`, *optional*):
                Source of the scores of a random router.
            output_hidden_states, output_attentions, output_router_logits (`bool`, *optional*):
                Add these to the output. Attentions need `attn_implementation="eager"`.

        Raises:
            ValueError: `capacity` or `pixel_values` are not allowed.
            TypeError: an unknown keyword, such as a misspelt one.
        """
        check_kwargs(self, kwargs)
        config = self.config
        check_pixel_values(config, pixel_values, (config.num_frames, config.num_channels), interpolate_pos_encoding)
        with_router_outputs = kwargs.pop("output_router_logits", getattr(config, "output_router_logits", False))
        encoded = self._encode(pixel_values, capacity, generator, **kwargs, return_dict=True)

        # Recorded are the spatial encoder's input and layers, then the temporal encoder's layers.
        depth, clips = config.num_hidden_layers, (pixel_values.shape[0], -1)
        states, weights = encoded.hidden_states, encoded.attentions
        spatial_states, spatial_weights = restore_recorded(
            None if states is None else states[: depth + 1],
            None if weights is None else weights[:depth],
            encoded.token_orders,
        )

        def by_clip(tensors):  # (B * T, ...) -> (B, T, ...)
            return None if tensors is None else tuple(None if x is None else x.unflatten(0, clips) for x in tensors)

        return MoNEViViTModelOutput(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=pool(config, encoded.last_hidden_state),
            hidden_states=by_clip(spatial_states),
            temporal_hidden_states=None if states is None else states[depth + 1 :],
            attentions=by_clip(spatial_weights),
            temporal_attentions=None if weights is None else weights[depth:],
            router_logits=by_clip(encoded.router_logits) if with_router_outputs else None,
            expert_indices=by_clip(encoded.expert_indices) if with_router_outputs else None,
        )

    @capture_outputs(tie_last_hidden_states=False)
    def _encode(self, pixel_values, capacity, generator, **kwargs) -> EncoderOutput:
        """The temporal encoder's tokens after its norm, and the spatial encoder's orders and decisions."""
        grid = patch_grid(self.config, pixel_values.shape[-2:])
        counts = token_counts(self.config, capacity, grid[0] * grid[1])
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        tokens = self.embeddings(pixel_values)  # (B, T, N, D)
        output = self.spatial(tokens.flatten(0, 1), grid, counts, generator, **kwargs)
        pooled = pool(self.config, output.last_hidden_state).unflatten(0, tokens.shape[:2])  # (B, T, D)
        output.last_hidden_state = self.temporal(pooled, self.temporal.grid, **kwargs).last_hidden_state
        return output


class MoNEViViTForVideoClassification(ClassifierMixin, MoNEViViTPreTrainedModel):
    """MoNE factorised video transformer with a linear classifier on the pooled temporal tokens."""

    output_class = MoNEVideoClassifierOutput

    def __init__(self, config: MoNEViViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mone_vivit = MoNEViViTModel(config)
        self.classifier = make_classifier(config)
        self.post_init()


__all__ = ["MoNEViViTForVideoClassification", "MoNEViViTModel", "MoNEViViTPreTrainedModel"]
