# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Linear layers of nested experts, and the norms before them, in one kernel each, on a GPU.

For inference in half precision. Where `nested_linear` takes one matrix product for each expert, here one launch
computes the tiles of all experts, each tile over as many features as its expert has; and what follows a product (bias,
GELU, gate, residual) is done to its sum in registers.

A launch needs a table of the tiles of rows, which is sent to the GPU in the first call with these numbers of tokens.
A CUDA graph is therefore to be captured after such a call.

Axis letters: N tokens, B batch, D width of the model, d width of an expert, I and O input and output features; R rows
of a flattened (N * B, features) matrix.
"""

import functools
import math
import warnings
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .nested_linear import NestedIn, NestedOut, Slice, is_plain, is_traced, is_untouched


try:
    import triton
    import triton.language as tl
except ImportError:  # as on most machines without a GPU
    triton = None


class Tiles(NamedTuple):
    """How a kernel divides its work: a program computes `rows` x `columns` outputs, `depth` inputs at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    """Tiles of rows whose programs run together, so that they share the weights that are in the cache."""


# Rows of a program that normalises, and its warps.
NORM_ROWS, NORM_WARPS = 4, 4
# With at least MANY_ROWS rows, and with fewer.
MANY_ROWS = 2048
IN_TILES = Tiles(128, 128, 64, 8, 3), Tiles(64, 64, 64, 4, 4)
OUT_TILES = Tiles(128, 64, 64, 4, 4), Tiles(64, 64, 64, 4, 4)


def kernels_can_serve(x: torch.Tensor, slices: tuple[Slice, ...], *modules: nn.Module) -> bool:
    """Whether the kernels compute for x (N, B, D) what these projections and norms would, and faster."""
    # One full expert is the dense model, whose products are those that cuBLAS is made for.
    if len(slices) == 1 and slices[0][2] == x.shape[-1]:
        return False
    if torch.is_grad_enabled() or is_traced() or torch.is_autocast_enabled("cuda"):
        return False
    if x.dtype not in (torch.float16, torch.bfloat16) or not all(is_untouched(module) for module in modules):
        return False
    tensors = [tensor for module in modules for tensor in (module.weight, module.bias) if tensor is not None]
    return (
        all(tensor.dtype == x.dtype and tensor.device == x.device for tensor in tensors)
        and all(tensor.is_contiguous() for tensor in tensors if tensor.dim() == 1)
        # Sharded and quantised weights are other types, and a mode (FlopCounterMode) would not see the kernels.
        and all(is_plain(tensor) for tensor in (x, *tensors))
        and _get_current_dispatch_mode() is None
        and len({(m.weight.shape, m.weight.stride(), m.bias is None) for m in modules if type(m) is NestedIn}) <= 1
        and runs_on(x.device)
    )


_runs_on: dict[torch.device, bool] = {}


def runs_on(device: torch.device) -> bool:
    """Whether this device can run the kernels; tried once, since this takes a C compiler and enough shared memory."""
    if device not in _runs_on:
        if triton is None or device.type != "cuda" or torch.version.cuda is None:
            return False
        if torch.cuda.is_current_stream_capturing():  # which allows no trial
            return False
        _runs_on[device] = torch.cuda.get_device_capability(device) >= (8, 0) and _try_on(device)
    return _runs_on[device]


def _try_on(device: torch.device) -> bool:
    # Without initialisation, which would take random numbers.
    first, last = (
        nn.utils.skip_init(cls, 16, 16, device=device, dtype=torch.float16) for cls in (NestedIn, NestedOut)
    )
    x, slices = torch.zeros(1, 1, 16, device=device, dtype=torch.float16), ((0, 1, 16),)
    try:
        normalise(x, nn.LayerNorm(16, device=device, dtype=torch.float16), slices)
        project_in(x, (first,), slices, tiles=IN_TILES[0])
        project_out(x, last, slices, x, tiles=OUT_TILES[0])
    except torch.OutOfMemoryError:  # another call may have more
        raise
    except Exception as error:  # of Triton, of the compilers it calls, of the driver
        warnings.warn(f"MoNE runs without its Triton kernels, at less speed: {error!r}", stacklevel=2)
        return False
    return True


