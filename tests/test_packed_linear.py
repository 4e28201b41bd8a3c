"""Packed weights against the plain model: equal outputs, and never outputs of weights that have changed."""

import copy
import pickle
import time

import pytest
import torch

from mone import MoNEConfig, MoNEForImageClassification
from mone.modeling_mone import MoNEAttention, MoNEMLP, expert_widths, packs_win_with_few_rows
from mone.nested_linear import NestedIn, NestedOut
from mone.packed_linear import PackedLinear


WIDTHS = [2, 4, 8, 16]
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def any_batch_is_large(monkeypatch):
    """And few rows are not measured, which would depend on the machine."""
    monkeypatch.setattr("mone.packed_linear.SHARED_ROWS", 0)
    monkeypatch.setattr("mone.modeling_mone.packs_win_with_few_rows", lambda model: False)


@pytest.fixture
def calls(monkeypatch):
    """Names a projection for each product with packed weights."""
    made = []
    call = PackedLinear.__call__
    monkeypatch.setattr(PackedLinear, "__call__", lambda self, *args: made.append(args[1]) or call(self, *args))
    return made


def make_model(**config):
    config = {
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
        **{"image_size": 32, "patch_size": 8, "num_labels": 3, **config},
    }
    torch.manual_seed(0)
    model = MoNEForImageClassification(MoNEConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
        for router in model.mone.routers:
            router.alpha.fill_(0.5)
    return model


def run(model, capacity=0.4):
    with torch.no_grad():
        return model(IMAGES, capacity=capacity).logits


HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="oneDNN has no bfloat16 products for this CPU")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("d", WIDTHS)
def test_products_are_those_of_the_weights_slices(d, bias):
    torch.manual_seed(1)
    q, k, out = NestedIn(16, 12, bias=bias), NestedIn(16, 12, bias=bias), NestedOut(12, 16)
    x, hidden = torch.randn(5, 3, 16), torch.randn(5, 3, 12)
    with torch.no_grad():
        side_by_side = PackedLinear((q, k), WIDTHS)(x, d)
        expected = torch.cat([torch.nn.functional.linear(x[..., :d], m.weight[:, :d], m.bias) for m in (q, k)], -1)
        torch.testing.assert_close(side_by_side, expected)
        torch.testing.assert_close(
            PackedLinear((q,), WIDTHS)(x, d, "gelu"), torch.nn.functional.gelu(expected[..., :12])
        )
        torch.testing.assert_close(
            PackedLinear((out,), WIDTHS)(hidden, d),
            torch.nn.functional.linear(hidden, out.weight[:d], out.bias[:d]),
        )


@pytest.mark.parametrize("capacity", [0.125, 0.2, 0.4, 1.0, (0, 0, 1, 0), (0.5, 0, 0.5, 0)])
@pytest.mark.parametrize(
    "config",
    [{}, {"pooling": "cls", "router_layers": (0, 1)}, {"hidden_act": "quick_gelu"}, {"qkv_bias": False}],
    ids=str,
)
def test_the_model_stays_the_same(config, capacity, calls):
    model = make_model(**config)
    expected = run(model, capacity)
    assert not calls
    model.optimize_for_inference()
    torch.testing.assert_close(run(model, capacity), expected, atol=1e-5, rtol=0)
    assert calls
    with torch.inference_mode():
        torch.testing.assert_close(model(IMAGES, capacity=capacity).logits, expected, atol=1e-5, rtol=0)


def test_arg_max_routing_stays_the_same():
    model = make_model(router_type="argmax")
    expected = run(model)
    torch.testing.assert_close(run(model.optimize_for_inference()), expected, atol=1e-5, rtol=0)


@needs_bfloat16
@pytest.mark.parametrize("capacity", [0.125, 0.4, 1.0])
def test_the_model_stays_the_same_in_bfloat16(capacity, calls):
    """Both differ from float32 by rounding, and from each other by no more than that."""
    exact, model = run(make_model(), capacity), make_model().bfloat16()
    rounding = (run(model, capacity) - exact).abs().max()
    model.optimize_for_inference()
    assert not calls
    assert (run(model, capacity) - exact).abs().max() <= 2 * rounding
    assert calls


@pytest.mark.skipif(HAS_BFLOAT16, reason="this CPU has it")
def test_a_cpu_without_bfloat16_does_without_it():
    assert make_model().bfloat16().optimize_for_inference().mone.layers[0].mlp.packed is None


def test_only_large_batches_use_it(calls, monkeypatch):
    monkeypatch.setattr("mone.packed_linear.SHARED_ROWS", 16 * len(IMAGES))
    model = make_model().optimize_for_inference()
    run(model)
    assert not calls
    with torch.no_grad():
        model(torch.cat([IMAGES, IMAGES[:1]]), capacity=0.4)
    assert calls


