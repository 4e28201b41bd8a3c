# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""What a capacity saves on the clock: MoNE against transformers' own dense layers, in one process and in turn.

The measure is the *efficiency*: the speed-up over the dense model divided by the reduction in multiply-accumulates.
1 means that every saved multiplication is felt; the paper reached 0.84 on a V100 (Fig. 6).
"""

import hashlib
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from .baselines import DenseModel
from .capacity import relative_widths
from .configuration_mone import MoNEConfig, MoNEViViTConfig, as_pair
from .export import export_onnx, onnx_session, quantize_onnx, write_onnx
from .flops import attention_macs, count_macs
from .modeling_mone import (
    MoNEForImageClassification,
    MoNELayer,
    MoNEPreTrainedModel,
    expert_order,
    expert_slices,
    patch_grid,
    restore_order,
    take_tokens,
    token_counts,
)
from .modeling_mone_vivit import MoNEViViTForVideoClassification


# How a model is run: as it is, with its weights laid out for inference, with its layers compiled one by one, or in
# ONNX Runtime, in float32 or in int8.
MODES = ("eager", "prepared", "compiled", "onnx", "onnx_int8")


def example_input(config: MoNEConfig, batch_size: int) -> torch.Tensor:
    """Random `pixel_values` of the shape that a model of `config` takes."""
    frames = (config.num_frames,) if isinstance(config, MoNEViViTConfig) else ()
    return torch.randn(batch_size, *frames, config.num_channels, *as_pair(config.image_size))


def interleaved_seconds(
    variants: dict[str, Callable[[], object]], *, rounds: int = 10, warmup: int = 2
) -> dict[str, list[float]]:
    """Time each variant once per round, so that a slow minute slows all of them.

    Args:
        variants: name -> a call without arguments.
        rounds: timed calls of each variant.
        warmup: rounds before, whose times are dropped.

    Returns:
        Name -> seconds of the timed calls, in the order they ran. Compare medians.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(warmup + rounds):
        for name, call in variants.items():
            _wait_for_device()
            start = time.perf_counter()
            call()
            _wait_for_device()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[warmup:] for name, times in seconds.items()}


