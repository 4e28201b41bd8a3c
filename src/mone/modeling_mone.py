# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""MoNE vision transformer: "Mixture of Nested Experts: Adaptive Processing of Visual Tokens" (NeurIPS 2024).

One pre-norm ViT holds E nested experts: expert i works on the first d_i = D / 2**(E-i) features of every in- and
out-projection. A router ranks the tokens once, Expert Preferred Routing gives each expert a fixed number of them,
and the tokens are sorted by expert, largest first. From there on every expert is one block of rows, so that the
layers neither gather nor mask; the order is restored once, at the end. Inside the layers tokens come first and images
second, (N, B, D): this makes the blocks contiguous for every batch size (`nested_linear.py`). Where one expert has all
tokens, as at capacity 1.0, nothing is sorted, and images stay first.

Axis letters:
    B  batch
    N  patch tokens; class and register tokens, where there are any, lead the sequence and take the full model
    D  width of the model (hidden_size), d the width of an expert
    E  experts, smallest first
    H  attention heads
    C, height, width  channels and pixels of the image

The layers, their names and state-dict keys follow transformers' ViT (`models/vit/modeling_vit.py`).
"""

import difflib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import guard_scalar
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN, GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .capacity import relative_widths, resolve_capacity, tokens_per_expert
from .checkpoints import CheckpointMixin
from .configuration_mone import MoNEConfig, as_pair
from .nested_linear import (
    SHARED_ROWS,
    NestedIn,
    NestedOut,
    Slice,
    add_out,
    check_adapters,
    groups,
    is_traced,
    is_unhooked,
    is_untouched,
    is_watched,
    lay_out_for_inference,
    nested_in_together,
    widen,
)
from .packed_linear import Packable, PackedLinear
from .routing import Router
from .triton_linear import kernels_can_serve, normalise, project_in, project_out


@dataclass
class MoNEModelOutput(ModelOutput):
    """
    Output of [`MoNEModel`]. Everything is in the original order of the tokens.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, tokens, hidden_size)`):
            Tokens after the final layer norm (with `config.final_norm="tokens"`); class and register tokens, where
            there are any, come first.
        pooler_output (`torch.FloatTensor` of shape `(batch, hidden_size)`):
            Mean of the patch tokens, or the class token, by `config.pooling`, which may also put several side by
            side.
        hidden_states (tuple of `torch.FloatTensor`, with `output_hidden_states=True`):
            The embeddings and the output of each layer, shaped as `last_hidden_state`, before the final norm.
        attentions (tuple of `torch.FloatTensor`, with `output_attentions=True`):
            Attention weights of each layer, `(batch, heads, tokens, tokens)`.
        router_logits (tuple of `torch.FloatTensor`, with `output_router_logits=True`):
            One `(batch, patches, num_experts)` per router. A random router's are its scores.
        expert_indices (tuple of `torch.LongTensor`, with `output_router_logits=True`):
            One `(batch, patches)` per router: the expert of every patch, 0 = smallest.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    expert_indices: tuple[torch.LongTensor, ...] | None = None


@dataclass
class MoNEImageClassifierOutput(ModelOutput):
    """
    Output of [`MoNEForImageClassification`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, with `labels`):
            Classification or regression loss.
        logits (`torch.FloatTensor` of shape `(batch, num_labels)`):
            Scores before softmax or sigmoid.
        hidden_states, attentions, router_logits, expert_indices:
            As in [`MoNEModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    expert_indices: tuple[torch.LongTensor, ...] | None = None


# --- layers ----------------------------------------------------------------------------------------------------------