def normalise(x: torch.Tensor, norm: nn.LayerNorm, slices: tuple[Slice, ...]) -> torch.Tensor:
    """(N, B, D) -> (N, B, D): `norm(x)`, of which an expert's tokens get the first d features, all it reads.

    The others are left as they are in memory.
    """
    x = x.contiguous()
    width, y = x.shape[-1], torch.empty_like(x)
    unit = math.gcd(16, *(d for _, _, d in slices))
    table = row_table(slices, x.shape[1], NORM_ROWS, unit, x.device)
    bias = norm.weight if norm.bias is None else norm.bias
    with torch.cuda.device_of(x):
        _norm_kernel[(len(table),)](
            *(x, norm.weight, bias, y, table),
            **{"WIDTH": width, "EPS": norm.eps, "HAS_BIAS": norm.bias is not None, "UNIT": unit},
            **{"BLOCK_M": NORM_ROWS, "BLOCK_D": triton.next_power_of_2(width), "num_warps": NORM_WARPS},
        )
    return y


def project_in(
    x: torch.Tensor,
    modules: tuple[NestedIn, ...],
    slices: tuple[Slice, ...],
    gelu: bool = False,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """(N, B, D) -> (N, B, len(modules) * O): the outputs of up to three projections of one shape, side by side.

    Args:
        gelu: apply GELU to the outputs.
        tiles: other than `IN_TILES`.
    """
    x = x.contiguous()
    count, (out_features, in_features) = len(modules), modules[0].weight.shape
    y = x.new_empty(*x.shape[:2], count * out_features)
    tiles = tiles or IN_TILES[x.shape[0] * x.shape[1] < MANY_ROWS]
    unit = math.gcd(tiles.depth, *(d for _, _, d in slices))
    table = row_table(slices, x.shape[1], tiles.rows, unit, x.device)
    has_bias = modules[0].bias is not None
    # The kernel takes three of each, and does not look at those that are not there.
    weights = [modules[i % count].weight for i in range(3)]
    biases = [modules[i % count].bias if has_bias else modules[0].weight for i in range(3)]
    with torch.cuda.device_of(x):
        _in_kernel[(len(table) * count * triton.cdiv(out_features, tiles.columns),)](
            *(x, *weights, *biases, y, table, len(table)),
            **{"IN": in_features, "OUT": out_features, "COUNT": count},
            **{"STRIDE_O": weights[0].stride(0), "STRIDE_I": weights[0].stride(1)},
            **{"HAS_BIAS": has_bias, "GELU": gelu, "UNIT": unit},
            **_options(tiles),
        )
    return y


def project_out(
    x: torch.Tensor,
    module: NestedOut,
    slices: tuple[Slice, ...],
    residual: torch.Tensor,
    gate: torch.Tensor | None = None,
    in_place: bool = False,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """(N, B, I) -> (N, B, D): `residual + gate * module(x)`, where `module(x)` is 0 from the expert's width d on.

    Args:
        x: need not be contiguous, but for its last axis.
        residual: (N, B, D).
        gate: (N, B, 1), None for 1.
        in_place: write the result into `residual`, or into its copy where it is not contiguous.
        tiles: other than `OUT_TILES`.
    """
    x, residual = x if x.stride(-1) == 1 else x.contiguous(), residual.contiguous()
    weight, has_bias = module.weight, module.bias is not None
    out = residual if in_place else torch.empty_like(residual)
    tiles = tiles or OUT_TILES[x.shape[0] * x.shape[1] < MANY_ROWS]
    unit = math.gcd(16, *(d for _, _, d in slices))
    table = row_table(slices, x.shape[1], tiles.rows, unit, x.device)
    bias = module.bias if has_bias else weight
    gates = residual if gate is None else gate.contiguous()
    with torch.cuda.device_of(x):
        _out_kernel[(len(table) * triton.cdiv(weight.shape[0], tiles.columns),)](
            *(x, weight, bias, residual, gates, out, table, len(table), x.shape[1], x.stride(0), x.stride(1)),
            **{"IN": weight.shape[1], "OUT": weight.shape[0]},
            **{"STRIDE_O": weight.stride(0), "STRIDE_I": weight.stride(1)},
            **{"HAS_BIAS": has_bias, "HAS_GATE": gate is not None, "IN_PLACE": in_place, "UNIT": unit},
            **_options(tiles),
        )
    return out


def _options(tiles: Tiles) -> dict[str, int]:
    blocks = {"BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns, "BLOCK_K": tiles.depth, "GROUP": tiles.group}
    return {**blocks, "num_warps": tiles.warps, "num_stages": tiles.stages}


# Never emptied: a CUDA graph reads the table of its capture. They are small.
@functools.cache
def row_table(slices: tuple[Slice, ...], batch: int, rows: int, unit: int, device: torch.device) -> torch.Tensor:
    """(tiles, 3) int32: first row, row after the last of the expert, and d / unit, for each tile of `rows` rows.

    No tile has rows of two experts.
    """
    table = [
        (row, stop * batch, d // unit) for start, stop, d in slices for row in range(start * batch, stop * batch, rows)
    ]
    return torch.tensor(table, dtype=torch.int32, device=device)


if triton is not None:
    # Sizes of weights are constants, as a model has few. Those of inputs are not, so that neither another batch nor
    # another capacity is compiled again. A width d comes as a multiple of UNIT, by which the compiler knows that
    # neighbouring features can be loaded together.

    @triton.jit
    def _norm_kernel(
        x,
        w,
        b,
        y,
        table,
        WIDTH: tl.constexpr,
        EPS: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        UNIT: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        entry = table + 3 * tl.program_id(0)
        row, row_stop, d = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2) * UNIT
        rows, features = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        exists = (features < WIDTH)[None, :]
        # Rows beyond the expert's are read as its last, and not written.
        read = tl.minimum(rows, row_stop - 1).to(tl.int64)[:, None] * WIDTH + features[None, :]
        values = tl.load(x + read, mask=exists, other=0.0).to(tl.float32)
        centred = tl.where(exists, values - (tl.sum(values, 1) / WIDTH)[:, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + EPS)
        total = centred * scale[:, None] * tl.load(w + features, mask=features < WIDTH, other=0.0).to(tl.float32)
        if HAS_BIAS:
            total += tl.load(b + features, mask=features < WIDTH, other=0.0).to(tl.float32)
        mask = (rows < row_stop)[:, None] & (features < d)[None, :]
        tl.store(y + rows.to(tl.int64)[:, None] * WIDTH + features[None, :], total.to(y.dtype.element_ty), mask=mask)

    @triton.jit
    def _locate(table, num_row_tiles, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
        """This program's rows (first, end), its expert's d / UNIT, and its tile of columns."""
        program = tl.program_id(0)
        first = program // (GROUP * COLUMN_TILES) * GROUP
        height = tl.minimum(num_row_tiles - first, GROUP)
        entry = table + 3 * (first + program % (GROUP * COLUMN_TILES) % height)
        column_tile = program % (GROUP * COLUMN_TILES) // height
        return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), column_tile

    @triton.jit
    def _product(
        x_rows,  # (BLOCK_M) pointers
        w,
        columns,  # (BLOCK_N) of the output, rows of the weight
        depth,
        OUT: tl.constexpr,
        STRIDE_O: tl.constexpr,
        STRIDE_I: tl.constexpr,
        IS_EVEN: tl.constexpr,  # whether depth is a multiple of BLOCK_K
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """(BLOCK_M, BLOCK_N) sums over the first `depth` features."""
        if OUT % BLOCK_N != 0:
            columns = tl.minimum(columns, OUT - 1)
        features = tl.arange(0, BLOCK_K)
        x_tile = x_rows[:, None] + features[None, :]
        w_tile = w + columns[None, :] * STRIDE_O + features[:, None] * STRIDE_I
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, depth, BLOCK_K):
            if IS_EVEN:
                x_part = tl.load(x_tile + k)
                w_part = tl.load(w_tile + k * STRIDE_I)
            else:
                x_part = tl.load(x_tile + k, mask=(features < depth - k)[None, :], other=0.0)
                w_part = tl.load(w_tile + k * STRIDE_I, mask=(features < depth - k)[:, None], other=0.0)
            total = tl.dot(x_part, w_part, total)
        return total

    @triton.jit(do_not_specialize=["num_row_tiles"])
    def _in_kernel(
        x,
        w0,
        w1,
        w2,
        b0,
        b1,
        b2,
        y,
        table,
        num_row_tiles,
        IN: tl.constexpr,
        OUT: tl.constexpr,
        COUNT: tl.constexpr,
        STRIDE_O: tl.constexpr,
        STRIDE_I: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        GELU: tl.constexpr,
        UNIT: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        GROUP: tl.constexpr,
    ):
        COLUMN_TILES: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N  # of one weight
        row, row_stop, units, column_tile = _locate(table, num_row_tiles, COUNT * COLUMN_TILES, GROUP)
        index = column_tile // COLUMN_TILES
        w, b = w0, b0
        if COUNT > 1:
            if index == 1:
                w, b = w1, b1
            if index == 2:
                w, b = w2, b2
        rows = row + tl.arange(0, BLOCK_M)
        columns = column_tile % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows beyond the expert's are read as its last, and not written.
        x_rows = x + tl.minimum(rows, row_stop - 1).to(tl.int64) * IN
        total = _product(
            x_rows, w, columns, units * UNIT, OUT, STRIDE_O, STRIDE_I, UNIT % BLOCK_K == 0, BLOCK_M, BLOCK_N, BLOCK_K
        )
        if HAS_BIAS:
            total += tl.load(b + columns, mask=columns < OUT, other=0.0).to(tl.float32)[None, :]
        if GELU:
            total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
        y_tile = y + rows.to(tl.int64)[:, None] * (COUNT * OUT) + (index * OUT + columns)[None, :]
        mask = (rows < row_stop)[:, None] & (columns < OUT)[None, :]
        tl.store(y_tile, total.to(y.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["num_row_tiles", "batch"])
    def _out_kernel(
        x,
        w,
        b,
        residual,
        gate,
        out,
        table,
        num_row_tiles,
        batch,
        stride_n,
        stride_b,
        IN: tl.constexpr,
        OUT: tl.constexpr,
        STRIDE_O: tl.constexpr,
        STRIDE_I: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_GATE: tl.constexpr,
        IN_PLACE: tl.constexpr,
        UNIT: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        GROUP: tl.constexpr,
    ):
        row, row_stop, units, column_tile = _locate(table, num_row_tiles, (OUT + BLOCK_N - 1) // BLOCK_N, GROUP)
        d = units * UNIT
        if IN_PLACE:  # noqa: SIM102  # decided when compiled
            if column_tile * BLOCK_N >= d:
                return
        rows = row + tl.arange(0, BLOCK_M)
        columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        read = tl.minimum(rows, row_stop - 1)
        x_rows = x + (read // batch).to(tl.int64) * stride_n + (read % batch).to(tl.int64) * stride_b
        # Where the expert has no features, the residual is copied.
        depth = tl.where(column_tile * BLOCK_N < d, IN, 0)
        total = _product(
            x_rows, w, columns, depth, OUT, STRIDE_O, STRIDE_I, IN % BLOCK_K == 0, BLOCK_M, BLOCK_N, BLOCK_K
        )
        if HAS_BIAS:
            total += tl.load(b + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
        if HAS_GATE:
            total *= tl.load(gate + read).to(tl.float32)[:, None]
        tile = rows.to(tl.int64)[:, None] * OUT + columns[None, :]
        mask = (rows < row_stop)[:, None] & (columns < (d if IN_PLACE else OUT))[None, :]
        total = tl.where((columns < d)[None, :], total, 0.0)
        total += tl.load(residual + tile, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + tile, total.to(out.dtype.element_ty), mask=mask)