def measure(
    config: MoNEConfig,
    capacities: Sequence[float],
    batch_size: int,
    *,
    modes: Sequence[str] = ("eager",),
    train: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 10,
    onnx_dir: str | os.PathLike | None = None,
) -> list[dict]:
    """Time the dense model and the MoNE of `config`, with random weights, on random input.

    Args:
        config: of an image or video model with mean pooling.
        capacities: one row each and mode.
        batch_size: images or clips.
        modes: of `MODES`. With "compiled", "onnx" and "onnx_int8" the dense model is timed in this mode, too: in ONNX
            Runtime with all threads of torch, exported and quantised by the same functions.
        train: forward and backward instead of inference; in eager mode only.
        device, dtype: where and in what.
        rounds: timed calls of each variant, after two that do not count.
        onnx_dir: folder for ONNX files; those that an earlier call has left are used again. Default: a temporary one.

    Returns:
        Rows with "model" ("dense", "mone"), "mode", "capacity", "batch_size", "train", "gmacs" (of one input),
        "milliseconds" (median), "spread" (half the range between the quartiles, over the median), "per_second",
        "reduction" (of multiply-accumulates), "speedup" and "efficiency", the last two against the dense model as it
        is, and, for a mode in which the dense model is timed, too, "efficiency_MODE" against that.

    Raises:
        ValueError: for an unknown mode, a capacity that is not allowed, training in another mode than eager, or ONNX
            on another device than the CPU or in another dtype than float32.
    """
    unknown = sorted(set(modes) - set(MODES))
    if unknown or (train and tuple(modes) != ("eager",)):
        raise ValueError(f"modes={tuple(modes)} must be of {MODES}, and ('eager',) for training.")
    onnx_modes = [mode for mode in modes if mode.startswith("onnx")]
    if onnx_modes and (torch.device(device).type != "cpu" or dtype != torch.float32):
        raise ValueError(f"modes {onnx_modes} run on the CPU in float32, not on {device} in {dtype}.")
    for capacity in capacities:
        config.resolve_capacity(capacity)
    is_video = isinstance(config, MoNEViViTConfig)
    torch.manual_seed(0)
    pixel_values = example_input(config, batch_size).to(device, dtype)
    labels = torch.randint(config.num_labels, (batch_size,), device=device)
    model_class = MoNEViViTForVideoClassification if is_video else MoNEForImageClassification

    def new(kind):
        torch.manual_seed(0)
        model = DenseModel(config) if kind == "dense" else model_class(config)
        return model.to(device, dtype).train(train)

    def step(model, **kwargs):
        model.zero_grad(set_to_none=True)
        logits = model(pixel_values, **kwargs)
        logits = logits if isinstance(logits, torch.Tensor) else logits.logits
        nn.functional.cross_entropy(logits.float(), labels).backward()

    run = step if train else (lambda model, **kwargs: model(pixel_values, **kwargs))
    variants, models, dense = {}, {}, new("dense")
    variants["dense", "eager", None] = lambda: run(dense)
    if "compiled" in modes:
        torch._dynamo.reset()  # graphs of earlier models count towards its limit, behind which nothing is compiled
        compiled_dense = new("dense")
        for layer in (*compiled_dense.layers, *compiled_dense.temporal):
            layer.compile(dynamic=False)
        variants["dense", "compiled", None] = lambda: run(compiled_dense)
    if onnx_modes:
        with tempfile.TemporaryDirectory() as temporary:
            for mode, capacity in itertools.product(onnx_modes, (None, *capacities)):
                session = onnx_session(_onnx_file(config, capacity, mode, new, Path(onnx_dir or temporary)))
                inputs = {"pixel_values": pixel_values.numpy()}
                name = "dense" if capacity is None else "mone"
                variants[name, mode, capacity] = lambda session=session, inputs=inputs: session.run(None, inputs)
    for mode in (mode for mode in modes if mode not in onnx_modes):
        models[mode] = new("mone")
        if mode == "prepared":
            models[mode].optimize_for_inference()
        if mode == "compiled":
            for module in models[mode].modules():
                if isinstance(module, MoNELayer):
                    module.compile(dynamic=False)
        for capacity in capacities:
            variants["mone", mode, capacity] = lambda m=models[mode], c=capacity: run(m, capacity=c)

    with (
        torch.set_grad_enabled(train),
        # Frozen, weights are constants that inductor packs for its matrix products.
        torch._inductor.config.patch(freezing=True),
        # A graph for each layer and capacity.
        torch._dynamo.config.patch(recompile_limit=2 * config.num_hidden_layers * (len(capacities) + 1)),
    ):
        seconds = interleaved_seconds(variants, rounds=rounds)
    # The routers are not the dense model's.
    dense_gmacs = (count_macs(config, 1.0) - _router_macs(config)) / 1e9
    of_dense = {mode: statistics.median(times) for (name, mode, _), times in seconds.items() if name == "dense"}
    rows = []
    for (name, mode, capacity), times in seconds.items():
        median, quartiles = statistics.median(times), np.percentile(times, [25, 75])
        gmacs = dense_gmacs if name == "dense" else count_macs(config, capacity) / 1e9
        row = {
            "model": name,
            "mode": mode,
            "capacity": capacity,
            "batch_size": batch_size,
            "train": train,
            "gmacs": gmacs,
            "milliseconds": 1e3 * median,
            "spread": float(quartiles[1] - quartiles[0]) / 2 / median,
            "per_second": batch_size / median,
            "reduction": dense_gmacs / gmacs,
            "speedup": of_dense["eager"] / median,
        }
        row["efficiency"] = row["speedup"] / row["reduction"]
        if mode in of_dense and mode != "eager":
            row[f"efficiency_{mode}"] = of_dense[mode] / median / row["reduction"]
        rows.append(row)
    return rows


def _onnx_file(config: MoNEConfig, capacity, mode: str, new: Callable[[str], nn.Module], folder: Path) -> Path:
    """The dense model (capacity None) or the MoNE as ONNX, written to `folder` unless it is there."""
    key = hashlib.sha256(f"{config.to_json_string()} {capacity}".encode()).hexdigest()[:16]
    path = Path(folder, f"{key}.onnx")
    if not path.exists():
        if capacity is None:
            write_onnx(new("dense"), example_input(config, 2), path)
        else:
            export_onnx(new("mone"), path, capacity)
    if mode == "onnx":
        return path
    quantized = path.with_suffix(".int8.onnx")
    if not quantized.exists():
        quantize_onnx(path, quantized)
    return quantized