class MoNEAttention(Packable):
    """Self-attention over all tokens at full width D, whichever expert projects a token in and out."""

    def __init__(self, config: MoNEConfig):
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.scaling = self.head_dim**-0.5
        self.is_causal = False

        width = config.hidden_size
        self.q_proj = NestedIn(width, width, bias=config.qkv_bias)
        self.k_proj = NestedIn(width, width, bias=config.qkv_bias)
        self.v_proj = NestedIn(width, width, bias=config.qkv_bias)
        self.o_proj = NestedOut(width, width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        slices: tuple[Slice, ...],
        residual: torch.Tensor | None = None,
        in_kernels: bool = False,
        batch_first: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(N, B, D) -> update (N, B, d of the largest expert), and the attention weights (eager only).

        With `batch_first` all tensors are (B, N, ...), as in [`MoNELayer`]. With a `residual` (N, B, D), allowed only
        where no gradients are taken, the sum of both instead of the update. With `in_kernels` the projections run in
        those of `triton_linear`; the caller has checked that this is possible.
        """
        packs = None if residual is None else self.usable_packs(hidden_states)
        order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
        query, key, value = (
            x.unflatten(-1, (self.num_attention_heads, self.head_dim)).permute(order)
            for x in self._project_in(hidden_states, slices, packs, in_kernels)
        )  # (B, H, N, D / H) each
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if in_kernels and attention_interface is sdpa_attention_forward:
            # sdpa_attention_forward would copy the context into another memory layout; project_out reads it as it is.
            dropout = self.attention_dropout if self.training else 0.0
            context = nn.functional.scaled_dot_product_attention(query, key, value, None, dropout, scale=self.scaling)
            context = context.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(2)
            return self._project_out(context, slices, residual, packs, in_kernels), None
        context, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            None,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        context = context.flatten(2)  # (B, N, D)
        context = context if batch_first else context.transpose(0, 1)
        return self._project_out(context, slices, residual, packs, in_kernels), attn_weights

    def _project_in(self, x, slices, packs, in_kernels):
        """(N, B, D) -> queries, keys and values, (N, B, D) each."""
        modules = (self.q_proj, self.k_proj, self.v_proj)
        if in_kernels:
            return project_in(x, modules, slices).chunk(3, dim=-1)
        if packs is None:
            return nested_in_together(x, modules, slices)
        joined = x.new_empty(*x.shape[:2], 3 * x.shape[2])
        for start, stop, d in slices:
            joined[start:stop] = packs[0](x[start:stop], d)
        return joined.chunk(3, dim=-1)

    def _project_out(self, context, slices, residual, packs, in_kernels):
        """(N, B, D) -> the update (N, B, d of the largest expert); with a residual the sum of both, (N, B, D)."""
        if in_kernels:
            return project_out(context, self.o_proj, slices, residual)
        if residual is None:
            return self.o_proj(context, slices)
        if packs is None:
            return add_out(residual, context, self.o_proj, slices)
        total = residual.clone()
        for start, stop, d in slices:
            total[start:stop, :, :d] += packs[1](context[start:stop], d)
        return total

    def projections(self):
        return (self.q_proj, self.k_proj, self.v_proj), (self.o_proj,)


class MoNEMLP(Packable):
    """MLP whose hidden width is the same for every expert; only its input and output are nested."""

    def __init__(self, config: MoNEConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = NestedIn(config.hidden_size, config.intermediate_size)
        self.fc2 = NestedOut(config.intermediate_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        slices: tuple[Slice, ...],
        packs: tuple[PackedLinear, PackedLinear] | None = None,
    ) -> torch.Tensor:
        """(N, B, D) -> update (N, B, d of the largest expert among the slices). `packs` take a single slice."""
        if packs is not None:
            ((_, _, d),) = slices
            if self.is_gelu:
                return packs[1](packs[0](hidden_states, d, "gelu"), d)
            return packs[1](self.activation_fn(packs[0](hidden_states, d)), d)
        hidden_states = self.fc1(hidden_states, slices)
        if self.is_gelu and torch.is_grad_enabled() and is_untouched(self.fc2):
            return self.fc2(hidden_states, slices, after_gelu=True)
        # In place, so that it stays in the cache, unless a forward hook may have kept this tensor.
        if self.is_gelu and not (torch.is_grad_enabled() or is_traced() or self.fc1._forward_hooks):
            return self.fc2(torch.ops.aten.gelu_(hidden_states), slices)  # there is no public name
        return self.fc2(self.activation_fn(hidden_states), slices)

    @property
    def is_gelu(self) -> bool:
        """Whether the activation is the exact GELU, without hooks."""
        return type(self.activation_fn) is GELUActivation and is_unhooked(self.activation_fn)

    def add_in_kernels(
        self,
        residual: torch.Tensor,
        hidden_states: torch.Tensor,
        gate: torch.Tensor | None,
        slices: tuple[Slice, ...],
    ) -> torch.Tensor:
        """`residual + gate * self(hidden_states, slices)`, (N, B, D), into `residual`, where `kernels_can_serve`."""
        hidden_states = project_in(hidden_states, (self.fc1,), slices, gelu=self.is_gelu)
        if not self.is_gelu:
            hidden_states = self.activation_fn(hidden_states)
        return project_out(hidden_states, self.fc2, slices, residual, gate, in_place=True)

    def projections(self):
        return (self.fc1,), (self.fc2,)


class MoNELayer(GradientCheckpointingLayer):
    """One pre-norm transformer layer on tokens that are sorted by expert (Eq. 1).

    Args:
        config: of the model.
        drop_path: probability with which training skips the attention, or the MLP, of an example (stochastic depth).
    """

    def __init__(self, config: MoNEConfig, drop_path: float = 0.0):
        super().__init__()
        self.drop_path = drop_path
        self.attention = MoNEAttention(config)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MoNEMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        gate: torch.Tensor | None,
        feature_mask: torch.Tensor | None,
        slices: tuple[Slice, ...],
        batch_first: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """(N, B, D) -> (N, B, D).

        Args:
            hidden_states: (N, B, D).
            gate: (N, B, 1) factor of the MLP's update, None for 1.
            feature_mask: (N, B, D) of 0 and 1 where the experts are not slices (arg-max routing), else None.
            slices: the experts' tokens and widths.
            batch_first: all tensors are (B, N, ...), and the single slice is a range of images. For when all tokens
                have one expert: nothing is sorted, and nothing copied.
        """
        if feature_mask is not None or len(slices) > 1 or slices[0][2] < hidden_states.shape[-1]:
            check_adapters(*self.attention.children(), *self.mlp.children())
        watched = is_watched(self.attention) or is_watched(self.mlp)
        if feature_mask is None and not (torch.is_grad_enabled() or self.training or watched):
            return self._forward_in_place(hidden_states, gate, slices, batch_first, **kwargs)
        x = self.layernorm_before(hidden_states)
        x = x if feature_mask is None else x * feature_mask
        update, _ = self.attention(x, slices, batch_first=batch_first, **kwargs)
        hidden_states = self._residual(hidden_states, update, feature_mask, None, batch_first)
        x = self.layernorm_after(hidden_states)
        update = self.mlp(x if feature_mask is None else x * feature_mask, slices)
        return self._residual(hidden_states, update, feature_mask, gate, batch_first)

    def _forward_in_place(self, hidden_states, gate, slices, batch_first, **kwargs):
        """For inference: updates in place and one group of rows at a time.

        The wide hidden features are then still in the cache when fc2 reads them, and compilers find more to fuse.
        """
        if type(self.attention) is MoNEAttention and kernels_can_serve(
            hidden_states, slices, self.layernorm_before, *self.attention.children()
        ):
            x = normalise(hidden_states, self.layernorm_before, slices)
            kwargs["in_kernels"] = True  # which a replaced attention need not know
        else:
            x = self.layernorm_before(hidden_states)
        hidden_states, _ = self.attention(x, slices, residual=hidden_states, batch_first=batch_first, **kwargs)
        if type(self.mlp) is MoNEMLP and kernels_can_serve(
            hidden_states, slices, self.layernorm_after, self.mlp.fc1, self.mlp.fc2
        ):
            x = normalise(hidden_states, self.layernorm_after, slices)
            return self.mlp.add_in_kernels(hidden_states, x, gate, slices)
        x = self.layernorm_after(hidden_states)
        packs = self.mlp.usable_packs(x)
        for group in groups(slices, x.shape[1]) if packs is None else [(expert,) for expert in slices]:
            start, stop, width = group[0][0], group[-1][1], group[0][2]
            update = self.mlp(x[start:stop], tuple((i - start, j - start, d) for i, j, d in group), packs)
            target = hidden_states[start:stop, :, :width]
            if gate is None:
                target.add_(update)
            else:
                target.addcmul_(gate[start:stop], update)
        return hidden_states

    def _residual(self, hidden_states, update, feature_mask, gate, batch_first):
        """(N, B, D), (N, B, d) -> (N, B, D): the sum, after dropout, mask, gate and stochastic depth of the update."""
        update = widen(self.dropout(update), hidden_states.shape[-1])
        if feature_mask is not None:
            update = update * feature_mask
        gate = self._drop_path(gate, hidden_states, batch_first)
        return hidden_states + update if gate is None else torch.addcmul(hidden_states, gate, update)

    def _drop_path(self, gate, hidden_states, batch_first):
        """Stochastic depth, as a factor of the update, beside the gate."""
        if not self.training or self.drop_path == 0:
            return gate
        shape = (hidden_states.shape[0], 1, 1) if batch_first else (1, hidden_states.shape[1], 1)
        kept = torch.rand(shape, device=hidden_states.device) >= self.drop_path
        # Kept updates are scaled up, so that their expectation equals what evaluation computes.
        scale = (kept.to(hidden_states.dtype) / (1.0 - self.drop_path)).expand(*hidden_states.shape[:2], 1)
        return scale if gate is None else gate * scale


def make_layers(config: MoNEConfig, num_layers: int) -> nn.ModuleList:
    """The layers of an encoder; stochastic depth grows linearly from 0 in the first to its rate in the last."""
    rates = [config.drop_path_rate * index / max(1, num_layers - 1) for index in range(num_layers)]
    return nn.ModuleList([MoNELayer(config, rate) for rate in rates])


# --- encoder with routers -------------------------------------------------------------------------------------------


@dataclass
class EncoderOutput(ModelOutput):
    """What `nested_encoder` returns; recorded layer outputs are added to it by `capture_outputs`."""

    last_hidden_state: torch.FloatTensor | None = None
    token_orders: tuple[torch.LongTensor | None, ...] | None = None
    """For each layer, the (B, sequence) order of its tokens, or None for the original one, images first."""
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    expert_indices: tuple[torch.LongTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def as_constant(value):
    """A number, or a sequence of numbers, as a constant of the graph.

    Dynamo would turn it into a symbol when it sees a second value.
    """
    if not torch.compiler.is_compiling():
        return value
    if isinstance(value, (list, tuple)):
        return tuple(as_constant(number) for number in value)
    is_number = isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
    return guard_scalar(value) if is_number else value


# Dynamo cannot trace SciPy. The counts are constants of the graph, of which each capacity has its own.
@torch.compiler.assume_constant_result
def _constant_counts(capacity, num_experts: int, delta: float, beta: float, num_tokens: int) -> tuple[int, ...]:
    return tokens_per_expert(resolve_capacity(capacity, num_experts, delta, beta), num_tokens)


def token_counts(config: MoNEConfig, capacity, num_tokens: int) -> tuple[int, ...]:
    """Tokens of every expert, smallest first, for a call's `capacity` (`None`: the config's) and N tokens."""
    arguments = (
        config.capacity if capacity is None else capacity,
        *(config.num_experts, config.capacity_delta, config.capacity_beta, num_tokens),
    )
    return _constant_counts(*[as_constant(argument) for argument in arguments])


def nested_encoder(
    config: MoNEConfig,
    layers: nn.ModuleList,
    routers: nn.ModuleList,
    hidden_states: torch.Tensor,
    num_prefix: int,
    counts: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> EncoderOutput:
    """Run `layers`, with `routers` before those in `config.router_layers`; without routers at full width.

    Args:
        hidden_states: (B, num_prefix + N, D).
        num_prefix: tokens that lead the sequence, are not routed and take the full model (a class token).
        counts: E integers, smallest expert first, that sum to N.
        generator: source of random routers' scores.

    Returns:
        The tokens before the final norm in original order, and the routers' decisions.

    Raises:
        ValueError: `config.router_type` was changed after the routers were made.
    """
    for router in routers:
        if router.router_type != config.router_type:
            raise ValueError(
                f"config.router_type={config.router_type!r}, but this model's routers are {router.router_type!r}: "
                f"another kind takes from_pretrained(..., router_type={config.router_type!r}, "
                "ignore_mismatched_sizes=True)."
            )
    routers = dict(zip(config.router_layers, routers, strict=True)) if len(routers) else {}
    batch = hidden_states.shape[0]
    slices = ((0, batch, config.hidden_size),)
    order, gate, feature_mask = None, None, None
    orders, router_logits, expert_indices = [], [], []
    tokens = hidden_states.contiguous()  # the layers' outputs take its memory layout
    for index, layer in enumerate(layers):
        if index in routers:
            tokens = restore_order(tokens, order)
            routing = routers[index](tokens[:, num_prefix:], counts, generator)
            router_logits.append(routing.logits)
            expert_indices.append(routing.experts)
            gate = routing.gate
            if gate is not None and num_prefix:
                gate = nn.functional.pad(gate, (0, 0, num_prefix, 0), value=1.0)
            order = None
            if config.router_type == "argmax":
                feature_mask = expert_feature_mask(config, routing.experts, num_prefix, hidden_states.dtype)
            else:
                slices = expert_slices(config, counts, num_prefix)
                if len(slices) > 1:
                    order = expert_order(routing.experts, num_prefix)
                else:
                    slices = ((0, batch, slices[0][2]),)
            tokens = take_tokens(tokens, order)
            gate = None if gate is None else take_tokens(gate, order)
        orders.append(order)
        tokens = layer(tokens, gate, feature_mask, slices, batch_first=order is None, **kwargs)
    return EncoderOutput(
        last_hidden_state=restore_order(tokens, order),
        token_orders=tuple(orders),
        router_logits=tuple(router_logits),
        expert_indices=tuple(expert_indices),
    )


def expert_widths(config: MoNEConfig) -> list[int]:
    """d of every expert, smallest first."""
    return [int(config.hidden_size * width) for width in relative_widths(config.num_experts)]


def expert_slices(config: MoNEConfig, counts: tuple[int, ...], num_prefix: int) -> tuple[Slice, ...]:
    """Contiguous slices of a sequence sorted by expert, largest first. Experts without tokens have none."""
    slices, start = [], 0
    for expert in reversed(range(config.num_experts)):
        # The prefix runs at full width: it extends the largest expert's slice.
        stop = start + counts[expert] + (num_prefix if expert == config.num_experts - 1 else 0)
        if stop > start:
            slices.append((start, stop, expert_widths(config)[expert]))
        start = stop
    return tuple(slices)


def expert_order(experts: torch.Tensor, num_prefix: int) -> torch.Tensor:
    """(B, N) experts -> (B, num_prefix + N) positions that sort the sequence by expert, largest first, stably."""
    order = experts.sort(dim=1, descending=True, stable=True).indices
    if num_prefix == 0:
        return order
    prefix = torch.arange(num_prefix, device=order.device).expand(order.shape[0], -1)
    return torch.cat([prefix, order + num_prefix], dim=1)


def expert_feature_mask(
    config: MoNEConfig, experts: torch.Tensor, num_prefix: int, dtype: torch.dtype
) -> torch.Tensor:
    """(B, N) experts -> (B, num_prefix + N, D), 1 for the features that a token's expert works on.

    Zeroing the input of a full projection has the effect of slicing it, and zeroing its output that of padding the
    slice: the paper's Extract and Pad, at the dense model's cost. Arg-max routing needs it, since its experts have no
    fixed number of tokens.
    """
    last = config.num_experts - 1
    experts = nn.functional.pad(experts, (num_prefix, 0), value=last)
    widths = config.hidden_size >> (last - experts)
    features = torch.arange(config.hidden_size, device=experts.device)
    return (features < widths.unsqueeze(-1)).to(dtype)


def take_tokens(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Reorder the tokens and put them first: (B, N, ...) -> (N, B, ...), with x[b, order[b, n]] at [n, b].

    Without an order, x itself, batch first.
    """
    if order is None:
        return x
    batch, length = x.shape[:2]
    # The layers of one model may lie on several devices; the order stays where its router is.
    rows = order.to(x.device).t() + length * torch.arange(batch, device=x.device)
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (length, batch))


