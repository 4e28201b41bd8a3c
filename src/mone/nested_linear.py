# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Linear layers of which every nested expert uses a part (paper, section 3.1).

An in-projection reads the first d features of an expert's tokens, with the first d columns of its weight; an
out-projection writes the first d features, with the first d rows.

Tokens come token by token and not image by image, (N, B, D), sorted by expert, largest first. So each expert's tokens
are one block of rows in memory, and its part of a projection is one matrix product that reads its operands where they
are and writes its result where it belongs: nothing is copied, padded or masked.

Axis letters: N tokens, B batch, D width of the model, d width of an expert, I and O input and output features.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable


# The tokens start..stop of a sorted sequence that one expert processes, and that expert's width d. Largest first.
Slice = tuple[int, int, int]


class NestedIn(nn.Linear):
    """In-projection: token n of an expert of width d becomes `weight[:, :d] x[n, :d] + bias`."""

    def forward(self, x: torch.Tensor, slices: tuple[Slice, ...]) -> torch.Tensor:
        """(N, B, D) -> (N, B, O); of an expert's tokens only the first d features are read."""
        if _is_dense(slices, self.in_features):
            return nn.functional.linear(x, self.weight, self.bias)
        if _is_traced():
            parts = [
                nn.functional.linear(x[start:stop, :, :d], self.weight[:, :d], self.bias) for start, stop, d in slices
            ]
            return torch.cat(parts)
        return _NestedIn.apply(*_autocast(x, self.weight, self.bias), slices)


class NestedOut(nn.Linear):
    """Out-projection: the first d features of an expert's tokens are `weight[:d] x[n] + bias[:d]`, the rest 0."""

    def forward(self, x: torch.Tensor, slices: tuple[Slice, ...]) -> torch.Tensor:
        """(N, B, I) -> (N, B, D)."""
        if _is_dense(slices, self.out_features):
            return nn.functional.linear(x, self.weight, self.bias)
        if _is_traced():
            parts = [
                nn.functional.pad(
                    nn.functional.linear(x[start:stop], self.weight[:d], self.bias[:d]), (0, self.out_features - d)
                )
                for start, stop, d in slices
            ]
            return torch.cat(parts)
        return _NestedOut.apply(*_autocast(x, self.weight, self.bias), slices)


def _is_dense(slices: tuple[Slice, ...], width: int) -> bool:
    return len(slices) == 1 and slices[0][2] == width


def _is_traced() -> bool:
    """Compilers plan memory themselves, and get the same products as plain operators."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """What autocast does to the operands of a linear layer, which it does not know these to be."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which the meta device does not know
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _rows(slices: tuple[Slice, ...], batch: int) -> list[Slice]:
    """The slices in rows of the flattened (N * B, ...) matrix."""
    return [(start * batch, stop * batch, d) for start, stop, d in slices]


# The gradients are written out for the same reason as the products: autograd's would fill a zero tensor of full size
# for every slice of an operand, and add them up.


class _NestedIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, slices):
        ctx.save_for_backward(x, weight)
        ctx.slices, ctx.has_bias = slices, bias is not None
        y = x.new_empty(*x.shape[:2], len(weight))
        inputs, outputs = x.flatten(0, 1), y.flatten(0, 1)
        for start, stop, d in _rows(slices, x.shape[1]):
            operands, out = (inputs[start:stop, :d], weight[:, :d].t()), outputs[start:stop]
            if bias is None:
                torch.mm(*operands, out=out)
            else:
                torch.addmm(bias, *operands, out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        slices = _rows(ctx.slices, x.shape[1])
        grads, inputs = grad.flatten(0, 1), x.flatten(0, 1)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            for start, stop, d in slices:
                rows = grad_x.flatten(0, 1)[start:stop]
                torch.mm(grads[start:stop], weight[:, :d], out=rows[:, :d])
                rows[:, d:].zero_()
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            for start, stop, d in slices:
                grad_weight[:, :d].addmm_(grads[start:stop].t(), inputs[start:stop, :d])
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grads.sum(0)
        return grad_x, grad_weight, grad_bias, None


class _NestedOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, slices):
        ctx.save_for_backward(x, weight)
        ctx.slices = slices
        y = x.new_empty(*x.shape[:2], len(weight))
        inputs, outputs = x.flatten(0, 1), y.flatten(0, 1)
        for start, stop, d in _rows(slices, x.shape[1]):
            torch.addmm(bias[:d], inputs[start:stop], weight[:d].t(), out=outputs[start:stop, :d])
            outputs[start:stop, d:].zero_()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        slices = _rows(ctx.slices, x.shape[1])
        grads, inputs = grad.flatten(0, 1), x.flatten(0, 1)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            for start, stop, d in slices:
                torch.mm(grads[start:stop, :d], weight[:d], out=grad_x.flatten(0, 1)[start:stop])
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            for start, stop, d in slices:
                grad_weight[:d].addmm_(grads[start:stop, :d].t(), inputs[start:stop])
        if ctx.needs_input_grad[2]:
            grad_bias = grads.new_zeros(len(weight))
            for start, stop, d in slices:
                grad_bias[:d] += grads[start:stop, :d].sum(0)
        return grad_x, grad_weight, grad_bias, None
