# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Linear layers of which every nested expert uses a part (paper, section 3.1).

An in-projection reads the first d features of an expert's tokens, with the first d columns of its weight; an
out-projection writes the first d features, with the first d rows.

Tokens lie token by token and not image by image, (N, B, D), sorted by expert, largest first. So each expert's tokens
are one block of rows in memory; and the tokens that have a given feature, those of experts wide enough for it, are the
first rows. A projection is then a few matrix products that read their operands where they are and write their results
where they belong: nothing is copied or masked.

Axis letters: N tokens, B batch, D width of the model, d width of an expert, I and O input and output features; R rows
of a flattened (N * B, features) matrix.
"""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)


# The tokens start..stop of a sorted sequence that one expert processes, and that expert's width d. Largest first.
Slice = tuple[int, int, int]

_HOOKS_OF_ALL_MODULES = (
    *(_global_forward_hooks, _global_forward_pre_hooks),
    *(_global_backward_hooks, _global_backward_pre_hooks),
)

# Up to this many rows, experts share matrix products. See `blocks`.
SHARED_ROWS = 400


class NestedIn(nn.Linear):
    """In-projection: token n of an expert of width d becomes `weight[:, :d] x[n, :d] + bias`."""

    def forward(self, x: torch.Tensor, slices: tuple[Slice, ...]) -> torch.Tensor:
        """(N, B, D) -> (N, B, O); of an expert's tokens only the first d features are read."""
        return nested_in(x, self.weight, self.bias, slices)


class NestedOut(nn.Linear):
    """Out-projection: the first d features of an expert's tokens are `weight[:d] x[n] + bias[:d]`, the rest 0."""

    def forward(self, x: torch.Tensor, slices: tuple[Slice, ...], after_gelu: bool = False) -> torch.Tensor:
        """(N, B, I) -> (N, B, d of the largest expert among the slices).

        Args:
            x: need not be contiguous. This very tensor is kept for the gradients, and no contiguous copy.
            after_gelu: project GELU(x), which is not kept for the gradients but computed again.
        """
        if is_traced() or not is_plain(self.weight):
            return _plain_out(x, self.weight, self.bias, slices, after_gelu)
        x, weight, bias = _autocast(x, self.weight, self.bias)
        if not torch.is_grad_enabled():
            return expand(_projected(x, after_gelu), weight.t(), bias, slices, slices[0][2])
        return _NestedOut.apply(x, weight, bias, slices, after_gelu)


def nested_in(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, slices: tuple[Slice, ...]
) -> torch.Tensor:
    """What [`NestedIn`] computes: (N, B, D), (O, D) -> (N, B, O)."""
    if len(slices) == 1 and slices[0][2] == weight.shape[1]:
        return nn.functional.linear(x, weight, bias)
    if is_traced() or not is_plain(weight):
        return _plain_in(x, weight, bias, slices)
    x, weight, bias = _autocast(x, weight, bias)
    if not torch.is_grad_enabled():
        return contract(x, weight.t(), bias, slices)
    return _NestedIn.apply(x, weight, bias, slices)


def nested_in_together(
    x: torch.Tensor, modules: tuple[NestedIn, ...], slices: tuple[Slice, ...]
) -> tuple[torch.Tensor, ...]:
    """(N, B, D) -> (N, B, O) for each of these projections of one input; all have a bias, or none.

    In training, where joining their weights costs little, they run as one: fewer and larger products, and one gradient
    of the input instead of several to add up.
    """
    if not modules[0].training or is_traced() or not all(is_untouched(module) for module in modules):
        return tuple(module(x, slices) for module in modules)
    weight = torch.cat([module.weight for module in modules])
    bias = None if modules[0].bias is None else torch.cat([module.bias for module in modules])
    return nested_in(x, weight, bias, slices).chunk(len(modules), dim=-1)


def add_out(residual: torch.Tensor, x: torch.Tensor, module: NestedOut, slices: tuple[Slice, ...]) -> torch.Tensor:
    """(N, B, D), (N, B, I) -> (N, B, D): `residual` and what the out-projection makes of x; only without gradients."""
    if is_untouched(module) and not is_traced() and not _autocasts(x.device):
        return add_expanded(residual, x.contiguous(), module.weight.t(), module.bias, slices)
    return residual + widen(module(x, slices), residual.shape[-1])


def lay_out_for_inference(module: NestedIn | NestedOut) -> None:
    """Store the weight input by input: the same values and shape, in another memory layout.

    An expert's part of an in-projection is then contiguous, and small products are faster for both kinds.
    """
    if is_plain(module.weight) and not module.weight.is_inference():
        module.weight.data = module.weight.data.t().contiguous().t()


def widen(update: torch.Tensor, width: int) -> torch.Tensor:
    """(N, B, d) -> (N, B, width), with zeros for the features of larger experts, which have no tokens."""
    missing = width - update.shape[-1]
    return nn.functional.pad(update, (0, missing)) if missing else update


