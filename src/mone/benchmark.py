# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""What a capacity saves on the clock: MoNE against transformers' own dense layers, in one process and in turn.

The measure is the *efficiency*: the speed-up over the dense model divided by the reduction in multiply-accumulates.
1 means that every saved multiplication is felt; the paper reached 0.84 on a V100 (Table 1: 1.94 times the throughput
for 2.32 times fewer multiply-accumulates).
"""

import copy
import functools
import hashlib
import itertools
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .baselines import (
    DenseModel,
    MixtureOfDepthsModel,
    TokenMergingModel,
    merged_per_layer_for_macs,
    mixture_of_depths_macs,
)
from .capacity import check_number, one_hot_allocation, paper_grid, relative_widths
from .configuration_mone import MoNEConfig, MoNEViViTConfig, as_pair
from .export import example_input, export_onnx, onnx_session, quantize_onnx, write_onnx
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


logger = logging.getLogger(__name__)

# How a model is run: as it is, with its weights laid out for inference, with its layers compiled one by one, as one
# CUDA graph, or in ONNX Runtime, in float32 or in int8.
MODES = ("eager", "prepared", "compiled", "graphed", "onnx", "onnx_int8")
# What else may be timed beside: timm's dense ViT, token merging with as many multiply-accumulates as each MoNE, and
# Mixture of Depths as the paper compares with it.
BASELINES = ("timm", "token_merging", "mixture_of_depths")
# (model, mode, capacity) of a row of `measure` -> the call that is timed for it.
Calls = dict[tuple[str, str, float | None], Callable[[], object]]


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


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive at once, of those made inside this context.

    Exact and the same on every device. Not counted is what a kernel takes for itself, and what inductor or ONNX
    Runtime plan.

        with PeakMemory() as memory:
            model(pixel_values)
        memory.peak
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        given = {id for id, _ in self._storages((args, kwargs))}
        self._alive = {id: entry for id, entry in self._alive.items() if not entry[0].expired()}
        for id, storage in self._storages(outputs):
            if id not in given:
                self._alive[id] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return outputs

    @staticmethod
    def _storages(tree) -> list[tuple[int, torch.UntypedStorage]]:
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn]
        return [(storage._cdata, storage) for storage in (tensor.untyped_storage() for tensor in tensors)]


def measure(
    config: MoNEConfig,
    capacities: Sequence[float],
    batch_size: int,
    *,
    modes: Sequence[str] = ("eager",),
    baselines: Sequence[str] = (),
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
        modes: of `MODES`. With "compiled", "graphed", "onnx" and "onnx_int8" the dense model is timed in this mode,
            too: in ONNX Runtime with all threads of torch, exported and quantised by the same functions. "graphed"
            takes the time of the kernels alone, without Python's, on an NVIDIA GPU.
        baselines: of `BASELINES`, for images and in eager mode; "timm" needs that package. "token_merging" has the
            multiply-accumulates of each capacity, but those that it cannot get down to, "mixture_of_depths" its own.
        train: forward and backward instead of inference; in eager mode only. Two rows more have a schedule for their
            mode and no capacity: "uniform", the mean over the capacities of [`paper_grid`], and "joint", all nested
            widths.
        device, dtype: where and in what.
        rounds: timed calls of each variant, after two that do not count.
        onnx_dir: folder for ONNX files; those that the same code has left there are used again. Default: a
            temporary one.

    Returns:
        Rows with "model" ("dense", "mone" or a baseline), "mode", "capacity", "batch_size", "train", "gmacs" (of one
        input), "milliseconds" (median), "spread" (half the range between the quartiles, over it), "per_second",
        "reduction" (of multiply-accumulates), "speedup" and "efficiency", the last two against the dense model as it
        is, and, for a mode in which the dense model is timed, too, "efficiency_MODE" against that. "peak_megabytes" of
        tensors beside weights and input ([`PeakMemory`]) for what runs in eager PyTorch, and "compile_seconds" for
        mode "compiled": what the first call took longer.

    Raises:
        ValueError: for an empty batch, an unknown mode or baseline, another pooling, a capacity that is not allowed,
            training in another mode than eager, CUDA graphs without a GPU, or ONNX on another device than the CPU or
            in another dtype than float32.
        ImportError: the baseline "timm" without that package.
    """
    case = _Case(config, capacities, batch_size, modes, baselines, train, device, dtype)
    variants = _variants(case, onnx_dir)
    with (
        torch.set_grad_enabled(train),
        # Frozen, weights are constants that inductor packs for its products on a CPU; each layer then has a graph.
        torch._inductor.config.patch(freezing=torch.device(device).type == "cpu"),
        # A graph for each layer and capacity.
        torch._dynamo.config.patch(recompile_limit=2 * config.num_hidden_layers * (len(capacities) + 1)),
    ):
        first = interleaved_seconds(variants, rounds=1, warmup=0)
        seconds = interleaved_seconds(variants, rounds=rounds, warmup=1)
        peaks = {
            key: _peak_megabytes(call)
            for key, call in variants.items()
            if key[1] in ("eager", "prepared", *case.schedules)
        }
    of_dense = {mode: statistics.median(times) for (name, mode, _), times in seconds.items() if name == "dense"}
    return [_row(case, key, times, of_dense, first[key][0], peaks.get(key)) for key, times in seconds.items()]


