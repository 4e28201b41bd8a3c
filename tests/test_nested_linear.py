"""Nested projections against a loop over tokens, forward and gradients, and how rows are shared."""

import contextlib

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from mone.nested_linear import (
    SHARED_ROWS,
    NestedIn,
    NestedOut,
    add_out,
    blocks,
    groups,
    lay_out_for_inference,
    nested_in,
    nested_in_together,
)
from mone.packed_linear import PackedLinear


D, OTHER = 16, 12
ALL = ((0, 2, 16), (2, 5, 8), (5, 6, 4), (6, 10, 2))
SLICES = [ALL, ((0, 10, 16),), ((0, 10, 4),), ((0, 3, 8), (3, 10, 2)), ((0, 1, 16), (1, 10, 2))]


def naive_in(x, weight, bias, slices):
    rows = []
    for start, stop, d in slices:
        for n in range(start, stop):
            rows.append(x[n, :, :d] @ weight[:, :d].T + (0 if bias is None else bias))
    return torch.stack(rows)


def naive_out(x, weight, bias, slices):
    rows = []
    for start, stop, d in slices:
        for n in range(start, stop):
            update = x[n] @ weight[:d].T + bias[:d]
            rows.append(torch.nn.functional.pad(update, (0, slices[0][2] - d)))
    return torch.stack(rows)