def check_adapters(*modules: nn.Module) -> None:
    """Raise TypeError if an expert other than the largest would run PEFT's adapters, which read all features."""
    for module in modules:
        if "base_layer" in module._modules and not (module.merged or module.disable_adapters):
            raise TypeError(
                "PEFT adapters are not nested: below capacity 1.0 an unmerged adapter would compute something else "
                "than after merging. Train and run them at capacity=1.0, or merge them first (merge_and_unload)."
            )


# What of a module others may have changed: `is_plain` asks for its weight, `is_unhooked` for what a call runs,
# `is_untouched` for both and its class. `is_watched` is for a module of ours that holds others.


def is_untouched(module: nn.Module) -> bool:
    """Whether the projection or norm has no hooks and was not replaced, as by an adapter, nor its weight quantised."""
    return type(module) in (NestedIn, NestedOut, nn.LayerNorm) and is_plain(module.weight) and is_unhooked(module)


def is_plain(weight: torch.Tensor | None) -> bool:
    """Whether the weight is an ordinary tensor; types of quantised ones may know only linear layers and slices."""
    return type(weight) in (nn.Parameter, torch.Tensor)


def is_unhooked(module: nn.Module) -> bool:
    """Whether a call runs the `forward` of the module's class, which Accelerate's hooks replace, and nothing else."""
    own_hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in module.__dict__ and not any(own_hooks) and not any(_HOOKS_OF_ALL_MODULES)


def is_watched(module: nn.Module) -> bool:
    """Whether a hook sees what the module reads or computes, or its `forward` was replaced.

    transformers' own hooks do not count: they only record outputs, and stay once they are there.
    """
    if "forward" in module.__dict__:
        return True
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


def is_traced() -> bool:
    """Whether a compiler traces the model: it plans memory itself, and gets the same products as plain operators."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # meta has no autocast


def _autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast operands as autocast does those of linear layers; it cannot tell that these are some."""
    device = tensors[0].device
    if not _autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def groups(slices: tuple[Slice, ...], batch: int) -> list[tuple[Slice, ...]]:
    """Groups of consecutive slices that share products, each of up to `SHARED_ROWS` rows or of one slice."""
    if is_traced():  # one graph may serve all batch sizes
        return [(expert,) for expert in slices]
    found = [[slices[0]]]
    for expert in slices[1:]:
        if (expert[1] - found[-1][0][0]) * batch <= SHARED_ROWS:
            found[-1].append(expert)
        else:
            found.append([expert])
    return [tuple(group) for group in found]


@functools.lru_cache(maxsize=1024)
def blocks(slices: tuple[Slice, ...], batch: int) -> list[tuple[int, int, int, int]]:
    """Row ranges and feature ranges (start, stop, low, high) of which the slices consist, without overlap.

    Each block is a range of rows and the features that all of them have. The first covers all rows of a group and the
    smallest expert's features; the next all rows but the smallest expert's and the features that the next larger
    expert adds; and so on. With few rows this reads every weight once and makes larger products than one for each
    expert would be; with many rows it would write the results of an in-projection more often.
    """
    found = []
    for group in groups(slices, batch):
        low = 0
        for _, stop, high in reversed(group):
            found.append((group[0][0] * batch, stop * batch, low, high))
            low = high
    return found


def contract(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, slices: tuple[Slice, ...]
) -> torch.Tensor:
    """(N, B, D), (D, O) -> (N, B, O): `x[n, :d] matrix[:d] + bias` for every token n of an expert of width d."""
    y = x.new_empty(*x.shape[:2], matrix.shape[1])
    inputs, outputs = x.flatten(0, 1), y.flatten(0, 1)
    for start, stop, low, high in blocks(slices, x.shape[1]):
        rows, part = inputs[start:stop, low:high], matrix[low:high]
        out = outputs[start:stop]
        if low == 0 and bias is None:
            torch.mm(rows, part, out=out)
        else:
            torch.addmm(bias if low == 0 else out, rows, part, out=out)
    return y


def expand(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, slices: tuple[Slice, ...], width: int
) -> torch.Tensor:
    """(N, B, I), (I, D) -> (N, B, width): `x[n] matrix[:, :d] + bias[:d]` for an expert of width d, and then zeros."""
    y = x.new_empty(*x.shape[:2], width)
    inputs, outputs = x.flatten(0, 1), y.flatten(0, 1)
    for start, stop, low, high in blocks(slices, x.shape[1]):
        rows, part, out = inputs[start:stop], matrix[:, low:high], outputs[start:stop, low:high]
        if bias is None:
            torch.mm(rows, part, out=out)
        else:
            torch.addmm(bias[low:high], rows, part, out=out)
    for start, stop, d in slices:
        if d < width:
            y[start:stop, :, d:].zero_()
    return y