@dataclass(frozen=True)
class _Case:
    """What [`measure`] times: its arguments, checked."""

    config: MoNEConfig
    capacities: Sequence[float]
    batch_size: int
    modes: Sequence[str]
    baselines: Sequence[str]
    train: bool
    device: str
    dtype: torch.dtype

    def __post_init__(self):
        modes, baselines, device = tuple(self.modes), tuple(self.baselines), torch.device(self.device).type
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1.")
        if set(modes) - set(MODES) or (self.train and modes != ("eager",)):
            raise ValueError(f"modes={modes} must be of {MODES}, and ('eager',) for training.")
        if set(baselines) - set(BASELINES) or (baselines and isinstance(self.config, MoNEViViTConfig)):
            raise ValueError(f"baselines={baselines} must be of {BASELINES}, and for images.")
        if self.onnx_modes and (device != "cpu" or self.dtype != torch.float32):
            raise ValueError(
                f"modes {self.onnx_modes} run on the CPU in float32, not on {self.device} in {self.dtype}."
            )
        if "graphed" in modes and device != "cuda":
            raise ValueError(f"mode 'graphed' needs device='cuda', got {self.device!r}.")
        for capacity in self.capacities:
            self.config.resolve_capacity(capacity)

    @property
    def onnx_modes(self) -> list[str]:
        return [mode for mode in self.modes if mode.startswith("onnx")]

    @functools.cached_property
    def gmacs(self) -> dict[float | None, float]:
        """Of one input at each capacity; None is the dense model."""
        gmacs = {capacity: count_macs(self.config, capacity) / 1e9 for capacity in self.capacities}
        dense = copy.deepcopy(self.config)
        dense.router_type = "random"  # costs nothing: the routers are not the dense model's
        return {**gmacs, None: count_macs(dense, 1.0) / 1e9}

    @property
    def mone_class(self) -> type[MoNEPreTrainedModel]:
        is_video = isinstance(self.config, MoNEViViTConfig)
        return MoNEViViTForVideoClassification if is_video else MoNEForImageClassification

    def new(self, kind: Callable[..., nn.Module], *args) -> nn.Module:
        """A model of the config, from the same seed every time."""
        torch.manual_seed(0)
        return kind(self.config, *args).to(self.device, self.dtype).train(self.train)

    @property
    def schedules(self) -> dict[str, Sequence]:
        """Name -> capacities of a training step."""
        experts = self.config.num_experts
        joint = [one_hot_allocation(expert, experts) for expert in reversed(range(experts))]
        return {"uniform": paper_grid(experts), "joint": joint} if self.train else {}