@pytest.mark.parametrize("config", [{}, {"num_experts": 1}, {"hidden_act": "quick_gelu"}], ids=str)
@pytest.mark.parametrize("slow", ["packed", "plain"])
def test_small_batches_use_what_is_faster(slow, config, calls, monkeypatch):
    monkeypatch.setattr("mone.packed_linear.SHARED_ROWS", 1000)
    monkeypatch.setattr("mone.modeling_mone.packs_win_with_few_rows", packs_win_with_few_rows)
    model = make_model(**config)
    capacity = 1.0 if config.get("num_experts") == 1 else 0.4
    expected = run(model, capacity)
    delayed, name = (PackedLinear, "__call__") if slow == "packed" else (NestedIn, "forward")
    function = getattr(delayed, name)
    with monkeypatch.context() as patch:
        patch.setattr(delayed, name, lambda *args: time.sleep(0.01) or function(*args))
        model.optimize_for_inference()
    calls.clear()
    torch.testing.assert_close(run(model, capacity), expected, atol=1e-5, rtol=0)
    assert bool(calls) == (slow == "plain")


def step(model):
    model(IMAGES, labels=torch.tensor([0, 1, 2]), capacity=0.4).loss.backward()
    torch.optim.SGD(model.parameters(), 0.5).step()


def load(model):
    other = make_model()
    step(other)
    model.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        step,
        load,
        torch.no_grad()(lambda model: model.mone.layers[1].mlp.fc2.bias.mul_(2)),
        lambda model: setattr(model.mone.layers[0].attention.k_proj, "weight", torch.nn.Parameter(torch.ones(32, 32))),
        lambda model: setattr(model.mone.layers[0].mlp, "fc1", make_model().mone.layers[1].mlp.fc1),
        lambda model: model.double().float(),
        lambda model: [parameter.data.mul_(1.5) for parameter in model.mone.layers.parameters()],
        torch.inference_mode()(lambda model: model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()})),
    ],
    ids=["step", "load", "in place", "parameter", "module", "to", "data", "load under inference mode"],
)
def test_changed_weights_are_never_answered_from_old_ones(change, calls):
    model, plain = make_model().optimize_for_inference(), make_model()
    change(model)
    change(plain)
    torch.testing.assert_close(run(model), run(plain), atol=1e-5, rtol=0)
    calls.clear()
    torch.testing.assert_close(run(model.optimize_for_inference()), run(plain), atol=1e-5, rtol=0)
    assert len(calls) == 4 * 4 * 2  # products, experts, layers


def test_prepared_under_inference_mode_it_can_be_used_outside():
    model, plain = make_model(), make_model()
    with torch.inference_mode():
        model.optimize_for_inference()
    torch.testing.assert_close(run(model), run(plain), atol=1e-5, rtol=0)
    step(model.train())
    with torch.inference_mode():
        made = make_model()
    torch.testing.assert_close(run(made.optimize_for_inference()), run(plain), atol=1e-5, rtol=0)


def test_recorded_outputs_do_not_put_it_out_of_use(calls):
    """The hooks by which transformers records them stay on the layers for good."""
    model = make_model().optimize_for_inference()
    with torch.no_grad():
        model(IMAGES, capacity=0.4, output_hidden_states=True)
    assert model.mone.layers[0].attention._forward_hooks
    calls.clear()
    run(model)
    assert len(calls) == 4 * 4 * 2  # products, experts, layers


def test_training_frees_it():
    model = make_model().optimize_for_inference()
    modules = [m for m in model.modules() if isinstance(m, (MoNEAttention, MoNEMLP))]
    assert all(module.packed is not None for module in modules)
    assert all(module.packed is None for module in modules if model.train())


def test_copies_and_state_come_without_it(tmp_path):
    model = make_model().optimize_for_inference()
    expected = run(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.mone.layers[0].mlp.packed is None
        torch.testing.assert_close(run(copied), expected, atol=1e-5, rtol=0)
    assert model.state_dict().keys() == make_model().state_dict().keys()


def test_hooks_and_adapters_are_not_passed_by(calls):
    model = make_model()
    expected = run(model)
    model.optimize_for_inference()
    seen = []
    layer = model.mone.layers[0]
    handles = [layer.mlp.fc1.register_forward_hook(lambda *args: seen.append(1))]
    handles.append(layer.attention.q_proj.register_forward_pre_hook(lambda *args: seen.append(2)))
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=0)
    assert {1, 2} == set(seen)
    for handle in handles:
        handle.remove()

    class Adapter(NestedIn):
        def forward(self, x, slices):
            return 0 * super().forward(x, slices)

    adapter = Adapter(32, 48)
    adapter.load_state_dict(layer.mlp.fc1.state_dict())
    adapter.weight, adapter.bias = layer.mlp.fc1.weight, layer.mlp.fc1.bias
    layer.mlp.fc1 = adapter
    assert (run(model) - expected).abs().max() > 1e-3


def test_a_replaced_forward_runs(calls):
    """As Accelerate's hooks replace it."""
    model = make_model().optimize_for_inference()
    expected = run(model)
    assert calls
    projection, seen = model.mone.layers[0].mlp.fc1, []
    plain = projection.forward

    def replaced(*args):
        seen.append(args)
        return plain(*args)

    projection.forward = replaced
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=0)
    assert seen


def test_autocast_and_other_types_do_without_it(calls):
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model)
        torch.testing.assert_close(run(model.optimize_for_inference()), expected)
    assert not calls
    assert make_model().half().optimize_for_inference().mone.layers[0].mlp.packed is None


def test_widths():
    assert expert_widths(make_model().config) == [4, 8, 16, 32]
