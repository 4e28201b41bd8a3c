# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""A classifier at one fixed capacity as a `torch.export` program or an ONNX file, for any batch size.

The exported graph computes what the model computes and is laid out for runtimes that copy wherever PyTorch makes a
view: every expert's tokens are a tensor of their own from a router to the next, and of it the features that the
expert does not work on are another, which nothing touches. A layer only joins queries, keys and values for
attention, and splits its result.

`pip install "mone[export]"` for ONNX: onnx, onnxscript and onnxruntime.

Axis letters: B batch (for video, clips times temporal indices T), N tokens, n those of one expert, D width of the
model, d width of an expert, F features.
"""

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BaseImageProcessor, BaseVideoProcessor

from .configuration_mone import MoNEConfig, MoNEViViTConfig, as_pair
from .modeling_mone import (
    ClassifierMixin,
    EncoderOutput,
    MoNELayer,
    MoNEPreTrainedModel,
    expert_order,
    expert_slices,
)
from .nested_linear import Slice, is_untouched


# The first one with attention as an operator.
OPSET = 23


class ExportForm(nn.Module):
    """The classifier `model` at one capacity, laid out for export: `pixel_values` -> named outputs.

    Args:
        model: with a classifier and learned routers, in eval mode.
        capacity: as in the model's forward.
        router_outputs: also return `router_logits_K` and `expert_indices_K` of every router K.

    Raises:
        TypeError, ValueError: as [`export_program`].
    """

    def __init__(self, model: MoNEPreTrainedModel, capacity, router_outputs: bool = False):
        super().__init__()
        config = model.config
        if not isinstance(model, ClassifierMixin):
            raise TypeError(
                f"{type(model).__name__} is no MoNE with a classifier: export a MoNE...For...Classification."
            )
        if config.router_type != "learned":
            reason = {
                "random": "draws its scores anew at each call",
                "argmax": "gives the experts no fixed number of tokens",
            }[config.router_type]
            raise ValueError(f"router_type={config.router_type!r} {reason}: only 'learned' can be exported.")
        if model.training:
            raise ValueError("The model is in training mode: call model.eval() before exporting it.")
        for name, module in model.named_modules():
            if name.endswith(("_proj", ".fc1", ".fc2")) and not is_untouched(module):
                raise ValueError(f"{name} has hooks or an adapter: remove or merge these before exporting.")
        config.resolve_capacity(capacity)
        self.model, self.capacity, self.router_outputs = model, capacity, router_outputs

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """pixel_values -> outputs by name: "logits", and if asked for those of every router."""
        with _expert_streams(self.model):
            result = self.model(
                pixel_values,
                capacity=self.capacity,
                output_router_logits=self.router_outputs,
                output_hidden_states=False,  # which the config may ask for
                output_attentions=False,
                return_dict=True,
            )
        outputs = {"logits": result.logits}
        if self.router_outputs:
            for number, decision in enumerate(zip(result.router_logits, result.expert_indices, strict=True)):
                outputs |= dict(zip(_router_names(number), decision, strict=True))
        return outputs


def _router_names(number: int) -> tuple[str, str]:
    return f"router_logits_{number}", f"expert_indices_{number}"


@contextmanager
def _expert_streams(model: nn.Module) -> Iterator[None]:
    """The model runs `stream_encoder` in place of `nested_encoder`. It is all that differs in an exported model."""
    encoders = [module for module in model.modules() if hasattr(module, "run_layers")]
    for encoder in encoders:
        encoder.run_layers = stream_encoder
    try:
        yield
    finally:
        for encoder in encoders:
            del encoder.run_layers


def stream_encoder(
    config: MoNEConfig,
    layers: nn.ModuleList,
    routers: nn.ModuleList,
    hidden_states: torch.Tensor,
    num_prefix: int,
    counts: tuple[int, ...] = (),
    generator: None = None,
    **kwargs,
) -> EncoderOutput:
    """What `nested_encoder` computes with learned routers, without dropout; nothing inside of layers is recorded."""
    routers = dict(zip(config.router_layers, routers, strict=True)) if len(routers) else {}
    slices: tuple[Slice, ...] = ((0, hidden_states.shape[1], config.hidden_size),)
    streams, gates, order = _split(hidden_states, slices), [None], None
    router_logits, expert_indices = [], []
    for index, layer in enumerate(layers):
        if index in routers:
            hidden_states = _join(streams, order)
            routing = routers[index](hidden_states[:, num_prefix:], counts)
            router_logits.append(routing.logits)
            expert_indices.append(routing.experts)
            gate = F.pad(routing.gate, (0, 0, num_prefix, 0), value=1.0) if num_prefix else routing.gate
            slices = expert_slices(config, counts, num_prefix)
            order = expert_order(routing.experts, num_prefix) if len(slices) > 1 else None
            streams = _split(_take(hidden_states, order), slices)
            gates = _take(gate, order).split([stream.length for stream in streams], dim=1)
            gates = [gate.flatten(0, 1) for gate in gates]
        streams = _layer(layer, streams, gates)
    return EncoderOutput(
        last_hidden_state=_join(streams, order),
        token_orders=(None,) * len(layers),
        router_logits=tuple(router_logits),
        expert_indices=tuple(expert_indices),
    )


class Stream(NamedTuple):
    """The tokens of one expert. Flat, so that ONNX gets a product with its bias, and not a product and an addition."""

    features: torch.Tensor
    """(B * n, d): those that the expert works on."""
    rest: torch.Tensor | None
    """(B * n, D - d), None for the full model."""
    length: int
    """n"""

    @property
    def width(self) -> int:
        return self.features.shape[1]

    def whole(self) -> torch.Tensor:
        """(B * n, D)"""
        return self.features if self.rest is None else torch.cat([self.features, self.rest], dim=1)

    def plus(self, update: torch.Tensor) -> "Stream":
        return self._replace(features=self.features + update)


def _split(hidden: torch.Tensor, slices: tuple[Slice, ...]) -> list[Stream]:
    """(B, sequence, D), sorted by expert -> every expert's tokens."""
    full, lengths = hidden.shape[-1], [stop - start for start, stop, _ in slices]
    streams = []
    for tokens, length, (_, _, d) in zip(hidden.split(lengths, dim=1), lengths, slices, strict=True):
        features, rest = tokens.flatten(0, 1).split([d, full - d], dim=1) if d < full else (tokens.flatten(0, 1), None)
        streams.append(Stream(features, rest, length))
    return streams