def _variants(case: _Case, onnx_dir: str | os.PathLike | None) -> Calls:
    """What [`measure`] times, in the order of its rows."""
    torch.manual_seed(0)
    pixel_values = example_input(case.config, case.batch_size).to(case.device, case.dtype)
    run = _forward_or_step(case, pixel_values)
    return (
        _dense_calls(case, run)
        | _onnx_calls(case, pixel_values, onnx_dir)
        | _mone_calls(case, run)
        | _baseline_calls(case, run)
    )


def _forward_or_step(case: _Case, pixel_values: torch.Tensor) -> Callable:
    """A function that calls a model, with options of its forward, on this input; in training, backward too."""
    if not case.train:
        return lambda model, **kwargs: model(pixel_values, **kwargs)
    labels = torch.randint(case.config.num_labels, (case.batch_size,), device=case.device)

    def step(model, **kwargs):
        model.zero_grad(set_to_none=True)
        logits = model(pixel_values, **kwargs)
        logits = logits if isinstance(logits, torch.Tensor) else logits.logits
        nn.functional.cross_entropy(logits.float(), labels).backward()

    return step


def _dense_calls(case: _Case, run: Callable) -> Calls:
    dense = case.new(DenseModel)
    call = functools.partial(run, dense)
    calls: Calls = {("dense", "eager", None): call}
    if "compiled" in case.modes:
        torch._dynamo.reset()  # graphs of earlier models count towards its limit, behind which nothing is compiled
        compiled = case.new(DenseModel)
        for layer in (*compiled.layers, *compiled.temporal):
            layer.compile(dynamic=False)
        calls["dense", "compiled", None] = functools.partial(run, compiled)
    if "graphed" in case.modes:
        calls["dense", "graphed", None] = _captured(call, case.device)
    return calls


