"""The Triton kernels against a loop over single tokens, and models with them against models without.

On a GPU they run as they are. Without one they run in Triton's interpreter, in a process of its own, since Triton
reads `TRITON_INTERPRET` when it is imported. Where Triton is not installed, what runs them is skipped.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from reference import assert_close, randomise_
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mone import MoNEConfig, MoNEForImageClassification
from mone.nested_linear import NestedIn, NestedOut, lay_out_for_inference
from mone.triton_linear import Tiles, kernels_can_serve, normalise, project_in, project_out, row_table, runs_on


ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

device = "cuda" if ON_GPU else "cpu"
# The interpreter computes with NumPy, which has no bfloat16.
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16], ids=str)
needs_kernels = pytest.mark.skipif(not (HAS_TRITON and (ON_GPU or INTERPRETED)), reason="needs Triton and a GPU")
needs_gpu = pytest.mark.skipif(not (HAS_TRITON and ON_GPU), reason="needs Triton and a GPU")

if INTERPRETED and HAS_TRITON:
    # Triton 3.6 takes the int of an array with one value for a loop's end, which NumPy 2.4 refuses.
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_with_index(tensor, scope):
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_index

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
TILES = [None, Tiles(32, 32, 16, 4, 2, group=2), Tiles(16, 64, 64, 4, 3)]
# (B, slices) of which the first is the widest expert's, with D = 32 or 192.
SORTED = {
    "four experts": (3, ((0, 15, 32), (15, 26, 16), (26, 38, 8), (38, 41, 4))),
    "widths of ViT-Ti, and a prefix token": (2, ((0, 9, 192), (9, 12, 96), (12, 30, 48), (30, 41, 24))),
    "one image": (1, ((0, 4, 192), (4, 5, 96), (5, 40, 48), (40, 47, 24))),
    "without the largest and the third": (5, ((0, 7, 96), (7, 18, 24))),
    "one expert": (4, ((0, 13, 8),)),
}
sequences = pytest.mark.parametrize(("batch", "slices"), SORTED.values(), ids=SORTED)
tilings = pytest.mark.parametrize("tiles", TILES, ids=str)


@pytest.mark.skipif(not HAS_TRITON or ON_GPU or INTERPRETED, reason="the tests below run here")
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def model_width(slices):
    return 32 if slices[0][2] <= 32 else 192


def make(cls, in_features, out_features, dtype, bias=True):
    module = cls(in_features, out_features, bias=bias, device=device, dtype=dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=in_features**-0.5)
    return module.requires_grad_(False)


def random(*shape, dtype):
    return torch.randn(shape, device=device).to(dtype)


def naive(x, module, slices):
    """A token at a time, in double precision: (N, B, features) -> (N, B, outputs), 0 where the expert has none."""
    weight = module.weight.double().cpu()
    bias = torch.zeros(len(weight)) if module.bias is None else module.bias.double().cpu()
    x = x.double().cpu()
    y = torch.zeros(*x.shape[:2], len(weight), dtype=torch.float64)
    for start, stop, d in slices:
        for n in range(start, stop):
            for b in range(x.shape[1]):
                if isinstance(module, NestedIn):
                    y[n, b] = weight[:, :d] @ x[n, b, :d] + bias
                else:
                    y[n, b, :d] = (weight @ x[n, b] + bias)[:d]
    return y


@needs_kernels
@dtypes
@sequences
@pytest.mark.parametrize("bias", [True, False])
def test_norm(batch, slices, bias, dtype):
    torch.manual_seed(0)
    width = model_width(slices)
    norm = nn.LayerNorm(width, eps=1e-3, bias=bias, device=device, dtype=dtype).requires_grad_(False)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = 3 + 2 * random(slices[-1][1], batch, width, dtype=dtype)
    result, expected = normalise(x, norm, slices), norm.double()(x.double())
    assert result.dtype == dtype
    for start, stop, d in slices:
        assert_close(result[start:stop, :, :d], expected[start:stop, :, :d], 2 * TOLERANCE[dtype])


@needs_kernels
@dtypes
@sequences
@tilings
@pytest.mark.parametrize(("count", "bias"), [(1, True), (3, True), (2, False)])
def test_in_projection(batch, slices, tiles, count, bias, dtype):
    torch.manual_seed(0)
    width, outputs = model_width(slices), 40
    modules = tuple(make(NestedIn, width, outputs, dtype, bias) for _ in range(count))
    x = random(slices[-1][1], batch, width, dtype=dtype)
    expected = torch.cat([naive(x, module, slices) for module in modules], dim=-1)
    assert_close(project_in(x, modules, slices, tiles=tiles), expected, TOLERANCE[dtype])
    activated = project_in(x, modules, slices, gelu=True, tiles=tiles)
    assert activated.dtype == dtype
    assert_close(activated, nn.functional.gelu(expected), TOLERANCE[dtype])


@needs_kernels
@dtypes
@sequences
@tilings
@pytest.mark.parametrize(("in_place", "gated"), [(True, True), (True, False), (False, False)])
def test_out_projection(batch, slices, tiles, in_place, gated, dtype):
    torch.manual_seed(0)
    width, inputs, length = model_width(slices), 40, slices[-1][1]
    module = make(NestedOut, inputs, width, dtype, bias=gated)
    context = random(batch, length, inputs, dtype=dtype).transpose(0, 1)  # as attention leaves it
    residual = random(length, batch, width, dtype=dtype)
    gate = random(length, batch, 1, dtype=dtype) if gated else None
    update = naive(context, module, slices)
    expected = residual.double().cpu() + (update if gate is None else gate.double().cpu() * update)
    for x in (context, context.contiguous()):
        given = residual.clone()
        result = project_out(x, module, slices, given, gate, in_place, tiles)
        assert (result.data_ptr() == given.data_ptr()) == in_place
        assert in_place or torch.equal(given, residual)
        assert_close(result, expected, TOLERANCE[dtype])
        for start, stop, d in slices:
            assert torch.equal(result[start:stop, :, d:], residual[start:stop, :, d:])


@needs_kernels
@dtypes
def test_weights_laid_out_input_by_input(dtype):
    slices = SORTED["four experts"][1]
    x, hidden = random(41, 3, 32, dtype=dtype), random(41, 3, 64, dtype=dtype)
    first, last = make(NestedIn, 32, 64, dtype), make(NestedOut, 64, 32, dtype)
    results = []
    for _ in range(2):
        results.append((project_in(x, (first,), slices), project_out(hidden, last, slices, x)))
        lay_out_for_inference(first)
        lay_out_for_inference(last)
    for before, after in zip(*results, strict=True):
        assert_close(after, before, TOLERANCE[dtype])


def test_tiles_of_rows_have_one_expert_each():
    table = row_table(((0, 5, 32), (5, 7, 16), (7, 8, 8)), 3, 8, 8, torch.device("cpu"))
    assert table.tolist() == [[0, 15, 4], [8, 15, 4], [15, 21, 2], [21, 24, 1]]
    assert table.dtype == torch.int32


# --- whole models ----------------------------------------------------------------------------------------------------


def make_model(dtype=torch.float16, **config):
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    # One router: behind a second one, tokens may go to other experts when they are rounded otherwise.
    fields = {**fields, "image_size": 24, "patch_size": 4, "num_labels": 5, "router_layers": [0], **config}
    return randomise_(MoNEForImageClassification(MoNEConfig(**fields)), std=0.1).to(device, dtype).eval()


def images(dtype=torch.float16, batch=3):
    return torch.randn(batch, 3, 24, 24, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@pytest.fixture
def used(monkeypatch):
    """Lists the calls of kernels; those of the interpreter may run on any device."""
    calls = []

    def listed(function):
        def call(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr("mone.triton_linear.runs_on", lambda device: True)
    for function in (normalise, project_in, project_out):
        monkeypatch.setattr(f"mone.modeling_mone.{function.__name__}", listed(function))
    return calls


@needs_kernels
@dtypes
@pytest.mark.parametrize("capacity", [0.2, 0.4, (0, 0, 1, 0), (0.5, 0, 0.5, 0)], ids=str)
@pytest.mark.parametrize(
    "config",
    [{}, {"pooling": "cls"}, {"hidden_act": "quick_gelu"}, {"hidden_act": "gelu_new"}, {"qkv_bias": False}],
    ids=str,
)
def test_the_model_stays_the_same(config, capacity, dtype, used, monkeypatch):
    model, x = make_model(dtype, **config), images(dtype)
    with torch.no_grad():
        result = model(x, capacity=capacity, output_hidden_states=True)
        assert used == ["normalise", "project_in", "project_out"] * 4
        with torch.inference_mode():
            assert torch.equal(model(x, capacity=capacity).logits, result.logits)
        monkeypatch.setattr("mone.modeling_mone.kernels_can_serve", lambda *args: False)
        expected = model(x, capacity=capacity, output_hidden_states=True)
    assert len(used) == 24
    assert_close(result.logits, expected.logits, 2 * TOLERANCE[dtype])
    for state, other in zip(result.hidden_states, expected.hidden_states, strict=True):
        assert_close(state, other, 2 * TOLERANCE[dtype])


@needs_kernels
def test_prepared_weights(used):
    model, x = make_model(), images()
    with torch.no_grad():
        expected = model(x, capacity=0.4).logits
        assert_close(model.optimize_for_inference()(x, capacity=0.4).logits, expected, 2e-3)
    assert len(used) == 24


@needs_kernels
def test_a_layer_takes_any_strides_and_leaves_its_input(used, monkeypatch):
    layer, slices = make_model().mone.layers[0], ((0, 3, 64), (3, 9, 32), (9, 11, 8))
    gate = random(2, 11, 1, dtype=torch.float16).transpose(0, 1)
    x = random(2, 11, 64, dtype=torch.float16).transpose(0, 1)
    given = x.clone()
    with torch.no_grad():
        result = layer(x, gate, None, slices)
        assert torch.equal(x, given) and len(used) == 6
        monkeypatch.setattr("mone.modeling_mone.kernels_can_serve", lambda *args: False)
        assert_close(result, layer(x.contiguous(), gate, None, slices), 4e-3)


def possible(layer, x, slices):
    """Whether attention and MLP may run in kernels."""
    attention, mlp = layer.attention, layer.mlp
    return (
        kernels_can_serve(x, slices, layer.layernorm_before, *attention.children()),
        kernels_can_serve(x, slices, layer.layernorm_after, mlp.fc1, mlp.fc2),
    )


SLICES = ((0, 1, 64), (1, 4, 16))


def test_where_they_serve(used):
    layer = make_model().mone.layers[0]
    x = torch.zeros(4, 2, 64, device=device, dtype=torch.float16)
    with torch.no_grad():
        assert possible(layer, x, SLICES) == (True, True)
        assert possible(layer, x, ((0, 4, 32),)) == (True, True)
        assert possible(layer, x, ((0, 4, 64),)) == (False, False)  # where cuBLAS is as good
        assert possible(layer, x.float(), SLICES) == (False, False)
        with FlopCounterMode(display=False):
            assert possible(layer, x, SLICES) == (False, False)
        if ON_GPU:
            with torch.autocast("cuda", torch.bfloat16):
                assert possible(layer, x, SLICES) == (False, False)
    assert possible(layer, x, SLICES) == (False, False)


@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: mlp.fc1.register_forward_hook(lambda *args: None),
        lambda mlp: mlp.fc2.register_forward_pre_hook(lambda *args: None),
        lambda mlp: mlp.fc2.float(),
        lambda mlp: setattr(mlp.fc2.bias, "data", mlp.fc2.bias.float()),
        lambda mlp: setattr(mlp, "fc1", nn.Linear(64, 80, device=device, dtype=torch.float16)),
        lambda mlp: nn.utils.parametrizations.weight_norm(mlp.fc1),
        lambda mlp: setattr(mlp.fc1, "forward", lambda x, slices: x),
        lambda mlp: setattr(mlp.fc1.bias, "data", mlp.fc1.bias.repeat_interleave(2)[::2]),
    ],
    ids=["hook", "pre-hook", "dtype", "dtype of a bias", "another module", "parametrised", "forward", "strides"],
)
def test_not_on_projections_that_were_changed(change, used):
    layer = make_model().mone.layers[0]
    change(layer.mlp)
    with torch.no_grad():
        x = torch.zeros(4, 2, 64, device=device, dtype=torch.float16)
        assert possible(layer, x, SLICES) == (True, False)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.layernorm_after.register_forward_hook(lambda *args: None),
        lambda layer: setattr(layer, "layernorm_after", nn.Identity()),
        lambda layer: layer.layernorm_after.float(),
        lambda layer: setattr(layer.layernorm_after, "forward", lambda x: x),
    ],
    ids=["hook", "another module", "dtype", "forward"],
)
def test_not_behind_norms_that_were_changed(change, used):
    layer = make_model().mone.layers[0]
    change(layer)
    with torch.no_grad():
        x = torch.zeros(4, 2, 64, device=device, dtype=torch.float16)
        assert possible(layer, x, SLICES) == (True, False)


@needs_kernels
@pytest.mark.parametrize("place", ["attention", "mlp"])
@pytest.mark.parametrize("how", ["forward", "subclass", "hook of all modules"])
def test_what_replaces_a_module_runs(place, how, used):
    model, x = make_model(), images()
    module, seen = getattr(model.mone.layers[0], place), []
    with torch.no_grad():
        expected = model(x, capacity=0.4).logits
        assert len(used) == 12
        plain = module.forward

        def forward(*args, **kwargs):
            seen.append(place)
            return plain(*args, **kwargs)

        if how == "forward":
            module.forward = forward
        elif how == "subclass":
            module.__class__ = type("Mine", (type(module),), {"forward": lambda self, *a, **k: forward(*a, **k)})
        else:
            handle = nn.modules.module.register_module_forward_hook(lambda m, *args: seen.append(m))
        try:
            assert_close(model(x, capacity=0.4).logits, expected, 4e-3)
        finally:
            if how == "hook of all modules":
                handle.remove()
    assert place in seen or module in seen


@needs_kernels
def test_attention_that_replaces_sdpa_runs(used, monkeypatch):
    model, x = make_model(), images()
    with torch.no_grad():
        expected = model(x, capacity=0.4).logits
        calls = []

        def replaced(*args, **kwargs):
            calls.append(kwargs["scaling"])
            return sdpa_attention_forward(*args, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", replaced)
        assert_close(model(x, capacity=0.4).logits, expected, 2e-3)
    assert len(calls) == 2 and len(used) == 24


def test_a_lack_of_memory_does_not_last(monkeypatch):
    device, tries = torch.device("cuda", 7), []

    def trial(*args):
        tries.append(args)
        if len(tries) == 1:
            raise torch.OutOfMemoryError
        return True

    monkeypatch.setattr("mone.triton_linear.triton", "installed")
    monkeypatch.setattr("mone.triton_linear._runs_on", {})
    monkeypatch.setattr("mone.triton_linear._try_on", trial)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not runs_on(device) and not tries  # which allows no trial
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(torch.OutOfMemoryError):
        runs_on(device)
    assert runs_on(device) and runs_on(device) and len(tries) == 2


def test_only_on_gpus_that_run_them():
    assert not runs_on(torch.device("cpu"))
    if HAS_TRITON and ON_GPU:
        state = torch.cuda.get_rng_state()
        assert runs_on(torch.device("cuda", 0)) == (torch.cuda.get_device_capability() >= (8, 0))
        assert torch.equal(torch.cuda.get_rng_state(), state)


@needs_kernels
def test_not_where_a_hook_sees_what_a_module_computes(used):
    model = make_model()
    seen = []
    model.mone.layers[0].mlp.register_forward_hook(lambda *args: seen.append("mlp"))
    model.mone.layers[1].mlp.fc1.register_forward_hook(lambda *args: seen.append("fc1"))
    with torch.no_grad():
        model(images(), capacity=0.4)
    assert set(seen) == {"mlp", "fc1"}
    assert used == ["normalise", "project_in", "project_out"]  # of the second layer's attention


@needs_gpu
@dtypes
@pytest.mark.parametrize(("width", "batch"), [(384, 64), (768, 64), (768, 1)])
def test_sizes_of_real_models(width, batch, dtype):
    torch.manual_seed(0)
    slices = ((0, 31, width), (31, 62, width // 2), (62, 120, width // 4), (120, 197, width // 8))
    x, gate = random(197, batch, width, dtype=dtype), random(197, batch, 1, dtype=dtype)
    qkv = tuple(make(NestedIn, width, width, dtype) for _ in range(3))
    first, last = make(NestedIn, width, 4 * width, dtype), make(NestedOut, 4 * width, width, dtype)
    with torch.no_grad():
        expected = torch.cat([module.float()(x.float(), slices) for module in qkv], dim=-1)
        for module in qkv:
            module.to(dtype)
        assert_close(project_in(x, qkv, slices), expected, TOLERANCE[dtype])
        hidden = project_in(x, (first,), slices, gelu=True)
        assert_close(hidden, nn.functional.gelu(first.float()(x.float(), slices)), TOLERANCE[dtype])
        result = project_out(hidden, last, slices, x.clone(), gate, in_place=True)
        update = last.float()(hidden.float(), slices)
    assert_close(result, x.float() + gate.float() * update, TOLERANCE[dtype])