@pytest.fixture(params=["apart", "together"])
def sharing(request, monkeypatch):
    """Every expert for itself, or all in shared products, whatever the number of rows."""
    blocks.cache_clear()
    monkeypatch.setattr("mone.nested_linear.SHARED_ROWS", 0 if request.param == "apart" else 10**6)
    yield request.param
    blocks.cache_clear()


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("slices", SLICES, ids=str)
@pytest.mark.parametrize("kind", ["in", "out"])
def test_products_and_gradients_equal_a_loop_over_tokens(kind, slices, batch, bias, laid_out, sharing):
    if kind == "out" and not bias:
        pytest.skip("out-projections have a bias")
    torch.manual_seed(0)
    layer = (NestedIn(D, OTHER, bias=bias) if kind == "in" else NestedOut(OTHER, D)).double()
    if laid_out:
        lay_out_for_inference(layer)
    x = torch.randn(10, batch, D if kind == "in" else OTHER, dtype=torch.float64, requires_grad=True)
    naive = naive_in if kind == "in" else naive_out
    expected = naive(x, layer.weight, layer.bias, slices)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, slices), expected)
    y = layer(x, slices)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(expected)
    inputs = [x, layer.weight] + ([layer.bias] if bias else [])
    wanted = torch.autograd.grad(expected, inputs, direction)
    for have, want in zip(torch.autograd.grad(y, inputs, direction), wanted, strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("after_gelu", [False, True])
@pytest.mark.parametrize("slices", [ALL, ((0, 10, 4),)], ids=str)
def test_gradients_of_gradients_are_autograds(slices, after_gelu):
    """They were silently wrong where `torch.autograd.grad` names what it differentiates by."""
    torch.manual_seed(0)
    module = NestedOut(OTHER, D).double()

    def block(x, weight, bias, out_weight, out_bias):
        hidden = nested_in(x, weight, bias, slices)
        parameters = {"weight": out_weight, "bias": out_bias}
        return torch.func.functional_call(module, parameters, (hidden, slices, after_gelu))

    shapes = [(10, 2, D), (OTHER, D), (OTHER,), (D, OTHER), (D,)]
    operands = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(block, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(block, operands, fast_mode=True)

    first = torch.autograd.grad(block(*operands).square().sum(), operands)
    again = torch.autograd.grad(block(*operands).square().sum(), operands, create_graph=True)
    assert all(torch.allclose(a, b) for a, b in zip(first, again, strict=True))
    frozen = [operand.detach().requires_grad_(place == 0) for place, operand in enumerate(operands)]
    (gradient,) = torch.autograd.grad(block(*frozen).square().sum(), frozen[:1], create_graph=True)
    assert torch.allclose(gradient, first[0]) and gradient.requires_grad


@pytest.mark.parametrize("kind", [NestedIn, NestedOut])
def test_a_bias_may_change_before_the_backward(kind):
    """No derivative needs it, as of torch's linear layers."""
    module = kind(D, D)
    module.weight.requires_grad_(False)
    x = torch.randn(10, 2, D, requires_grad=True)
    output = module(x, ALL)
    with torch.no_grad():
        module.bias.add_(1.0)
    output.sum().backward()
    assert module.bias.grad.any() and x.grad.any()


def test_a_weight_that_also_made_the_input_gets_its_own_gradient_once():
    torch.manual_seed(0)
    weight = torch.randn(D, D, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(10, 2, D, dtype=torch.float64)

    def twice(weight):
        return nested_in(nested_in(tokens, weight, None, ALL), weight, None, ALL)

    assert torch.autograd.gradgradcheck(twice, [weight], fast_mode=True)


def test_frozen_operands_get_no_gradient(sharing):
    for layer, width in ((NestedIn(D, OTHER), D), (NestedOut(OTHER, D), OTHER)):
        x = torch.randn(10, 2, width, requires_grad=True)
        layer.weight.requires_grad_(False)
        layer(x, ALL).sum().backward()
        assert x.grad is not None and layer.bias.grad is not None and layer.weight.grad is None
        layer.weight.requires_grad_(True)
        layer(x.detach(), ALL).sum().backward()
        assert layer.weight.grad is not None


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_blocks_cover_every_feature_of_every_token_once(batch, sharing):
    covered = torch.zeros(10 * batch, D)
    for start, stop, low, high in blocks(ALL, batch):
        covered[start:stop, low:high] += 1
    expected = torch.zeros(10, batch, D)
    for start, stop, d in ALL:
        expected[start:stop, :, :d] = 1
    assert torch.equal(covered, expected.flatten(0, 1))
    assert len(blocks(ALL, batch)) == 4


def test_few_rows_share_products_and_many_do_not():
    assert groups(ALL, 1) == [ALL]
    assert groups(ALL, SHARED_ROWS) == [(expert,) for expert in ALL]
    assert groups(ALL, SHARED_ROWS // 5) == [ALL[:2], ALL[2:]]


def test_the_layout_changes_memory_alone():
    layer = NestedIn(D, OTHER)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    lay_out_for_inference(layer)
    assert layer.weight.stride() == (1, OTHER) and isinstance(layer.weight, torch.nn.Parameter)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    lay_out_for_inference(layer)
    assert layer.weight.stride() == (1, OTHER), "twice is once"


@pytest.mark.parametrize("watched", [None, "forward", "backward", "everywhere"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("slices", [ALL, ((0, 10, 16),), ((0, 3, 8), (3, 10, 2))], ids=str)
def test_projections_together_equal_each_by_itself(slices, bias, watched):
    torch.manual_seed(0)
    modules = [NestedIn(D, OTHER, bias=bias).double() for _ in range(3)]
    calls = []
    register = {
        "forward": modules[1].register_forward_hook,
        "backward": modules[1].register_full_backward_hook,
        "everywhere": register_module_forward_hook,
    }
    # A hook is to see its projection.
    handle = register[watched](lambda module, *_: calls.append(module)) if watched else contextlib.nullcontext()
    modules[2].weight.requires_grad_(False)
    x = torch.randn(10, 3, D, dtype=torch.float64, requires_grad=True)
    leaves = [x] + [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    grads = torch.randn(3, 10, 3, OTHER, dtype=torch.float64)

    expected = [naive_in(x, module.weight, module.bias, slices) for module in modules]
    with handle:
        outputs = nested_in_together(x, tuple(modules), slices)
        found, wanted = (
            torch.autograd.grad(sum((y * grad).sum() for y, grad in zip(ys, grads, strict=True)), leaves)
            for ys in (outputs, expected)
        )
    assert calls == {None: [], "everywhere": modules}.get(watched, modules[1:2])
    torch.testing.assert_close(torch.stack(outputs), torch.stack(expected))
    torch.testing.assert_close(found, wanted)
    for training in (True, False):
        for module in modules:
            module.train(training)
        with torch.no_grad():
            outputs = nested_in_together(x, tuple(modules), slices)
        torch.testing.assert_close(torch.stack(outputs), torch.stack(expected))


class Quantised(torch.nn.Parameter):
    """Stands for quantised weights such as torchao's, which can be cut and know linear layers, and little else."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.t, torch.Tensor.transpose, torch.cat, torch.addmm, torch.matmul, torch.mm):
            raise NotImplementedError(f"{function} of quantised weights")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("slices", [((0, 10, D),), ((0, 2, D), (2, 10, D // 4))])
def test_weights_that_know_linear_layers_only(slices, requires_grad):
    x, residual = torch.randn(10, 3, D), torch.randn(10, 3, D)
    modules = [NestedIn(D, OTHER), NestedIn(D, OTHER), NestedIn(D, OTHER), NestedOut(D, D)]
    with torch.set_grad_enabled(requires_grad):

        def run():
            *projections, last = modules
            added = [] if requires_grad else [add_out(residual, x, last, slices)]
            return [*nested_in_together(x, tuple(projections), slices), last(x, slices), *added]

        expected = run()
        for module in modules:
            module.weight = Quantised(module.weight.data)
            lay_out_for_inference(module)
            assert not PackedLinear.is_possible(module)
        for output, wanted in zip(run(), expected, strict=True):
            torch.testing.assert_close(output, wanted)