def _onnx_calls(case: _Case, pixel_values: torch.Tensor, onnx_dir: str | os.PathLike | None) -> Calls:
    """The dense model and the MoNE in ONNX Runtime."""
    if not case.onnx_modes:
        return {}
    calls: Calls = {}
    inputs = {"pixel_values": pixel_values.numpy()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(onnx_dir or temporary)
        for mode, capacity in itertools.product(case.onnx_modes, (None, *case.capacities)):
            name, kind = ("dense", DenseModel) if capacity is None else ("mone", case.mone_class)
            session = onnx_session(_onnx_file(case.new, kind, case.config, capacity, mode, folder))
            calls[name, mode, capacity] = functools.partial(session.run, None, inputs)
    return calls


def _mone_calls(case: _Case, run: Callable) -> Calls:
    calls: Calls = {}
    for mode in (mode for mode in case.modes if mode not in case.onnx_modes):
        model = case.new(case.mone_class)
        if mode == "prepared":
            model.optimize_for_inference()
        if mode == "compiled":
            for module in model.modules():
                if isinstance(module, MoNELayer):
                    module.compile(dynamic=False)
        for capacity in case.capacities:
            call = functools.partial(run, model, capacity=capacity)
            calls["mone", mode, capacity] = _captured(call, case.device) if mode == "graphed" else call
        for schedule, steps in case.schedules.items():  # in training, whose only mode is eager
            parts = [functools.partial(run, model, capacity=capacity) for capacity in steps]
            calls["mone", schedule, None] = lambda parts=parts: [part() for part in parts]
    return calls


def _baseline_calls(case: _Case, run: Callable) -> Calls:
    calls: Calls = {}
    if "timm" in case.baselines:
        calls["timm", "eager", None] = functools.partial(run, case.new(timm_vit))
    if "token_merging" in case.baselines:
        for capacity in case.capacities:
            try:
                merged = merged_per_layer_for_macs(case.config, case.gmacs[capacity])
            except ValueError as error:  # the others can still be measured
                logger.warning("Token merging is left out at capacity %s: %s", capacity, error)
                continue
            calls["token_merging", "eager", capacity] = functools.partial(run, case.new(TokenMergingModel, merged))
    if "mixture_of_depths" in case.baselines:
        calls["mixture_of_depths", "eager", None] = functools.partial(run, case.new(MixtureOfDepthsModel))
    return calls


def _row(
    case: _Case,
    key: tuple[str, str, float | None],
    times: Sequence[float],
    of_dense: dict[str, float],
    first: float,
    peak: float | None,
) -> dict:
    """[`measure`]'s row of a variant.

    Args:
        times: seconds of its calls.
        of_dense: mode -> median of the dense model's seconds.
        first: seconds of the very first call.
        peak: megabytes, where they are known.
    """
    name, mode, capacity = key
    steps = case.schedules.get(mode)
    calls = len(steps) if mode == "uniform" else 1
    macs = case.gmacs[capacity] if steps is None else sum(count_macs(case.config, c) for c in steps) / calls / 1e9
    if name == "mixture_of_depths":
        macs = mixture_of_depths_macs(case.config) / 1e9
    median, quartiles = statistics.median(times) / calls, np.percentile(times, [25, 75]) / calls
    row = {
        "model": name,
        "mode": mode,
        "capacity": capacity,
        "batch_size": case.batch_size,
        "train": case.train,
        "gmacs": macs,
        "milliseconds": 1e3 * median,
        "spread": float(quartiles[1] - quartiles[0]) / 2 / median,
        "per_second": case.batch_size / median,
        "reduction": case.gmacs[None] / macs,
        "speedup": of_dense["eager"] / median,
        "peak_megabytes": peak,
    }
    row["efficiency"] = row["speedup"] / row["reduction"]
    if mode in of_dense and mode != "eager":
        row[f"efficiency_{mode}"] = of_dense[mode] / median / row["reduction"]
    if mode == "compiled":
        row["compile_seconds"] = first - median
    return row


@torch.no_grad()
def _captured(call: Callable[[], object], device: str) -> Callable[[], None]:
    """All kernels of a call on this GPU as one CUDA graph, which a single launch runs."""
    with torch.cuda.device(device):  # which need not have a number
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # libraries ask for memory at their first call, which a capture does not allow
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            call()

    def replay(call=call) -> None:  # keeps the model, whose weights the graph reads
        graph.replay()

    return replay


def timm_vit(config: MoNEConfig) -> nn.Module:
    """timm's ViT of the sizes of `config`, with mean pooling and without a class token."""
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise ImportError("The baseline timm needs that package: pip install timm.") from error
    return VisionTransformer(
        img_size=as_pair(config.image_size),
        patch_size=as_pair(config.patch_size),
        in_chans=config.num_channels,
        num_classes=config.num_labels,
        global_pool="avg",
        class_token=False,
        fc_norm=False,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        qkv_bias=config.qkv_bias,
    )


def _peak_megabytes(call: Callable[[], object]) -> float:
    with PeakMemory() as memory:
        call()
    return memory.peak / 1e6


def _onnx_file(new: Callable, kind: type, config: MoNEConfig, capacity: float | None, mode: str, folder: Path) -> Path:
    """The dense model (capacity None) or the MoNE as ONNX, written to `folder` unless this package has done so."""
    # Of the package's sources, too: a file that other code has written would time that code.
    sources = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py")))
    key = hashlib.sha256(f"{config.to_json_string()} {capacity}".encode() + sources).hexdigest()[:16]
    path = Path(folder, f"{key}.onnx")
    if not path.exists():
        if capacity is None:
            write_onnx(new(kind), example_input(config), path)
        else:
            export_onnx(new(kind), path, capacity)
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
    """How the cost of a call grows along some axes, computed and timed (`mone.plots.plot_growth`).

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
        TypeError: a budget that is no number.
        ValueError: if the smallest capacity takes longer; gives the least budget that works.
    """
    check_number(milliseconds=milliseconds)
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


def _wait_for_device() -> None:
    """Accelerators run behind Python; without one there is nothing to wait for."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