def growth(
    series: dict[str, Sequence[tuple[int, MoNEConfig, int]]],
    capacities: Sequence[float],
    *,
    mode: str = "eager",
    rounds: int = 10,
) -> list[dict]:
    """How the cost of a call grows along some axes, computed and timed (`mone.visualization.plot_growth`).

    Args:
        series: axis -> its points: value on the axis, model, images or clips of a call.
        capacities, mode, rounds: as in [`measure`].

    Returns:
        Rows of [`measure`], with "axis", "value" and "attention_share", attention's part of the multiply-accumulates.
    """
    rows = []
    for axis, points in series.items():
        for value, config, batch_size in points:
            measured = measure(config, capacities, batch_size, modes=(mode,), rounds=rounds)
            for row in measured:
                share = attention_macs(config) / 1e9 / row["gmacs"]
                rows.append({"axis": axis, "value": value, "attention_share": share, **row})
    return rows


def routing_share(config: MoNEConfig, capacity: float, batch_size: int, *, rounds: int = 10) -> float:
    """Share of a forward pass that routing takes: router, EPR, sorting the tokens and restoring their order.

    Args:
        config: of an image model with one learned router and mean pooling.
        capacity, batch_size, rounds: as in [`measure`].
    """
    torch.manual_seed(0)
    model = MoNEForImageClassification(config).eval()
    pixel_values = example_input(config, batch_size)
    grid = patch_grid(config, pixel_values.shape[-2:])
    tokens = torch.randn(batch_size, grid[0] * grid[1], config.hidden_size)
    counts = token_counts(config, capacity, tokens.shape[1])

    def route():
        routing = model.mone.routers[0](tokens, counts)
        expert_slices(config, counts, 0)
        order = expert_order(routing.experts, 0)
        return restore_order(take_tokens(tokens, order), order), take_tokens(routing.gate, order)

    with torch.no_grad():
        seconds = interleaved_seconds(
            {"route": route, "forward": lambda: model(pixel_values, capacity=capacity)}, rounds=rounds
        )
    return statistics.median(seconds["route"]) / statistics.median(seconds["forward"])


def capacity_for_latency(
    model: MoNEPreTrainedModel, milliseconds: float, example: torch.Tensor, *, points: int = 8, rounds: int = 10
) -> float:
    """The largest effective capacity at which `model` takes at most so long on this machine, by measurement.

    Times the forward pass at `points` capacities, in turn, and interpolates between the medians.

    Args:
        model: in the mode, on the device and in the dtype it is to be used; it is called as it is.
        milliseconds: the budget for one call. One at or above the dense model's time gives 1.0.
        example: `pixel_values` of such a call.
        points: capacities to time, from the smallest to 1.0; at least 2.
        rounds: timed calls at each.

    Raises:
        ValueError: if the smallest capacity takes longer; gives the least budget that works.
    """
    if points < 2:
        raise ValueError(f"points={points} must be at least 2.")
    capacities = np.linspace(relative_widths(model.config.num_experts)[0], 1.0, points).tolist()
    with torch.no_grad():
        seconds = interleaved_seconds(
            {str(c): lambda c=c: model(example, capacity=c) for c in capacities}, rounds=rounds
        )
    # More capacity does not take less time: where it seems to, that is noise.
    curve = np.maximum.accumulate([1e3 * statistics.median(times) for times in seconds.values()])
    if not milliseconds >= curve[0]:
        raise ValueError(
            f"A budget of {milliseconds} ms cannot be met: capacity {capacities[0]:g} already takes {curve[0]:.3g} ms "
            "for this input. A smaller batch or image takes less."
        )
    if milliseconds >= curve[-1]:
        return 1.0
    above = int(np.searchsorted(curve, milliseconds, side="right"))
    share = (milliseconds - curve[above - 1]) / (curve[above] - curve[above - 1])
    return capacities[above - 1] + float(share) * (capacities[above] - capacities[above - 1])


def environment() -> dict[str, str | int]:
    """The machine, its threads and the versions that a measurement belongs to."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        name = torch.cuda.get_device_name() if device.type == "cuda" else str(device)
    return {
        "machine": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _router_macs(config: MoNEConfig) -> int:
    grid = patch_grid(config, as_pair(config.image_size))
    time = config.num_frames // config.tubelet_size[0] if isinstance(config, MoNEViViTConfig) else 1
    routers = 0 if config.router_type == "random" else len(config.router_layers)
    return time * routers * grid[0] * grid[1] * config.hidden_size * config.num_experts


def _wait_for_device() -> None:
    """Accelerators run behind Python; without one there is nothing to wait for."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
