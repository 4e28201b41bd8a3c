# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Weights prepared for inference on a CPU: copies of every expert's part, packed for its matrix products.

Axis letters: N tokens, B batch, D width of the model, d width of an expert, I and O input and output features.
"""

import itertools

import torch
from torch import nn

from .nested_linear import SHARED_ROWS, NestedIn, NestedOut, is_plain, is_traced, is_untouched


# Values of a weight that are kept to notice another one.
NUM_SAMPLES = 16


class PackedLinear:
    """Projections of one input side by side, as oneDNN packs them for the products of every expert.

    For inference on a CPU, where packed weights make small products faster. They are copies, for four experts of 1.9
    times the size of the weights.

    Args:
        modules: projections of one kind, that read the same input.
        widths: d of every expert.
    """

    def __init__(self, modules: tuple[NestedIn, ...] | tuple[NestedOut, ...], widths: list[int]):
        self.source, self.samples = self._stamp(modules), [_sample(module.weight).clone() for module in modules]
        self.is_in = isinstance(modules[0], NestedIn)
        with torch.no_grad():
            weight = torch.cat([module.weight for module in modules])
            biases = [module.bias for module in modules if module.bias is not None]
            self.bias = torch.cat(biases) if biases else None
            parts = {d: weight[:, :d] if self.is_in else weight[:d] for d in widths}
            pack = torch.ops.mkldnn._reorder_linear_weight  # inductor's; there is no public name
            self.weights = {d: pack(part.contiguous()) for d, part in parts.items()}

    @staticmethod
    def is_possible(*modules: nn.Module) -> bool:
        """Where there are kernels for it: float32 on a CPU that oneDNN knows, bfloat16 on one that has it."""
        if not torch.backends.mkldnn.is_available():
            return False
        dtypes = [torch.float32]
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # inductor asks it; there is no public name
            dtypes.append(torch.bfloat16)
        return all(
            type(module) in (NestedIn, NestedOut)
            and is_plain(module.weight)
            and module.weight.device.type == "cpu"
            and module.weight.dtype in dtypes
            and not module.weight.is_inference()  # which does not tell when it is changed
            for module in modules
        )

    def serves(self, *modules: nn.Module) -> bool:
        """Whether it computes what these modules would: unhooked, and with the weights it packed."""
        return (
            all(is_untouched(module) for module in modules)
            and self.source == self._stamp(modules)
            # What is written through `.data`, as averages and merged adapters are, leaves no other mark.
            and all(torch.equal(_sample(m.weight), kept) for m, kept in zip(modules, self.samples, strict=True))
        )

    @staticmethod
    def _stamp(modules: tuple[nn.Module, ...]) -> list[tuple]:
        tensors = [tensor for module in modules for tensor in (module.weight, module.bias) if tensor is not None]
        return [(tensor.data_ptr(), None if tensor.is_inference() else tensor._version) for tensor in tensors]

    def __call__(self, x: torch.Tensor, d: int, activation: str = "none") -> torch.Tensor:
        """Tokens (..., D or I) of an expert of width d -> (..., outputs of all modules) or (..., d)."""
        linear = torch.ops.mkldnn._linear_pointwise
        if self.is_in:
            return linear(x[..., :d], self.weights[d], self.bias, activation, [], "none")
        return linear(x, self.weights[d], self.bias[:d], activation, [], "none")


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Values from all over a weight, whatever its layout."""
    count = min(NUM_SAMPLES, weight.numel())
    return weight.detach().as_strided((count,), (weight.numel() // count,))


class Packable(nn.Module):
    """A module whose first projections and last projection can be packed.

    `train()` drops the copies and restores the weights' usual memory layout. With other weights, under autocast and
    with hooks on the projections the copies are not used.
    """

    packed: tuple[PackedLinear, PackedLinear] | None = None
    packed_for_few_rows = False
    """Whether they also serve up to `SHARED_ROWS` rows. Time goes into reading weights there, and experts that share
    products read each of them once; which is faster depends on the machine."""

    def projections(self) -> tuple[tuple[NestedIn, ...], tuple[NestedOut]]:
        """The modules to pack together: those that read the input, and the one that writes the output."""
        raise NotImplementedError

    def pack(self, widths: list[int]) -> None:
        """Pack the projections for experts of these widths, where that is possible."""
        first, last = self.projections()
        if PackedLinear.is_possible(*first, *last):
            self.packed = PackedLinear(first, widths), PackedLinear(last, widths)

    def __getstate__(self):
        return {**self.__dict__, "packed": None}  # copies and pickles come without

    def train(self, mode: bool = True):
        if mode:
            self.packed = None
            for module in itertools.chain(*self.projections()):
                if isinstance(module, nn.Linear) and not module.weight.is_contiguous():
                    module.weight.data = module.weight.data.contiguous()
        return super().train(mode)

    def usable_packs(self, x: torch.Tensor) -> tuple[PackedLinear, PackedLinear] | None:
        """What was packed, if it computes for x (N, B, ...) what the projections would, and faster."""
        if self.packed is None or (x.shape[0] * x.shape[1] <= SHARED_ROWS and not self.packed_for_few_rows):
            return None
        if torch.is_grad_enabled() or is_traced() or torch.is_autocast_enabled("cpu"):
            return None
        usable = all(pack.serves(*modules) for pack, modules in zip(self.packed, self.projections(), strict=True))
        return self.packed if usable else None