def add_expanded(
    residual: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor, slices: tuple[Slice, ...]
) -> torch.Tensor:
    """`residual + expand(x, ...)`, (N, B, D), without a temporary for the second summand."""
    y = torch.empty_like(residual)
    for start, stop, d in slices:
        torch.add(residual[start:stop, :, :d], bias[:d], out=y[start:stop, :, :d])
        y[start:stop, :, d:] = residual[start:stop, :, d:]
    inputs, outputs = x.flatten(0, 1), y.flatten(0, 1)
    for start, stop, low, high in blocks(slices, x.shape[1]):
        out = outputs[start:stop, low:high]
        torch.addmm(out, inputs[start:stop], matrix[:, low:high], out=out)
    return y


# Plain operators: for compilers, for weights that are no ordinary tensors, and for gradients of gradients.


def _plain_in(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, slices: tuple[Slice, ...]
) -> torch.Tensor:
    # Flat, since a product with three axes would copy its operand.
    parts = (
        nn.functional.linear(x[start:stop, :, :d].flatten(0, 1), weight[:, :d], bias) for start, stop, d in slices
    )
    return torch.cat(list(parts)).unflatten(0, x.shape[:2])


def _plain_out(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, slices: tuple[Slice, ...], after_gelu: bool
) -> torch.Tensor:
    x = nn.functional.gelu(x) if after_gelu else x
    parts = (nn.functional.linear(x[start:stop], weight[:d], bias[:d]) for start, stop, d in slices)
    return torch.cat([widen(part, slices[0][2]) for part in parts])


def _differentiable_gradients(
    plain: Callable[..., torch.Tensor], ctx, grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Of x, weight and bias, by plain operators, which autograd can differentiate again."""
    # Aliases, so that a weight's gradient is not also what reaches it by way of x. No derivative needs the bias.
    x, weight = (operand.view_as(operand) for operand in ctx.saved_tensors)
    operands = (x, weight, weight.new_zeros(len(weight), requires_grad=True))
    wanted = [operand for operand, needed in zip(operands, ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(plain(*operands, *ctx.options), wanted, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


# Gradients are written by hand for the same reason as the products: autograd would fill a zero tensor of full size for
# every slice of an operand, and add them all up.


class _NestedIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, slices):
        ctx.save_for_backward(x, weight)
        ctx.options = (slices,)
        return contract(x, weight.t(), bias, slices)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return _differentiable_gradients(_plain_in, ctx, grad)
        x, weight = ctx.saved_tensors
        (slices,) = ctx.options
        grad_x = grad_weight = grad_bias = None
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            grad_x = expand(grad, weight, None, slices, x.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            grad_weight[:, slices[0][2] :].zero_()
            grads, inputs = grad.flatten(0, 1), x.flatten(0, 1)
            for stop, low, high in _feature_bands(slices, x.shape[1]):
                torch.mm(grads[:stop].t(), inputs[:stop, low:high], out=grad_weight[:, low:high])
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 1))
        return grad_x, grad_weight, grad_bias, None


class _NestedOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, slices, after_gelu):
        ctx.save_for_backward(x, weight)
        ctx.options = (slices, after_gelu)
        return expand(_projected(x, after_gelu), weight.t(), bias, slices, slices[0][2])

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return _differentiable_gradients(_plain_out, ctx, grad)
        x, weight = ctx.saved_tensors
        slices, after_gelu = ctx.options
        grad_x = grad_weight = grad_bias = None
        grad = grad.contiguous()
        grads = grad.flatten(0, 1)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            grad_weight[slices[0][2] :].zero_()
            inputs = _projected(x, after_gelu).flatten(0, 1)
            for stop, low, high in _feature_bands(slices, x.shape[1]):
                torch.mm(grads[:stop, low:high].t(), inputs[:stop], out=grad_weight[low:high])
            del inputs
        if ctx.needs_input_grad[0]:
            grad_x = contract(grad, weight, None, slices)
            if after_gelu:
                torch.ops.aten.gelu_backward.grad_input(grad_x, x, grad_input=grad_x)  # there is no public name
        if ctx.needs_input_grad[2]:
            grad_bias = grads.new_zeros(len(weight))
            for stop, low, high in _feature_bands(slices, x.shape[1]):
                torch.sum(grads[:stop, low:high], 0, out=grad_bias[low:high])
        return grad_x, grad_weight, grad_bias, None, None


def _projected(x: torch.Tensor, after_gelu: bool) -> torch.Tensor:
    return nn.functional.gelu(x) if after_gelu else x.contiguous()


def _feature_bands(slices: tuple[Slice, ...], batch: int) -> list[tuple[int, int, int]]:
    """(stop, low, high): the features low..high exist in the rows up to stop."""
    widths = [0, *(d for _, _, d in reversed(slices))]
    stops = [stop * batch for _, stop, _ in reversed(slices)]
    return [(stop, low, high) for stop, (low, high) in zip(stops, itertools.pairwise(widths), strict=True)]