def _join(streams: list[Stream], order: torch.Tensor | None) -> torch.Tensor:
    """Undo `_split` and `_take`."""
    hidden = _sequence([stream.whole() for stream in streams], streams)
    return _take(hidden, None if order is None else order.argsort(dim=1))


def _sequence(rows: list[torch.Tensor], streams: list[Stream]) -> torch.Tensor:
    """(B * n, F) of every expert -> (B, sequence, F)."""
    parts = [x.unflatten(0, (-1, stream.length)) for x, stream in zip(rows, streams, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _take(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """(B, N, F) -> (B, N, F): x[b, order[b, n]] at [b, n]."""
    if order is None:
        return x
    batch, length = x.shape[:2]
    rows = order + length * torch.arange(batch, device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (-1, length))


def _layer(layer: MoNELayer, streams: list[Stream], gates: list[torch.Tensor | None]) -> list[Stream]:
    """`MoNELayer.forward`, without gradients and dropout."""
    attention, mlp = layer.attention, layer.mlp
    normed = [layer.layernorm_before(stream.whole())[:, : stream.width] for stream in streams]
    query, key, value = (
        _sequence([_contract(x, proj) for x in normed], streams)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    contexts = _attend(query, key, value, attention.num_attention_heads).split([s.length for s in streams], dim=1)
    streams = [
        stream.plus(_expand(context.flatten(0, 1), attention.o_proj, stream.width))
        for stream, context in zip(streams, contexts, strict=True)
    ]
    done = []
    for stream, gate in zip(streams, gates, strict=True):
        x = layer.layernorm_after(stream.whole())[:, : stream.width]
        update = _expand(mlp.activation_fn(_contract(x, mlp.fc1)), mlp.fc2, stream.width)
        done.append(stream.plus(update if gate is None else gate * update))
    return done


def _contract(x: torch.Tensor, proj: nn.Linear) -> torch.Tensor:
    """In-projection: (rows, d) -> (rows, out)."""
    return F.linear(x, proj.weight[:, : x.shape[1]], proj.bias)


def _expand(x: torch.Tensor, proj: nn.Linear, width: int) -> torch.Tensor:
    """Out-projection: (rows, in) -> (rows, width)."""
    return F.linear(x, proj.weight[:width], proj.bias[:width])


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, D) each -> (B, N, D)."""
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.attention(query, key, value, q_num_heads=heads, kv_num_heads=heads)[0]
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def export_program(
    model: MoNEPreTrainedModel, capacity=None, *, router_outputs: bool = False
) -> torch.export.ExportedProgram:
    """The model at one capacity as a `torch.export` program, for any batch size.

    `program.module()(pixel_values)["logits"]` runs it.

    Args:
        model: an image or video classifier with learned routers, in eval mode.
        capacity: as in the model's forward; default `config.capacity`.
        router_outputs: also return, for every router K, `router_logits_K` and `expert_indices_K`, shaped as
            `router_logits` and `expert_indices` of the model.

    Raises:
        TypeError: a model without a classifier.
        ValueError: a capacity that is not allowed, a random or arg-max router, a model in training mode, projections
            with hooks or adapters.
    """
    module = ExportForm(model, capacity, router_outputs).eval()
    example = example_input(model.config).to(model.device, model.dtype)
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=_DYNAMIC_BATCH)


def export_onnx(
    model: MoNEPreTrainedModel,
    path: str | os.PathLike,
    capacity=None,
    *,
    processor=None,
    router_outputs: bool = False,
) -> None:
    """Write the model at one capacity as an ONNX file, for any batch size.

    Its input is `pixel_values`, as the model takes them, its output `logits`. Weights over 2 GB go to a second file,
    `path` with `.data` appended. Where ONNX Runtime is installed, the file is run and compared with the model before
    it takes its name; whatever fails, a file that was there stays.

    The file's metadata, JSON each but for the first: `model_type`, `capacity` (as given), `id2label`, `image_size`
    (height, width); of a processor its whole configuration as `processor` and, where it normalises, `image_mean` and
    `image_std`.

    Args:
        model, capacity, router_outputs: as in [`export_program`]; float32.
        path: of the file; its folder is made.
        processor: the model's image or video processor, for the metadata.

    Raises:
        TypeError, ValueError: as [`export_program`]; a model that is not in float32, a processor of another kind.
        IsADirectoryError: `path` is a folder.
        ImportError: without onnx and onnxscript.
        RuntimeError: ONNX Runtime computes something else than the model.
    """
    config = model.config
    module = ExportForm(model, capacity, router_outputs).eval()
    capacity = config.capacity if capacity is None else capacity
    if model.dtype != torch.float32:
        raise ValueError(f"A model in {model.dtype} cannot be exported to ONNX: call model.float() before.")
    metadata = {
        "model_type": config.model_type,
        "capacity": json.dumps(capacity, default=lambda value: value.tolist()),  # NumPy's
        "id2label": json.dumps(config.id2label),
        "image_size": json.dumps(as_pair(config.image_size)),
    }
    if processor is not None:
        if not isinstance(processor, (BaseImageProcessor, BaseVideoProcessor)):
            raise TypeError(f"processor={processor!r} must be an image or video processor.")
        metadata["processor"] = processor.to_json_string()
        for name in ("image_mean", "image_std") if processor.do_normalize else ():
            metadata[name] = json.dumps(np.broadcast_to(getattr(processor, name), config.num_channels).tolist())

    def check(file: Path) -> None:
        example = example_input(config, 3).to(model.device)
        with torch.no_grad():
            expected = model(example, capacity=capacity).logits
        logits = torch.from_numpy(onnx_session(file).run(["logits"], {"pixel_values": example.cpu().numpy()})[0])
        # By image: where two tokens are as good as equal to a router, rounding may swap them in one.
        scale = expected.abs().amax().clamp(min=1.0).cpu()
        error = ((logits - expected.cpu()).abs().amax(1) / scale).median().item()
        if not error <= 1e-4:
            raise RuntimeError(f"In ONNX Runtime the logits differ from the model's by {error:.3g}; nothing written.")

    names = ["logits"]
    if router_outputs:
        names += [name for number in range(len(config.router_layers)) for name in _router_names(number)]
    write_onnx(module, example_input(config).to(model.device), path, names, metadata, check)


def write_onnx(
    module: nn.Module,
    pixel_values: torch.Tensor,
    path: str | os.PathLike,
    output_names: Sequence[str] = ("logits",),
    metadata: dict[str, str] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write any module of one input as ONNX, in the way of [`export_onnx`]: the same exporter and operator set.

    Args:
        module: in eval mode.
        pixel_values: an example of its input, of at least two images.
        path, output_names, metadata: of the file.
        check: called with the file before it takes its name, where ONNX Runtime is installed.

    Raises:
        IsADirectoryError: `path` is a folder.
        ImportError: without onnx and onnxscript.
    """
    _require("onnx", "onnxscript")
    from onnxscript import opset23 as op

    def stable_sort(x, stable=None, dim=-1, descending=False):
        # Among equal values TopK takes the lower index first.
        length = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]), axis=0)
        return op.TopK(x, length, axis=dim, largest=int(descending), sorted=1)

    with _in_place_of(path) as file:
        with torch.no_grad():
            program = torch.onnx.export(
                module,
                (pixel_values,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["pixel_values"],
                output_names=list(output_names),
                dynamic_shapes=_DYNAMIC_BATCH,
                custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            )
        program.model.metadata_props.update(metadata or {})
        program.save(file)
        if check is not None and importlib.util.find_spec("onnxruntime"):
            check(file)


def quantize_onnx(path: str | os.PathLike, destination: str | os.PathLike) -> None:
    """Make the projections of an ONNX file int8, weights and activations, by ONNX Runtime's dynamic quantisation.

    Weights are quantised by output channel, activations in the range that they have at a call, so that no
    calibration is needed: every expert's tokens in a range of their own, and, as the range is that of the whole batch,
    an image's logits depend a little on the others. Patch embedding and classifier stay in float32, as they are small,
    and so do the routers, whose decisions would flip; norms, activations and attention are not quantised either.

    Args:
        path: a file of [`export_onnx`] or [`write_onnx`].
        destination: the file to write. Metadata stay.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: other tools have taken the names of modules from the file, by which routers are found.
        ImportError: without onnx and onnxruntime.
    """
    _require("onnx", "onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")
    # The names of modules that the exporter leaves in the file; preparing loses them.
    scopes = {node.name: str(node.metadata_props) for node in onnx.load(path, load_external_data=False).graph.node}
    if not any("namespace" in scope for scope in scopes.values()):
        raise ValueError(
            f"The nodes of {os.fspath(path)!r} do not say which module they come from, so that routers cannot be told "
            "from projections: quantise the file as export_onnx or write_onnx wrote it."
        )
    kept = {name for name, scope in scopes.items() if ".routers." in scope or "classifier:" in scope}
    with _in_place_of(destination) as file, tempfile.TemporaryDirectory() as folder:
        # Folds the experts' parts of the weights into weights.
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(os.fspath(path), prepared, skip_symbolic_shape=True, skip_onnx_shape=True)
        model = onnx.load(prepared)
        del model.graph.value_info[:]  # shapes of Gemm's weights, which are about to be transposed
        quantize_dynamic(
            model,
            file,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            # A product with a bias, Gemm, becomes a MatMul of this name first.
            nodes_to_exclude=[name for node in kept for name in (node, f"{node}_MatMul")],
        )


def onnx_session(path: str | os.PathLike):
    """An ONNX Runtime session on the CPU, with as many threads as torch, which rest between calls."""
    _require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


_DYNAMIC_BATCH = ({0: torch.export.Dim("batch")},)


def example_input(config: MoNEConfig, batch_size: int = 2) -> torch.Tensor:
    """Random `pixel_values` of a model of `config`, always the same; float32 on the CPU.

    Two by default, since torch.export makes a constant of a batch of one.
    """
    frames = (config.num_frames,) if isinstance(config, MoNEViViTConfig) else ()
    shape = (batch_size, *frames, config.num_channels, *as_pair(config.image_size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


@contextmanager
def _in_place_of(path: str | os.PathLike) -> Iterator[Path]:
    """A name to write to; with what stands beside it, it moves to `path` at the end, unless an error was raised."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the file to write.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder, path.name)  # the same name: the file names the one that holds its weights
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.parent / file.name)


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f'ONNX needs {" and ".join(missing)}: pip install "mone[export]"')


__all__ = ["export_onnx", "export_program", "onnx_session", "quantize_onnx", "write_onnx"]
