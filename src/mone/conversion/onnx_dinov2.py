# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""The DINOv2 backbone inside an ONNX file that PyTorch's tracing exporter wrote, as a transformers state dict.

The exporter keeps the names of parameters that it uses as they are (`backbone.encoder.layer.0.norm1.weight`). It
transposes the weight of a linear layer and names it by number: it is found through the bias, which is added to its
product. Positions are numbered, too, since they were taken apart.
"""

from pathlib import Path

import torch


# Of the names of the backbone's weights.
PREFIX = "backbone."


def read_onnx(file: str | Path) -> dict[str, torch.Tensor]:
    """State dict of the model whose weights carry [`PREFIX`] in the ONNX file, without it.

    Raises:
        ImportError: without the package `onnx`.
        ValueError: the file is no ONNX model, or has no weights of that name.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError("Reading an ONNX file needs the package onnx: pip install onnx.") from error
    try:
        graph = onnx.load(str(file)).graph
    except DecodeError as error:
        raise ValueError(f"{file} is no ONNX model, or is cut short: {error}.") from error

    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    weights = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    if not weights:
        raise ValueError(f"{file} has no weights named {PREFIX}...")
    for node in graph.node:
        numbered = [name for name in node.input if name in tensors and not name.startswith(PREFIX)]
        if node.op_type == "Add":
            bias = next((name for name in node.input if name.startswith(PREFIX) and name.endswith(".bias")), None)
            products = [producers[name] for name in node.input if name in producers]
            if bias is None or not products or products[0].op_type != "MatMul" or products[0].input[1] not in tensors:
                continue
            weight = tensors[products[0].input[1]].t().contiguous()
            weights[bias.removeprefix(PREFIX).removesuffix("bias") + "weight"] = weight
        elif f"{PREFIX.rstrip('.')}/embeddings/" in node.name and numbered and node.op_type in ("Concat", "Reshape"):
            weights[f"embeddings.{node.op_type}"] = tensors[numbered[0]]
    positions = [weights.pop(f"embeddings.{name}", None) for name in ("Concat", "Reshape")]
    if any(part is None or part.dim() != 3 for part in positions):
        raise ValueError(f"{file} has no positions of a class token and of patches where DINOv2's exporter puts them.")
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return weights