def restore_order(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Undo `take_tokens`: (N, B, ...) -> (B, N, ...)."""
    if order is None:
        return x
    length, batch = x.shape[:2]
    rows = batch * order.to(x.device).argsort(dim=1) + torch.arange(batch, device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (batch, length))


def restore_recorded(
    hidden_states: tuple[torch.Tensor | None, ...] | None,
    attentions: tuple[torch.Tensor, ...] | None,
    orders: tuple[torch.Tensor | None, ...],
) -> tuple[tuple[torch.Tensor | None, ...] | None, tuple[torch.Tensor, ...] | None]:
    """Put what `capture_outputs` recorded inside the layers back into the original order of the tokens.

    Args:
        hidden_states: the input of the first layer and the output of each; None where one was not asked for.
        attentions: (B, H, N, N) of each layer; empty where the attention implementation gives no weights.
        orders: `EncoderOutput.token_orders`.
    """
    if hidden_states is not None:
        hidden_states = tuple(
            None if x is None else restore_order(x, order)
            for x, order in zip(hidden_states, (orders[0], *orders), strict=True)
        )
    if attentions:
        attentions = tuple(
            # (B, H, query, key): restore the queries, then the keys.
            restore_order(restore_order(x.permute(2, 0, 1, 3), order).permute(3, 0, 1, 2), order).permute(0, 3, 2, 1)
            if order is not None
            else x
            for x, order in zip(attentions, orders, strict=True)
        )
    return hidden_states, attentions


# --- models ---------------------------------------------------------------------------------------------------------


class MoNEPatchEmbeddings(nn.Module):
    """(B, C, height, width) -> (B, N, D): one token per patch."""

    def __init__(self, config: MoNEConfig):
        super().__init__()
        patch_size = as_pair(config.patch_size)
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width) -> (B, N, D)."""
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class PositionedTokens(nn.Module):
    """Learned positions of a grid of tokens, and the class and register tokens that lead it, where there are any."""

    def __init__(self, config: MoNEConfig, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.num_prefix = config.num_prefix_tokens
        self.antialias = config.position_antialias
        width, registers = config.hidden_size, config.num_register_tokens
        self.num_cls = self.num_prefix - registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if self.num_cls else None
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.num_cls + grid[0] * grid[1], width))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def add_positions(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, N, D) -> (B, num_prefix + N, D). Positions are interpolated for another grid than the model's."""
        batch = tokens.shape[0]
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(batch, -1, -1), tokens], dim=1)
        tokens = tokens + self.interpolate_positions(grid)
        if self.register_tokens is not None:
            cls_token, patches = tokens.tensor_split([self.num_cls], dim=1)
            tokens = torch.cat([cls_token, self.register_tokens.expand(batch, -1, -1), patches], dim=1)
        return self.norm(self.dropout(tokens))

    def interpolate_positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """(1, num_cls + N, D) positions for a grid of (rows, columns), bicubic as in transformers' ViT."""
        if grid == self.grid:
            return self.position_embeddings
        return resize_positions(self.position_embeddings, self.grid, grid, self.antialias)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Interpolate the positions for a grid of (rows, columns) once and for all."""
        self.position_embeddings = nn.Parameter(self.interpolate_positions(grid).detach().clone())
        self.grid = grid


def resize_positions(
    positions: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int], antialias: bool
) -> torch.Tensor:
    """(1, P + N, D) -> (1, P + N', D): the positions of a grid of (rows, columns), interpolated for another grid.

    Args:
        positions: P that stay as they are, such as a class token's, before the N of `grid`.
        grid, new_grid: (rows, columns), of N and N' patches.
        antialias: filter when the new grid is smaller.
    """
    cls_token, patches = positions.tensor_split([positions.shape[1] - grid[0] * grid[1]], dim=1)
    patches = patches.unflatten(1, grid).permute(0, 3, 1, 2)
    # float32: bicubic interpolation lacks half-precision kernels on some devices.
    patches = nn.functional.interpolate(
        patches.float(), size=new_grid, mode="bicubic", align_corners=False, antialias=antialias
    )
    return torch.cat([cls_token, patches.flatten(2).transpose(1, 2).to(cls_token.dtype)], dim=1)


class MoNEEmbeddings(PositionedTokens):
    """Patch and position embeddings, class and register tokens."""

    def __init__(self, config: MoNEConfig):
        super().__init__(config, patch_grid(config, as_pair(config.image_size)))
        self.patch_embeddings = MoNEPatchEmbeddings(config)

    def forward(self, pixel_values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, C, height, width) -> (B, num_prefix + N, D)."""
        return self.add_positions(self.patch_embeddings(pixel_values), grid)


def patch_grid(config: MoNEConfig, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of patches in an image of `size` (height, width) pixels."""
    patch_size = as_pair(config.patch_size)
    return (size[0] // patch_size[0], size[1] // patch_size[1])


def check_pixel_values(
    config: MoNEConfig, pixel_values: torch.Tensor | None, fixed: tuple[int, ...], interpolate_pos_encoding: bool
) -> None:
    """Raise ValueError for `pixel_values` that are not (batch, *fixed, height, width) of a size the model takes."""
    image_size, patch_size = as_pair(config.image_size), as_pair(config.patch_size)
    expected = f"(batch, {', '.join(str(n) for n in (*fixed, *image_size))})"
    if pixel_values is None:
        raise ValueError(f"pixel_values is missing; expected a float tensor of shape {expected}.")
    shape = tuple(pixel_values.shape)
    if len(shape) != len(fixed) + 3 or shape[1:-2] != fixed:
        several = " Average the logits of several clips, as the pipeline does." if len(shape) == 6 else ""
        raise ValueError(f"pixel_values of shape {shape}; expected {expected}.{several}")
    height, width = shape[-2:]
    if interpolate_pos_encoding:
        if any(s < p or s % p for s, p in zip((height, width), patch_size, strict=True)):
            raise ValueError(
                f"Image size {height}x{width} must be a positive multiple of the patch size "
                f"{patch_size[0]}x{patch_size[1]}."
            )
    elif (height, width) != image_size:
        raise ValueError(
            f"Image size {height}x{width} differs from the model's {image_size[0]}x{image_size[1]}. "
            "Resize the images, or pass interpolate_pos_encoding=True."
        )


class MoNEPreTrainedModel(CheckpointMixin, PreTrainedModel):
    """Weight initialisation and capabilities that the MoNE models share."""

    config: MoNEConfig
    base_model_prefix = "mone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoNEEmbeddings", "MoNELayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MoNELayer, "attentions": MoNEAttention}
    _input_embed_layer = "patch_embeddings"
    # Classes of this file, for the Auto classes that load a saved folder without the package.
    _auto_map = {"AutoModel": "MoNEModel", "AutoModelForImageClassification": "MoNEForImageClassification"}

    def __init__(self, config: MoNEConfig, *args, **kwargs):
        config.check()  # fields may have been set since it was made, as from_pretrained does
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PositionedTokens):
            init.trunc_normal_(module.position_embeddings, mean=0.0, std=self.config.initializer_range)
            for token in (module.cls_token, module.register_tokens):
                if token is not None:
                    init.trunc_normal_(token, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, Router) and module.router_type != "random":
            init.zeros_(module.alpha)

    def optimize_for_inference(self):
        """Lay the weights out for the matrix products of the experts on a CPU, and go to eval mode.

        The outputs stay the same at every capacity and batch size, to rounding, and so do saved files.
        In float32, and in bfloat16 where the CPU supports it, weights are copied and packed for every expert; for four
        experts the copies take 1.9 times the memory of the layers. Small batches use the copies or the weights, stored
        input by input, whichever a short measurement finds faster on this machine. `train()` undoes both. After other
        weights are loaded, or the dtype changes, the copies are not used: call this again. (A change of a few weights
        through `.data` goes unnoticed.) Weights in shared memory, or views of a flat buffer, become tensors of their
        own.

        Returns:
            The model itself.
        """
        widths = expert_widths(self.config)
        # Weights made under inference mode could not be trained on.
        with torch.inference_mode(False):
            for module in self.eval().modules():
                if isinstance(module, (NestedIn, NestedOut)):
                    lay_out_for_inference(module)
            packables = [module for module in self.modules() if isinstance(module, Packable)]
            for module in packables:
                module.pack(widths)
        if all(module.packed is not None for module in packables):
            few_rows = packs_win_with_few_rows(self)
            for module in packables:
                module.packed_for_few_rows = few_rows
        return self

    def project_alpha_(self) -> None:
        """Put every router's alpha back into [0, 1). Call it after each optimiser step (MoNETrainer does)."""
        for module in self.modules():
            if isinstance(module, Router):
                module.project_alpha_()


@torch.no_grad()
def packs_win_with_few_rows(model: PreTrainedModel) -> bool:
    """Whether packed weights make the layers faster at few rows, as of one image. Times both."""
    config, tokens = model.config, SHARED_ROWS // 2
    slices = expert_slices(config, tokens_per_expert((1 / config.num_experts,) * config.num_experts, tokens), 0)
    x = torch.zeros(tokens, 1, config.hidden_size, dtype=model.dtype)
    layers = [module for module in model.modules() if isinstance(module, MoNELayer)]
    seconds = {False: [], True: []}
    # All layers in turn, so that weights come from memory and not from the cache, as in use.
    for packed, times in [*seconds.items()] * 3:
        for layer in layers:
            layer.attention.packed_for_few_rows = layer.mlp.packed_for_few_rows = packed
        start = time.perf_counter()
        for layer in layers:
            layer(x, None, None, slices)
        times.append(time.perf_counter() - start)
    return min(seconds[True]) < min(seconds[False])


# Keywords of transformers that make sense here; others, such as `is_causal`, would act on the sorted order.
FORWARD_KEYWORDS = (
    "num_items_in_batch",
    "output_hidden_states",
    "output_attentions",
    "output_router_logits",
    "return_dict",
)


def check_kwargs(model: nn.Module, kwargs: dict) -> None:
    """Raise TypeError for a keyword that a forward does not know; transformers would swallow it silently."""
    for name in kwargs:
        if name not in FORWARD_KEYWORDS:
            close = difflib.get_close_matches(name, ["capacity", "generator", *FORWARD_KEYWORDS], 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{type(model).__name__}.forward() got an unexpected keyword argument {name!r}.{hint}")


class MoNEModel(MoNEPreTrainedModel):
    """MoNE vision transformer without a head."""

    run_layers = staticmethod(nested_encoder)

    def __init__(self, config: MoNEConfig):
        super().__init__(config)
        self.embeddings = MoNEEmbeddings(config)
        self.routers = make_routers(config)
        self.layers = make_layers(config, config.num_hidden_layers)
        has_norm = config.final_norm != "none"
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        capacity: float | list[float] | tuple[float, ...] | None = None,
        interpolate_pos_encoding: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoNEModelOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, num_channels, height, width)`):
                Images, as an image processor makes them.
            capacity (`float` or sequence of `float`, *optional*, defaults to `config.capacity`):
                Effective capacity in [1 / 2**(E-1), 1], or E shares of the tokens, smallest expert first, that sum
                to 1. 1.0 is the dense model.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Take images of another size than `config.image_size`.
            generator (`torch.Generator`, *optional*):
                Source of the scores of a random router.
            output_hidden_states, output_attentions, output_router_logits (`bool`, *optional*):
                Add these to the output. Attentions need `attn_implementation="eager"`.

        Raises:
            ValueError: `capacity` or `pixel_values` are not allowed.
            TypeError: an unknown keyword, such as a misspelt one.
        """
        check_kwargs(self, kwargs)
        check_pixel_values(self.config, pixel_values, (self.config.num_channels,), interpolate_pos_encoding)
        with_router_outputs = kwargs.pop("output_router_logits", getattr(self.config, "output_router_logits", False))
        encoded = self._encode(pixel_values, capacity, generator, **kwargs, return_dict=True)
        hidden_states, attentions = restore_recorded(encoded.hidden_states, encoded.attentions, encoded.token_orders)
        last_hidden_state = encoded.last_hidden_state
        if self.config.final_norm == "tokens":
            last_hidden_state = self.layernorm(last_hidden_state)
        pooled = pool(self.config, last_hidden_state)
        if self.config.final_norm == "pooled":
            pooled = self.layernorm(pooled.unflatten(-1, (-1, self.config.hidden_size))).flatten(1)
        return MoNEModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=pooled,
            hidden_states=hidden_states,
            attentions=attentions,
            router_logits=encoded.router_logits if with_router_outputs else None,
            expert_indices=encoded.expert_indices if with_router_outputs else None,
        )

    @capture_outputs(tie_last_hidden_states=False)
    def _encode(self, pixel_values, capacity, generator, **kwargs) -> EncoderOutput:
        grid = patch_grid(self.config, pixel_values.shape[-2:])
        counts = token_counts(self.config, capacity, grid[0] * grid[1])
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(pixel_values, grid)
        return self.run_layers(
            self.config,
            self.layers,
            self.routers,
            hidden_states,
            self.embeddings.num_prefix,
            counts,
            generator,
            **kwargs,
        )


def make_routers(config: MoNEConfig) -> nn.ModuleList:
    """One router for each of `config.router_layers`."""
    return nn.ModuleList(
        [Router(config.hidden_size, config.num_experts, config.router_type) for _ in config.router_layers]
    )


def pool(config: MoNEConfig, tokens: torch.Tensor) -> torch.Tensor:
    """(B, num_prefix + N, D) -> (B, D), by `config.pooling`, or (B, several times D)."""
    if config.pooling == "cls":
        return tokens[:, 0]
    if config.pooling == "cls_registers":
        return tokens[:, : config.num_prefix_tokens].flatten(1)
    mean = tokens[:, config.num_prefix_tokens :].mean(dim=1)
    return mean if config.pooling == "mean" else torch.cat([tokens[:, 0], mean], dim=-1)


class ClassifierMixin:
    """The forward of a classifier: a linear layer on the pooled tokens of `base_model`, and its loss."""

    output_class: type[ModelOutput]

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        capacity: float | list[float] | tuple[float, ...] | None = None,
        interpolate_pos_encoding: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        r"""
        Args:
            labels (`torch.Tensor` of shape `(batch,)`, or `(batch, num_labels)` for several labels, *optional*):
                Targets of the loss that `config.problem_type` names: class numbers or `(batch, num_labels)`
                probabilities, as mixup makes them (single label), floating 0 and 1 (multi label), or values
                (regression).
            pixel_values, capacity, interpolate_pos_encoding, generator and the outputs:
                As in the model without a head.

        Raises:
            ValueError, TypeError: as in the model without a head.
        """
        check_kwargs(self, kwargs)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs = self.base_model(
            pixel_values,
            capacity=capacity,
            interpolate_pos_encoding=interpolate_pos_encoding,
            generator=generator,
            **kwargs,
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else classification_loss(self, logits, labels, num_items_in_batch)
        recorded = {k: v for k, v in outputs.items() if k not in ("last_hidden_state", "pooler_output")}
        return self.output_class(loss=loss, logits=logits, **recorded)


class MoNEForImageClassification(ClassifierMixin, MoNEPreTrainedModel):
    """MoNE vision transformer with a linear classifier on the pooled tokens."""

    output_class = MoNEImageClassifierOutput

    def __init__(self, config: MoNEConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mone = MoNEModel(config)
        self.classifier = make_classifier(config)
        self.post_init()


def make_classifier(config: MoNEConfig) -> nn.Module:
    """(B, pooled_size) -> (B, num_labels), or as they are without labels, as in transformers' ViT."""
    return nn.Linear(config.pooled_size, config.num_labels) if config.num_labels > 0 else nn.Identity()


def classification_loss(
    model: PreTrainedModel, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """The loss of `config.problem_type`, exact under gradient accumulation.

    With `num_items_in_batch` (labels in all micro-batches of a step, as Trainer counts them) the losses of the
    micro-batches sum to the loss of the whole batch. transformers does so for single-label losses only.

    Args:
        model: its config says which loss.
        logits: (B, num_labels).
        labels: (B,) class numbers, or values of one label; (B, num_labels) probabilities, 0 and 1, or values.
        num_items_in_batch: see above; None for the mean over this batch.

    Returns:
        The loss, a scalar of shape ().
    """
    if model.config.problem_type == "single_label_classification" and labels.is_floating_point():
        loss = nn.functional.cross_entropy(logits, labels.to(logits))  # transformers' takes class numbers only
    else:
        loss = model.loss_function(labels, logits, model.config, num_items_in_batch=num_items_in_batch)
        if model.config.problem_type == "single_label_classification":
            return loss
    return loss if num_items_in_batch is None else loss * (labels.numel() / num_items_in_batch)


__all__ = ["MoNEForImageClassification", "MoNEModel", "MoNEPreTrainedModel"]
