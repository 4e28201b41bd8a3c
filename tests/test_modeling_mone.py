"""The image model against a reference that shares no code with it, against transformers' ViT, and as a citizen of
transformers: checkpoints, losses, recorded outputs, attention implementations, precision, compilation.

Not tested here: which expert gets a token (test_routing) and how many it gets (test_capacity), pipelines, training.
"""

import math
import shutil

import pytest
import torch
from reference import assert_close, check_forward_and_gradients, double_weights, randomise_, reference_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, ViTConfig, ViTForImageClassification
from transformers.activations import GELUActivation

from mone import (
    MoNEConfig,
    MoNEForImageClassification,
    MoNEModel,
    MoNEViViTConfig,
    MoNEViViTForVideoClassification,
)
from mone.capacity import resolve_capacity, tokens_per_expert


NUM_LABELS = 5
CAPACITIES = [0.15, 0.3, 0.5, 0.8, 1.0]
ONE_HOTS = [[float(i == j) for j in range(4)] for i in range(4)]
THREE_ROUTERS = (0, 1, 3)


def tiny_config(**fields):
    """16 tokens of width 32: experts of width 4, 8, 16, 32."""
    defaults = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 16,
        "patch_size": 4,
        "num_labels": NUM_LABELS,
    }
    return MoNEConfig(**{**defaults, **fields})


def make_model(std=0.2, alpha=0.5, attn_implementation="sdpa", model_class=MoNEForImageClassification, **fields):
    torch.manual_seed(0)
    model = model_class._from_config(tiny_config(**fields), attn_implementation=attn_implementation)
    return randomise_(model, std, alpha).eval()


def make_images(batch=2, size=(16, 16), channels=3, seed=2):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("router_layers", [(0,), THREE_ROUTERS], ids=str)
@pytest.mark.parametrize("capacity", [*CAPACITIES, *ONE_HOTS, [0.5, 0.0, 0.3, 0.2]], ids=str)
def test_model_equals_the_reference_forward_and_backward(capacity, router_layers, pooling):
    model = make_model(router_layers=router_layers, pooling=pooling)
    check_forward_and_gradients(model, capacity, make_images())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("router_layers", [(1,), (1, 3)], ids=str)
@pytest.mark.parametrize("capacity", [0.15, 0.4, [1.0, 0.0, 0.0, 0.0]], ids=str)
def test_layers_before_the_first_router_run_the_full_model(capacity, router_layers, pooling):
    model = make_model(router_layers=router_layers, pooling=pooling)
    check_forward_and_gradients(model, capacity, make_images())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("router_layers", [(0,), (1, 2)], ids=str)
def test_argmax_model_equals_the_reference(router_layers, pooling):
    model = make_model(router_type="argmax", router_layers=router_layers, pooling=pooling)
    images = make_images(batch=4)
    check_forward_and_gradients(model, 0.4, images)
    experts = model(images, output_router_logits=True).expert_indices
    assert torch.cat(experts).unique().numel() == 4  # the comparison saw every expert
    # No capacity bound: what the call asks for has no say.
    assert torch.equal(model(images, capacity=0.125).logits, model(images, capacity=1.0).logits)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("capacity", [0.15, 0.4, 1.0], ids=str)
def test_random_router_model_equals_the_reference(capacity, pooling):
    model = make_model(router_type="random", router_layers=(0, 2), pooling=pooling)
    images = make_images()
    recorded = model(
        images, capacity=capacity, generator=torch.Generator().manual_seed(0), output_router_logits=True
    ).router_logits
    check_forward_and_gradients(model, capacity, images, scores=recorded, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 1},
        {"num_experts": 2},
        {"num_experts": 3, "capacity_beta": 0.5, "capacity_delta": 3.0},
        {"num_experts": 6},
        {"qkv_bias": False},
        {"image_size": (8, 24), "patch_size": (4, 8)},
        {"num_channels": 1},
        {"num_attention_heads": 1},
        {"layer_norm_eps": 0.1},
    ],
    ids=str,
)
def test_other_configs_equal_the_reference(fields):
    model = make_model(router_layers=(0, 2), **fields)
    size = fields.get("image_size", (16, 16))
    images = make_images(size=size, channels=fields.get("num_channels", 3))
    capacity = {1: 1.0, 2: 0.7}.get(fields.get("num_experts"), 0.35)
    check_forward_and_gradients(model, capacity, images)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("router_layers", [(0,), (1, 3), THREE_ROUTERS], ids=str)
@pytest.mark.parametrize("capacity", [0.3, 0.6, 1.0])
def test_recorded_outputs_equal_the_reference_in_original_order(capacity, router_layers, pooling):
    """Inside, tokens are sorted anew by every router; nothing of that may be seen outside."""
    model = make_model(router_layers=router_layers, pooling=pooling, attn_implementation="eager")
    images = make_images()
    expected = reference_model(double_weights(model), model.config, images.double(), capacity)
    options = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    base = model.mone(images, capacity=capacity, **options)
    assert_close(base.last_hidden_state, expected.last_hidden_state)
    assert_close(base.pooler_output, expected.pooler_output)
    sequence = 17 if pooling == "cls" else 16
    for outputs in (base, model(images, capacity=capacity, **options)):
        assert len(outputs.hidden_states) == 5 and len(outputs.attentions) == 4
        assert len(outputs.router_logits) == len(outputs.expert_indices) == len(router_layers)
        for name in ("hidden_states", "attentions", "router_logits"):
            for actual, reference in zip(getattr(outputs, name), getattr(expected, name), strict=True):
                assert_close(actual, reference)
        for actual, reference in zip(outputs.expert_indices, expected.expert_indices, strict=True):
            assert not actual.is_floating_point() and torch.equal(actual, reference)
        assert outputs.hidden_states[0].shape == (2, sequence, 32)
        assert outputs.attentions[0].shape == (2, 4, sequence, sequence)
        assert outputs.router_logits[0].shape == (2, 16, 4)


@pytest.mark.parametrize("capacity", [0.15, 0.4, 0.55, 1.0, *ONE_HOTS], ids=str)
@pytest.mark.parametrize("router_type", ["learned", "random"])
def test_expert_indices_count_as_the_capacity_says(router_type, capacity):
    """For every image of the batch and every router."""
    model = make_model(router_layers=THREE_ROUTERS, router_type=router_type)
    outputs = model(make_images(batch=3), capacity=capacity, output_router_logits=True)
    counts = tokens_per_expert(resolve_capacity(capacity), 16)
    for experts in outputs.expert_indices:
        for image in experts:
            assert tuple(torch.bincount(image, minlength=4).tolist()) == counts


@torch.no_grad()
def test_a_router_type_that_is_set_afterwards_is_refused():
    """It would change nothing, and what is saved could not be loaded."""
    model = make_model(router_type="learned")
    model.config.router_type = "random"
    with pytest.raises(ValueError, match="router_type='random', but this model's routers are 'learned'"):
        model(make_images(), capacity=0.4)


def test_random_router_follows_its_generator():
    model, images = make_model(router_type="random"), make_images()

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return model(images, capacity=0.4, generator=generator, output_router_logits=True)

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first.logits, again.logits)
    assert torch.equal(first.expert_indices[0], again.expert_indices[0])
    assert not torch.equal(first.expert_indices[0], other.expert_indices[0])
    assert not torch.equal(first.logits, other.logits)
    assert not any("routers" in name for name in model.state_dict())


# --- parity with transformers' ViT ----------------------------------------------------------------------------------


def make_vit_and_mone(attn_implementation="eager", **fields):
    """A ViT and a MoNE with its weights, mapped by prefix alone."""
    model = make_model(pooling="cls", alpha=0.0, attn_implementation=attn_implementation, **fields)
    names = ViTConfig().to_dict().keys() & model.config.to_dict().keys() - {"model_type", "architectures"}
    vit_config = ViTConfig(**{name: getattr(model.config, name) for name in names})
    vit = ViTForImageClassification._from_config(vit_config, attn_implementation=attn_implementation)
    randomise_(vit).eval()
    state_dict = {name.replace("vit.", "mone.", 1): value for name, value in vit.state_dict().items()}
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    assert unexpected == []
    assert all(name.startswith("mone.routers.") for name in missing)
    return vit, model


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "fields", [{}, {"qkv_bias": False}, {"router_layers": (1, 2)}, {"hidden_act": "relu"}], ids=str
)
def test_dense_model_equals_vit(fields, attn_implementation):
    vit, model = make_vit_and_mone(attn_implementation, **fields)
    images = make_images()
    options = {"output_hidden_states": True, "output_attentions": attn_implementation == "eager"}
    expected, actual = vit(images, **options), model(images, capacity=1.0, **options)
    assert_close(actual.logits, expected.logits)
    assert len(actual.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_close(ours, theirs)
    if attn_implementation == "eager":
        assert len(expected.attentions) == 4
        for ours, theirs in zip(actual.attentions, expected.attentions, strict=True):
            assert_close(ours, theirs)
    base = model.mone(images, capacity=1.0).last_hidden_state
    assert_close(base, vit.vit(images).last_hidden_state)
    # capacity 1.0 is the default.
    assert torch.equal(model(images).logits, actual.logits)


@torch.no_grad()
@pytest.mark.parametrize("size", [(24, 24), (8, 8), (16, 24), (8, 32), (16, 16)], ids=str)
def test_dense_model_equals_vit_at_another_image_size(size):
    """8x32 pixels make as many patches as 16x16, in another grid."""
    vit, model = make_vit_and_mone()
    images = make_images(size=size)
    expected = vit(images, interpolate_pos_encoding=True)
    assert_close(model(images, capacity=1.0, interpolate_pos_encoding=True).logits, expected.logits)


def test_dense_gradients_equal_vits():
    vit, model = make_vit_and_mone("sdpa")
    images = make_images()
    vit(images).logits.square().sum().backward()
    model(images, capacity=1.0).logits.square().sum().backward()
    ours = dict(model.named_parameters())
    for name, parameter in vit.named_parameters():
        assert_close(ours[name.replace("vit.", "mone.", 1)].grad, parameter.grad)


@torch.no_grad()
def test_another_image_size_at_low_capacity_routes_its_own_number_of_tokens():
    model = make_model(router_layers=(0, 2))
    outputs = model.mone(
        make_images(size=(24, 32)), capacity=0.4, interpolate_pos_encoding=True, output_router_logits=True
    )
    assert outputs.last_hidden_state.shape == (2, 48, 32)
    counts = tokens_per_expert(resolve_capacity(0.4), 48)
    for experts in outputs.expert_indices:
        assert torch.bincount(experts[0], minlength=4).tolist() == list(counts)


def sliced_dense_logits(model, pixel_values, d):
    """MatViT's nested model: a dense ViT (mean pooling) on weights sliced to d, all tokens at once."""
    weights = {name.removeprefix("mone."): value for name, value in model.state_dict().items()}
    config = model.config
    linear = nn.functional.linear

    def norm(name, x):
        scale, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return nn.functional.layer_norm(x, x.shape[-1:], scale, bias, config.layer_norm_eps)

    projection = "embeddings.patch_embeddings.projection"
    x = nn.functional.conv2d(
        pixel_values, weights[f"{projection}.weight"], weights[f"{projection}.bias"], stride=config.patch_size
    )
    x = x.flatten(2).transpose(1, 2) + weights["embeddings.position_embeddings"]
    for index in range(config.num_hidden_layers):
        part = {
            name.removeprefix(f"layers.{index}."): value
            for name, value in weights.items()
            if name.startswith(f"layers.{index}.")
        }
        h = norm(f"layers.{index}.layernorm_before", x)[..., :d]
        q, k, v = (
            linear(h, part[f"attention.{kind}_proj.weight"][:, :d], part[f"attention.{kind}_proj.bias"])
            .unflatten(-1, (config.num_attention_heads, -1))
            .transpose(1, 2)
            for kind in "qkv"
        )
        context = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        update = linear(context, part["attention.o_proj.weight"][:d], part["attention.o_proj.bias"][:d])
        x = torch.cat([x[..., :d] + update, x[..., d:]], dim=-1)
        h = linear(
            norm(f"layers.{index}.layernorm_after", x)[..., :d], part["mlp.fc1.weight"][:, :d], part["mlp.fc1.bias"]
        )
        update = linear(nn.functional.gelu(h), part["mlp.fc2.weight"][:d], part["mlp.fc2.bias"][:d])
        x = torch.cat([x[..., :d] + update, x[..., d:]], dim=-1)
    return linear(norm("layernorm", x).mean(dim=1), weights["classifier.weight"], weights["classifier.bias"])


@torch.no_grad()
@pytest.mark.parametrize("expert", range(4))
@pytest.mark.parametrize("router_type", ["learned", "random"])
def test_one_hot_capacity_is_the_sliced_dense_model(expert, router_type):
    model, images = make_model(alpha=0.0, router_type=router_type, router_layers=(0, 2)), make_images()
    expected = sliced_dense_logits(model, images, 32 // 2 ** (3 - expert))
    assert_close(model(images, capacity=ONE_HOTS[expert]).logits, expected)


@torch.no_grad()
def test_the_ends_of_the_capacity_range_are_one_hot():
    model, images = make_model(), make_images()
    assert torch.equal(model(images, capacity=0.125).logits, model(images, capacity=ONE_HOTS[0]).logits)
    assert torch.equal(model(images, capacity=1.0).logits, model(images, capacity=ONE_HOTS[3]).logits)


# --- invariants -----------------------------------------------------------------------------------------------------

OPTIONS = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}


@torch.no_grad()
@pytest.mark.parametrize("capacity", [0.3, 1.0])
@pytest.mark.parametrize("router_type", ["learned", "argmax"])
def test_an_image_does_not_see_the_others_in_its_batch(router_type, capacity):
    model = make_model(router_layers=THREE_ROUTERS, router_type=router_type, attn_implementation="eager")
    images = make_images(batch=5)
    together = model(images, capacity=capacity, **OPTIONS)
    for n in range(5):
        alone = model(images[n : n + 1], capacity=capacity, **OPTIONS)
        assert_close(alone.logits, together.logits[n : n + 1])
        assert torch.equal(alone.expert_indices[-1], together.expert_indices[-1][n : n + 1])
        assert_close(alone.hidden_states[-1], together.hidden_states[-1][n : n + 1])


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("router_type", ["learned", "argmax"])
@pytest.mark.parametrize("capacity", [0.3, 0.6, 1.0])
def test_permuting_patches_with_their_positions_permutes_every_output(capacity, router_type, pooling):
    """Then nothing depends on where a token stands, and all outputs are in the original order."""
    model = make_model(
        router_layers=THREE_ROUTERS, router_type=router_type, pooling=pooling, attn_implementation="eager"
    )
    images = make_images()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    before = model.mone(images, capacity=capacity, **OPTIONS)

    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order]  # (B, C, N, 4, 4)
    permuted = patches.unflatten(2, (4, 4)).transpose(3, 4).reshape(images.shape)
    prefix = 1 if pooling == "cls" else 0
    positions = model.mone.embeddings.position_embeddings
    positions[:, prefix:] = positions[:, prefix:][:, order].clone()
    after = model.mone(permuted, capacity=capacity, **OPTIONS)

    tokens = torch.cat([torch.arange(prefix), order + prefix])
    assert_close(after.last_hidden_state, before.last_hidden_state[:, tokens])
    assert_close(after.pooler_output, before.pooler_output)
    for ours, theirs in zip(after.hidden_states, before.hidden_states, strict=True):
        assert_close(ours, theirs[:, tokens])
    for ours, theirs in zip(after.attentions, before.attentions, strict=True):
        assert_close(ours, theirs[:, :, tokens][:, :, :, tokens])
    for ours, theirs in zip(after.router_logits, before.router_logits, strict=True):
        assert_close(ours, theirs[:, order])
    for ours, theirs in zip(after.expert_indices, before.expert_indices, strict=True):
        assert torch.equal(ours, theirs[:, order])


@torch.no_grad()
def test_a_calls_capacity_beats_the_configs():
    model, images = make_model(capacity=0.3), make_images()
    default = model(images).logits
    assert torch.equal(default, model(images, capacity=0.3).logits)
    dense = model(images, capacity=1.0).logits
    assert not torch.allclose(default, dense, atol=1e-2)
    assert torch.equal(model(images).logits, default)  # a call leaves nothing behind
    model.config.capacity = [0.0, 0.0, 0.0, 1.0]
    assert torch.equal(model(images).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("router_type", ["learned", "random", "argmax"])
def test_the_forward_never_waits_for_the_device(router_type):
    """On the meta device there are no values: a boolean mask, `.item()` or a data-dependent shape raises."""
    with torch.device("meta"):
        model = MoNEForImageClassification(tiny_config(router_layers=(0, 2), router_type=router_type, pooling="cls"))
    outputs = model(torch.empty(2, 3, 16, 16, device="meta"), capacity=0.4, output_router_logits=True)
    assert outputs.logits.shape == (2, NUM_LABELS) and outputs.expert_indices[0].shape == (2, 16)


class CountOperators(TorchDispatchMode):
    """Names of the operators that run, as often as they do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), func.overloadpacket.__name__]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("capacity", [0.4, 1.0])
def test_no_layer_gathers_scatters_or_masks(capacity):
    """Tokens are sorted once by the router: more layers must not mean more of what moves tokens about."""
    moves = ("gather", "scatter", "scatter_", "index", "index_put_", "index_select", "sort", "argsort", "masked_fill")
    counts = []
    for num_hidden_layers in (2, 6):
        model = make_model(num_hidden_layers=num_hidden_layers, pooling="cls")
        with CountOperators() as operators:
            model(make_images(), capacity=capacity)
        counts.append([operators.names.count(name) for name in moves])
        assert not {"nonzero", "masked_select", "_local_scalar_dense", "item"} & set(operators.names)
    assert counts[0] == counts[1]
    assert sum(counts[0]) > 0  # the router's own, so that the names above are the right ones


def test_dropout_acts_in_training_only():
    model, images = make_model(hidden_dropout_prob=0.5), make_images()
    assert torch.equal(model(images, capacity=0.4).logits, model(images, capacity=0.4).logits)
    model.train()
    assert not torch.equal(model(images, capacity=0.4).logits, model(images, capacity=0.4).logits)


# --- attention, checkpointing, precision, compilation ---------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0.3, 1.0, (0.0, 1.0, 0.0, 0.0)])
@pytest.mark.parametrize("router_type", ["learned", "random", "argmax"])
def test_stochastic_depth_skips_and_scales_whole_examples(capacity, router_type):
    """Of two layers the last has the full rate: its two updates of an example are each left out or doubled."""
    model = make_model(drop_path_rate=0.5, num_hidden_layers=2, router_type=router_type, router_layers=(0,))
    rates = [layer.drop_path for layer in model.mone.layers]
    assert rates == [0.0, 0.5]
    plain = make_model(num_hidden_layers=2, router_type=router_type, router_layers=(0,))
    plain.load_state_dict(model.state_dict())

    images = make_images(batch=1).expand(40, -1, -1, -1)
    kwargs = {"capacity": capacity, "output_hidden_states": True}

    def run(network, batch):
        # One routing for all copies of the image.
        generator = torch.Generator().manual_seed(0) if router_type == "random" else None
        if generator is None:
            return network(batch, **kwargs)
        outputs = [network(image[None], generator=torch.Generator().manual_seed(0), **kwargs) for image in batch]
        return type(outputs[0])(
            hidden_states=tuple(torch.cat(states) for states in zip(*(o.hidden_states for o in outputs), strict=True))
        )

    with torch.no_grad():
        evaluated = run(model.eval(), images[:1]).hidden_states
        for have, want in zip(evaluated, run(plain.eval(), images[:1]).hidden_states, strict=True):
            assert torch.equal(have, want), "evaluation skips nothing"
        torch.manual_seed(0)
        before, after = run(model.train(), images).hidden_states[-2:]
    torch.testing.assert_close(before, evaluated[-2].expand_as(before), atol=1e-5, rtol=0)
    kinds = torch.unique((after * 1e3).round().flatten(1), dim=0)
    assert len(kinds) == 4, "attention or not, MLP or not"
    untouched = (after == before).flatten(1).all(1)
    assert 3 <= untouched.sum() <= 20, "a quarter of 40"


@pytest.mark.parametrize("batch_first", [False, True])
def test_stochastic_depth_keeps_the_expectation(batch_first):
    model = make_model(drop_path_rate=0.3, num_hidden_layers=2, router_layers=(1,), alpha=0.5, std=0.05)
    layer, x = model.mone.layers[-1].train(), torch.randn(6, 1, model.config.hidden_size)
    gate, update = torch.rand(6, 1, 1) + 1, 0.1 * torch.randn_like(x)

    def residual(copies):
        tensors = [t.expand(-1, copies, -1) for t in (x, update, gate)]
        if batch_first:
            states, updates, gates = (t.transpose(0, 1) for t in tensors)
            return layer._residual(states, updates, None, gates, True).transpose(0, 1)
        return layer._residual(*tensors[:2], None, tensors[2], False)

    with torch.no_grad():
        mean = residual(20000).mean(1)
        layer.eval()
        expected = residual(1)[:, 0]
    torch.testing.assert_close(mean, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("capacity", [0.3, 1.0])
def test_eager_and_sdpa_attention_agree(capacity):
    images = make_images()
    gradients = []
    for attn_implementation in ("eager", "sdpa"):
        model = make_model(router_layers=(0, 2), pooling="cls", attn_implementation=attn_implementation)
        assert model.config._attn_implementation == attn_implementation
        logits = model(images, capacity=capacity).logits
        logits.square().sum().backward()
        gradients.append([logits, *(parameter.grad for parameter in model.parameters())])
    for eager, sdpa in zip(*gradients, strict=True):
        assert_close(sdpa, eager)


@torch.no_grad()
def test_flex_attention_agrees():
    model, images = make_model(router_layers=(0, 2), pooling="cls"), make_images()
    expected = model(images, capacity=0.3).logits
    model.set_attn_implementation("flex_attention")
    try:
        actual = model(images, capacity=0.3).logits
    except (torch._inductor.exc.InductorError, NotImplementedError) as error:
        pytest.skip(f"flex_attention does not run here: {str(error).splitlines()[0]}")
    assert_close(actual, expected)


@torch.no_grad()
def test_attentions_of_sdpa_are_left_out_as_vits_are():
    """Only eager attention has weights to return; asking another one for them must not end the forward."""
    vit, model = make_vit_and_mone("sdpa")
    images = make_images()
    expected = vit(images, output_attentions=True)
    actual = model(images, capacity=0.4, output_attentions=True)
    assert not actual.attentions and not expected.attentions


@pytest.mark.parametrize("capacity", [0.4, 1.0])
def test_gradients_of_gradients(capacity):
    """As for a penalty on the gradients of the input, by finite differences of the first derivatives."""
    model = make_model(attn_implementation="eager", router_layers=(1,)).double()
    name = "mone.layers.2.mlp.fc1.weight"
    pixel_values = make_images(1).double().requires_grad_()

    def penalty(weight):
        output = torch.func.functional_call(model, {name: weight}, (pixel_values,), {"capacity": capacity})
        loss = output.logits.square().sum()
        return torch.autograd.grad(loss, pixel_values, create_graph=True)[0].square().sum()

    weight = model.get_parameter(name).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(penalty(weight), weight)
    direction = torch.randn_like(weight)
    steps = [penalty((weight + sign * 1e-4 * direction).detach().requires_grad_()).item() for sign in (1, -1)]
    # transformers' eager attention has its softmax in float32
    assert (gradient * direction).sum().item() == pytest.approx((steps[0] - steps[1]) / 2e-4, rel=1e-3)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("router_type", ["learned", "random"])
def test_gradient_checkpointing_changes_no_gradient(router_type, use_reentrant):
    """With dropout: the recomputed forward must draw the same masks, and keep the same random routing."""
    images = make_images()
    results = []
    for checkpointing in (False, True):
        model = make_model(router_layers=(0, 2), router_type=router_type, hidden_dropout_prob=0.2).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            assert model.is_activation_checkpointing
        torch.manual_seed(0)
        outputs = model(images, capacity=0.4, output_hidden_states=True, output_router_logits=True)
        outputs.logits.square().sum().backward()
        assert len(outputs.hidden_states) == 5
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([outputs.logits, *outputs.hidden_states, *outputs.expert_indices, *gradients])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("capacity", [0.3, [0.5, 0.5, 0.0, 0.0], 1.0], ids=str)
def test_half_precision_is_finite_and_close(capacity, pooling, dtype, tolerance):
    """One random router: with a learned one, rounding may send a token elsewhere, which is no error."""
    images = make_images()
    outputs = []
    for precision in (torch.float32, dtype):
        model = make_model(router_type="random", pooling=pooling).to(precision)
        generator = torch.Generator().manual_seed(0)
        outputs.append(model(images, capacity=capacity, generator=generator).logits)
    assert outputs[1].dtype == dtype and outputs[1].isfinite().all()
    assert_close(outputs[1], outputs[0], tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router_type", ["learned", "argmax"])
def test_half_precision_trains_with_learned_routers(router_type, dtype):
    model = make_model(router_layers=(0, 2), router_type=router_type, pooling="cls", std=0.1).to(dtype)
    outputs = model(make_images().to(dtype), capacity=0.4, labels=torch.tensor([0, 1]), output_router_logits=True)
    assert outputs.logits.dtype == dtype and outputs.logits.isfinite().all()
    if router_type == "learned":
        counts = list(tokens_per_expert(resolve_capacity(0.4), 16))
        assert torch.bincount(outputs.expert_indices[1][0], minlength=4).tolist() == counts
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == dtype and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("capacity", [0.3, 1.0])
def test_autocast_to_bfloat16_trains(capacity, pooling):
    images, labels = make_images(), torch.tensor([0, 1])
    expected = make_model(router_type="random", pooling=pooling)
    expected(images, capacity=capacity, generator=torch.Generator().manual_seed(0), labels=labels).loss.backward()
    model = make_model(router_type="random", pooling=pooling)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(images, capacity=capacity, generator=torch.Generator().manual_seed(0), labels=labels).loss
    loss.backward()
    reference = torch.cat([parameter.grad.flatten() for parameter in expected.parameters()])
    actual = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert actual.isfinite().all() and actual.dtype == torch.float32
    # bfloat16 has 8 bits; a wrong path would not even point the same way.
    assert torch.cosine_similarity(actual, reference, dim=0) > 0.99


@pytest.mark.parametrize("router_type", ["learned", "argmax"])
def test_autocast_to_bfloat16_trains_learned_routers(router_type):
    model = make_model(router_layers=(0, 2), router_type=router_type)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(make_images(), capacity=0.4, labels=torch.tensor([0, 1])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def gradients_of(model, forward, images, capacity, **kwargs):
    model.zero_grad()
    logits = forward(images, capacity=capacity, **kwargs).logits
    logits.square().sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("fields", [{"pooling": "cls", "router_layers": (0, 1)}, {"router_type": "argmax"}], ids=str)
def test_compiled_model_equals_eager_with_one_graph_per_capacity(fields):
    """fullgraph: no graph break. A float capacity must not become a symbol, nor recompile when it comes again."""
    model, images = make_model(num_hidden_layers=2, **fields), make_images()
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    capacities = [0.3, 0.4, 1.0, [0.25, 0.25, 0.25, 0.25]]
    try:
        for number, capacity in enumerate(capacities, start=1):
            expected = gradients_of(model, model, images, capacity)
            for ours, theirs in zip(gradients_of(model, compiled, images, capacity), expected, strict=True):
                assert_close(ours, theirs)
            assert counters["stats"]["unique_graphs"] == number
        for capacity in reversed(capacities):
            expected = gradients_of(model, model, images, capacity)
            for ours, theirs in zip(gradients_of(model, compiled, images, capacity), expected, strict=True):
                assert_close(ours, theirs)
        assert counters["stats"]["unique_graphs"] == len(capacities)
    finally:
        torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize(
    "capacities", [[0.4, 1], [[1, 0, 0, 0], [0, 0, 0, 1]], [[0.25, 0.25, 0.25, 0.25], [0, 1, 0, 0]]], ids=str
)
def test_compiled_model_takes_integers_as_capacity(capacities):
    """Dynamo turns the second integer it sees into a symbol, as it does with floats."""
    model, images = make_model(num_hidden_layers=1), make_images()
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for capacity in capacities:
            assert_close(compiled(images, capacity=capacity).logits, model(images, capacity=capacity).logits)
    finally:
        torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_models_of_other_sizes_in_one_process(dynamic):
    """Of the second model, or image size, dynamo makes symbols of what differs."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": NUM_LABELS}
    frames = {"image_size": 16, "num_frames": 2, "tubelet_size": (2, 8, 8), "num_temporal_layers": 1}
    video = MoNEViViTForVideoClassification(MoNEViViTConfig(**sizes, **frames, num_hidden_layers=1)).eval()
    first = make_model(num_hidden_layers=1)
    second = make_model(num_hidden_layers=1, num_experts=3, capacity_beta=5.0)
    torch._dynamo.reset()
    try:
        for model, size in ((first, 16), (first, 24), (second, 16), (video, None)):
            images, options = torch.randn(1, 2, 3, 16, 16), {}
            if size is not None:
                images, options = make_images(size=(size, size)), {"interpolate_pos_encoding": True}
            compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=dynamic)
            expected = model(images, capacity=0.4, **options).logits
            assert_close(compiled(images, capacity=0.4, **options).logits, expected)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("change", ["subclass", "forward", "pre-hook", "backward hook"])
def test_an_activation_that_is_not_plain_gelu_runs(change, gradients):
    class Half(GELUActivation):
        def forward(self, x):
            return super().forward(x) / 2

    model, images, seen = make_model(num_hidden_layers=1), make_images(), []
    mlp = model.mone.layers[0].mlp
    with torch.set_grad_enabled(gradients):
        plain = model(images, capacity=0.4).logits
        if change == "subclass":
            mlp.activation_fn = Half()
        elif change == "forward":
            mlp.activation_fn.forward = Half().forward
        elif change == "pre-hook":
            mlp.activation_fn.register_forward_pre_hook(lambda *args: seen.append(1))
        else:
            mlp.activation_fn.register_full_backward_hook(lambda *args: seen.append(1))
        logits = model(images, capacity=0.4).logits
        if gradients:
            logits.sum().backward()
    if change in ("subclass", "forward"):
        assert (logits - plain).abs().max() > 1e-3
    else:
        assert_close(logits, plain)
        assert bool(seen) == (gradients or change == "pre-hook")


def test_a_config_that_asks_for_tuples():
    model, images = make_model(), make_images()
    expected = model(images, capacity=0.4).logits
    model.config.return_dict = False
    assert_close(model(images, capacity=0.4)[0], expected)


@torch.no_grad()
def test_compiled_model_returns_recorded_outputs():
    model = make_model(num_hidden_layers=2, router_layers=(0, 1), pooling="cls", attn_implementation="eager")
    images = make_images()
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected, actual = model(images, capacity=0.4, **OPTIONS), compiled(images, capacity=0.4, **OPTIONS)
        for name in ("hidden_states", "attentions", "router_logits", "expert_indices"):
            for ours, theirs in zip(getattr(actual, name), getattr(expected, name), strict=True):
                assert_close(ours, theirs)
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True])
def test_vit_base_compiled_layer_by_layer(frozen):
    """One graph for each capacity and none for further calls; with frozen weights one for each layer, too."""
    torch.manual_seed(0)
    model = MoNEForImageClassification(MoNEConfig(num_labels=10)).eval()
    images = torch.randn(2, 3, 224, 224)
    capacities = (0.4, 0.3)
    expected = [model(images, capacity=capacity).logits for capacity in capacities]
    torch._dynamo.reset()
    counters.clear()
    try:
        for layer in model.mone.layers:
            layer.compile(dynamic=False, fullgraph=True)
        with torch._inductor.config.patch(freezing=frozen), torch._dynamo.config.patch(recompile_limit=100):
            for calls in (1, 2):
                for number, (capacity, logits) in enumerate(zip(capacities, expected, strict=True), start=1):
                    assert_close(model(images, capacity=capacity).logits, logits)
                    graphs = number if calls == 1 else len(capacities)
                    assert counters["stats"]["unique_graphs"] == graphs * (12 if frozen else 1)
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
def test_inductor_equals_eager():
    model, images = make_model(num_hidden_layers=2, router_layers=(0, 1), pooling="cls"), make_images()
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, fullgraph=True)
        for capacity in (0.3, 1.0):
            expected = gradients_of(model, model, images, capacity)
            for ours, theirs in zip(gradients_of(model, compiled, images, capacity), expected, strict=True):
                assert_close(ours, theirs)
    finally:
        torch._dynamo.reset()


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_state_dict_keys_are_those_of_the_design():
    names = set(make_model(pooling="cls", num_hidden_layers=1, router_layers=(0,)).state_dict())
    parts = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"]
    parts += ["layernorm_before", "layernorm_after", "mlp.fc1", "mlp.fc2"]
    modules = [f"mone.layers.0.{part}" for part in parts]
    modules += ["mone.layernorm", "classifier", "mone.routers.0.proj", "mone.embeddings.patch_embeddings.projection"]
    expected = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    expected |= {"mone.routers.0.alpha", "mone.embeddings.cls_token", "mone.embeddings.position_embeddings"}
    assert names == expected


def test_initial_weights():
    torch.manual_seed(0)
    model = MoNEForImageClassification(tiny_config(hidden_size=128, pooling="cls", router_layers=(0, 2)))
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith("alpha") or name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "layernorm" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 400:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name
        else:
            assert 0 < parameter.abs().max() < 0.2, name


@torch.no_grad()
@pytest.mark.parametrize("fields", [{"pooling": "cls", "router_layers": (0, 2)}, {"router_type": "random"}], ids=str)
def test_save_and_load(tmp_path, fields):
    model, images = make_model(capacity=0.4, **fields), make_images()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded, info = MoNEForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    kwargs = [{"generator": torch.Generator().manual_seed(0)} for _ in range(2)]
    assert torch.equal(loaded(images, **kwargs[0]).logits, model(images, **kwargs[1]).logits)
    # The base model takes its part of the same checkpoint.
    base = MoNEModel.from_pretrained(tmp_path)
    kwargs = [{"generator": torch.Generator().manual_seed(0)} for _ in range(2)]
    assert torch.equal(base(images, **kwargs[0]).pooler_output, model.mone(images, **kwargs[1]).pooler_output)


@torch.no_grad()
def test_a_base_model_checkpoint_loads_into_the_classifier(tmp_path):
    base = make_model(model_class=MoNEModel)
    base.save_pretrained(tmp_path)
    model, info = MoNEForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    for name, value in base.state_dict().items():
        assert torch.equal(model.state_dict()[f"mone.{name}"], value), name


@torch.no_grad()
def test_load_in_bfloat16(tmp_path):
    model = make_model(capacity=0.4, pooling="cls")
    model.save_pretrained(tmp_path)
    loaded = MoNEForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(torch.bfloat16)), name
    assert loaded(make_images()).logits.isfinite().all()  # float32 pixels go into a bfloat16 model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_without_routers_gets_fresh_ones(tmp_path, dtype):
    """As a converted ViT is: routers start at alpha 0 with finite weights, and nothing that was loaded is touched."""
    model = make_model(pooling="cls", router_layers=(0, 2))
    model.save_pretrained(tmp_path / "full")
    shutil.copytree(tmp_path / "full", tmp_path / "bare")
    weights = load_file(tmp_path / "full" / "model.safetensors")
    kept = {name: value for name, value in weights.items() if ".routers." not in name}
    assert len(weights) - len(kept) == 6
    save_file(kept, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})

    loaded, info = MoNEForImageClassification.from_pretrained(tmp_path / "bare", dtype=dtype, output_loading_info=True)
    assert set(info["missing_keys"]) == set(weights) - set(kept)
    for name, value in loaded.state_dict().items():
        if name in kept:
            assert torch.equal(value, kept[name].to(dtype)), name
        elif name.endswith("alpha") or name.endswith("bias"):
            assert (value == 0).all(), name
        else:
            assert value.isfinite().all() and 0 < value.abs().max() < 0.2, name
    assert loaded(make_images(), capacity=0.3).logits.isfinite().all()


def test_input_embeddings_are_found():
    """By transformers' utilities: it is how parameter-efficient training hooks into the first layer."""
    model = make_model()
    assert model.get_input_embeddings() is model.mone.embeddings.patch_embeddings
    assert model.base_model is model.mone


# --- outputs and losses ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_return_dict_false_gives_the_same_values_as_a_tuple():
    model = make_model(router_layers=(0, 2), attn_implementation="eager")
    images, labels = make_images(), torch.tensor([0, 1])
    for network, kwargs in ((model, {"labels": labels}), (model, {}), (model.mone, {})):
        for options in ({}, OPTIONS):
            outputs = network(images, capacity=0.4, **kwargs, **options)
            values = network(images, capacity=0.4, **kwargs, **options, return_dict=False)
            assert isinstance(values, tuple) and len(values) == len(outputs.to_tuple())
            for ours, theirs in zip(values, outputs.to_tuple(), strict=True):
                if isinstance(ours, tuple):
                    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
                else:
                    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_nothing_is_recorded_unasked():
    model, images = make_model(), make_images()
    assert set(model(images, capacity=0.4).keys()) == {"logits"}
    assert set(model.mone(images, capacity=0.4).keys()) == {"last_hidden_state", "pooler_output"}


@torch.no_grad()
def test_the_config_can_ask_for_recorded_outputs():
    model = make_model(output_router_logits=True, output_hidden_states=True)
    for network in (model, model.mone):
        outputs = network(make_images(), capacity=0.4)
        assert len(outputs.router_logits) == len(outputs.expert_indices) == 1
        assert len(outputs.hidden_states) == 5
        assert network(make_images(), capacity=0.4, output_router_logits=False).router_logits is None


@torch.no_grad()
def test_selected_hidden_states():
    """transformers lets a call pick layers; the others are None and must survive the reordering."""
    model, images = make_model(router_layers=(0, 2)), make_images()
    every = model(images, capacity=0.4, output_hidden_states=True).hidden_states
    some = model(images, capacity=0.4, output_hidden_states=[1, 4]).hidden_states
    assert [state is not None for state in some] == [False, True, False, False, True]
    assert torch.equal(some[1], every[1]) and torch.equal(some[4], every[4])


PROBLEMS = {
    "single_label_classification": (NUM_LABELS, torch.tensor([0, 4, 2, 1, 1, 3, 0, 2])),
    "multi_label_classification": (NUM_LABELS, (torch.arange(40).reshape(8, 5) % 3 == 0).float()),
    "regression": (1, torch.linspace(-1, 1, 8)),
    "regression of several values": (NUM_LABELS, torch.linspace(-1, 1, 40).reshape(8, 5)),
    "single_label_classification with ignored labels": (NUM_LABELS, torch.tensor([0, -100, 2, 1, -100, 3, 0, 2])),
}


def torch_loss(problem, logits, labels):
    if problem.startswith("single_label_classification"):
        return nn.functional.cross_entropy(logits, labels)
    if problem.startswith("multi_label_classification"):
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)
    return nn.functional.mse_loss(logits.reshape(labels.shape), labels)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_losses_equal_torchs(problem):
    num_labels, labels = PROBLEMS[problem]
    model, images = make_model(num_labels=num_labels, problem_type=problem.split(" ")[0]), make_images(batch=8)
    outputs = model(images, labels=labels, capacity=0.4)
    expected = torch_loss(problem, outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    assert model.classifier.weight.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("problem", list(PROBLEMS)[:3])
def test_problem_type_is_inferred_from_the_labels(problem):
    num_labels, labels = PROBLEMS[problem]
    model, images = make_model(num_labels=num_labels), make_images(batch=8)
    assert model.config.problem_type is None
    outputs = model(images, labels=labels)
    torch.testing.assert_close(outputs.loss, torch_loss(problem, outputs.logits, labels))


def test_probabilities_as_labels_of_one_class():
    """What mixup and label smoothing make; and in micro-batches, with the count that Trainer makes of them."""
    model = make_model(problem_type="single_label_classification", num_labels=5)
    images, labels = make_images(batch=4), torch.rand(4, 5).softmax(-1)
    output = model(images, labels=labels, capacity=0.4)
    expected = torch.nn.functional.cross_entropy(output.logits, labels)
    torch.testing.assert_close(output.loss, expected)
    parts = [model(images[i : i + 2], labels=labels[i : i + 2], capacity=0.4, num_items_in_batch=20) for i in (0, 2)]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, expected)


@pytest.mark.parametrize("splits", [[3, 5], [1, 2, 4, 1]], ids=str)
@pytest.mark.parametrize(
    ("problem", "known"),
    # Float labels of several classes without a problem type count as multi-label ones.
    [*((problem, True) for problem in PROBLEMS), *((problem, False) for problem in list(PROBLEMS)[:3])],
)
def test_micro_batch_losses_sum_to_the_whole_batchs(problem, splits, known):
    """Trainer sums the micro-batches' losses and does not divide again, as the forward takes `**kwargs`."""
    num_labels, labels = PROBLEMS[problem]
    images = make_images(batch=8)
    whole, parts = (
        make_model(num_labels=num_labels, problem_type=problem.split(" ")[0] if known else None) for _ in range(2)
    )
    expected = whole(images, labels=labels, capacity=0.4).loss
    expected.backward()
    # As Trainer counts them over all micro-batches of a step.
    num_items = labels.ne(-100).sum()
    total = 0.0
    for some, their in zip(images.split(splits), labels.split(splits), strict=True):
        loss = parts(some, labels=their, capacity=0.4, num_items_in_batch=num_items).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)


# --- training -------------------------------------------------------------------------------------------------------


def test_routers_learn_once_alpha_has_left_zero():
    """At alpha 0 only alpha has a gradient; one step that makes it positive opens the way to the router."""
    model = make_model(alpha=0.0, router_layers=(0, 2))
    images, labels = make_images(), torch.tensor([0, 1])
    routers = model.mone.routers
    model(images, labels=labels, capacity=0.4).loss.backward()
    for router in routers:
        assert router.alpha.grad.abs().item() > 0
        assert (router.proj.weight.grad == 0).all() and (router.proj.bias.grad == 0).all()
    for router in routers:
        uphill = router.alpha.grad.item() > 0  # the step has to go up from 0, whichever way the loss falls
        torch.optim.SGD([router.alpha], lr=0.1, maximize=uphill).step()
        assert router.alpha.item() > 0
    model.zero_grad()
    model(images, labels=labels, capacity=0.4).loss.backward()
    for router in routers:
        assert router.proj.weight.grad.abs().max() > 0 and router.proj.bias.grad.abs().max() > 0


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("router_type", ["learned", "random"])
def test_twenty_steps_fit_one_batch(router_type, pooling):
    torch.manual_seed(0)
    model = MoNEForImageClassification(tiny_config(pooling=pooling, router_type=router_type)).train()
    images, labels = make_images(batch=8), PROBLEMS["single_label_classification"][1]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        generator = torch.Generator().manual_seed(0)
        loss = model(images, labels=labels, capacity=0.4, generator=generator).loss
        loss.backward()
        optimiser.step()
        model.project_alpha_()
        losses.append(loss.item())
    with torch.no_grad():
        final = model.eval()(images, labels=labels, capacity=0.4, generator=torch.Generator().manual_seed(0)).loss
    assert final.item() < losses[0] / 10


def test_project_alpha_reaches_every_router():
    model = make_model(router_layers=THREE_ROUTERS)
    with torch.no_grad():
        for router, alpha in zip(model.mone.routers, (-0.5, 0.25, 3.0), strict=True):
            router.alpha.fill_(alpha)
    model.project_alpha_()
    values = [router.alpha.item() for router in model.mone.routers]
    assert values[:2] == [0.0, 0.25] and 0.99 < values[2] < 1.0


@torch.no_grad()
def test_alpha_outside_its_range_acts_as_the_nearest_value_inside():
    model, images = make_model(), make_images()
    logits = {}
    for alpha in (-0.7, 0.0, 0.999999, 4.0):
        model.mone.routers[0].alpha.fill_(alpha)
        logits[alpha] = model(images, capacity=0.4).logits
    assert_close(logits[-0.7], logits[0.0])
    assert_close(logits[4.0], logits[0.999999])
    assert not torch.allclose(logits[0.0], logits[4.0], atol=1e-2)


# --- bad input ------------------------------------------------------------------------------------------------------


def both_models(**fields):
    model = make_model(**fields)
    return pytest.mark.parametrize("network", [model, model.mone], ids=["classifier", "base"])


@both_models()
@pytest.mark.parametrize(
    "capacity",
    [0, 0.05, 1.2, -1, math.nan, math.inf, True, "high", [0.2, 0.2, 0.2, 0.3], [0.5, 0.5], [1.5, -0.5, 0, 0]],
    ids=repr,
)
def test_bad_capacity(network, capacity):
    with pytest.raises(ValueError) as error:
        network(make_images(), capacity=capacity)
    assert repr(capacity) in str(error.value)
    assert "[0.125, 1]" in str(error.value) and "4 shares" in str(error.value)


@both_models()
@pytest.mark.parametrize("keyword", ["capasity", "capacities", "Capacity"])
def test_misspelt_capacity(network, keyword):
    """transformers swallows unknown keywords: the call would run dense and nobody would know."""
    with pytest.raises(TypeError) as error:
        network(make_images(), **{keyword: 0.4})
    assert repr(keyword) in str(error.value) and "'capacity'" in str(error.value)


@both_models()
@pytest.mark.parametrize("keyword", ["output_hiden_states", "bool_masked_pos", "is_causal", "foo"])
def test_other_unknown_keywords(network, keyword):
    with pytest.raises(TypeError, match=keyword):
        network(make_images(), **{keyword: True})


@both_models()
def test_missing_pixel_values(network):
    with pytest.raises(ValueError, match=r"pixel_values.*3, 16, 16"):
        network()
    with pytest.raises(ValueError, match=r"pixel_values.*3, 16, 16"):
        network(capacity=0.4)


@both_models()
@pytest.mark.parametrize(
    ("shape", "value", "allowed"),
    [
        ((2, 3, 16, 20), "16x20", "16x16"),
        ((2, 3, 32, 32), "32x32", "16x16"),
        ((2, 3, 8, 32), "8x32", "16x16"),  # as many patches as allowed
        ((2, 1, 16, 16), "(2, 1, 16, 16)", "3, 16, 16"),
        ((2, 4, 16, 16), "(2, 4, 16, 16)", "3, 16, 16"),
        ((3, 16, 16), "(3, 16, 16)", "(batch, 3, 16, 16)"),
        ((1, 2, 3, 16, 16), "(1, 2, 3, 16, 16)", "(batch, 3, 16, 16)"),
    ],
    ids=str,
)
def test_pixel_values_of_a_wrong_shape(network, shape, value, allowed):
    with pytest.raises(ValueError) as error:
        network(torch.zeros(shape), capacity=0.4)
    assert value in str(error.value) and allowed in str(error.value)


@both_models()
@pytest.mark.parametrize("size", [(18, 16), (16, 22), (2, 16)], ids=str)
def test_interpolation_needs_whole_patches(network, size):
    with pytest.raises(ValueError) as error:
        network(torch.zeros(2, 3, *size), interpolate_pos_encoding=True)
    assert f"{size[0]}x{size[1]}" in str(error.value) and "4x4" in str(error.value)


@pytest.mark.parametrize("model_class", [MoNEModel, MoNEForImageClassification])
@pytest.mark.parametrize(
    ("fields", "in_message"),
    [
        ({"hidden_size": 36}, ["36", "8"]),
        ({"router_layers": (4,)}, ["(4,)", "3"]),
        ({"router_layers": (1, 0)}, ["(1, 0)", "3"]),
        ({"router_layers": ()}, ["()", "3"]),
    ],
    ids=str,
)
def test_models_refuse_bad_configs(model_class, fields, in_message):
    with pytest.raises(ValueError) as error:
        model_class(tiny_config(**fields))
    assert all(part in str(error.value) for part in in_message)


def test_fields_overridden_while_loading_are_checked(tmp_path):
    """transformers sets them on the finished config, one by one: a router beyond the last layer would never run."""
    make_model().save_pretrained(tmp_path)
    for fields, message in (
        ({"router_layers": (7,)}, r"router_layers=\(7,\)"),
        ({"router_type": "rand"}, "router_type='rand'"),
        ({"pooling": "clss"}, "pooling='clss'"),
        ({"num_experts": 7}, r"hidden_size=32 .* 64"),
    ):
        with pytest.raises(ValueError, match=message):
            MoNEForImageClassification.from_pretrained(tmp_path, **fields)


def test_a_subclass_saves_these_files_and_an_auto_map_that_names_them(tmp_path):
    """FSDP2 makes one, in a module of torch."""

    class Mine(MoNEForImageClassification):
        pass

    Mine.__module__ = "torch.distributed.fsdp"
    model = Mine(tiny_config())
    MoNEForImageClassification(tiny_config()).save_pretrained(tmp_path / "plain")
    expected = {path.name for path in (tmp_path / "plain").iterdir()}
    assert "modeling_mone.py" in expected
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == expected
        auto_map = MoNEConfig.from_pretrained(tmp_path / name).auto_map
        assert auto_map["AutoModelForImageClassification"] == "modeling_mone.MoNEForImageClassification"


def test_attention_backends_get_what_they_expect():
    """Flash attention needs a GPU. A backend with its layout stands in: it must get (B, H, N, d) and no mask."""
    calls = []

    def backend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        calls.append((query.shape, key.shape, value.shape, attention_mask, dropout, module.is_causal, kwargs))
        weights = (query @ key.transpose(-1, -2) * scaling).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("stand_in", backend)
    model = make_model(pooling="cls", attention_probs_dropout_prob=0.5)
    expected = model(make_images(), capacity=0.4).logits
    model.set_attn_implementation("stand_in")
    assert_close(model(make_images(), capacity=0.4).logits, expected)
    assert len(calls) == 4
    shape = (2, 4, 17, 8)
    assert calls[0] == (shape, shape, shape, None, 0.0, False, {})
    model.train()(make_images(), capacity=0.4)
    assert calls[-1][4] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimized_for_inference_it_stays_the_same_model(dtype, tmp_path):
    """Outputs at all capacities, after saving and loading, and it still trains."""
    model = make_model().to(dtype)
    images = make_images(batch=3).to(dtype)
    with torch.no_grad():
        expected = [model(images, capacity=capacity).logits for capacity in (*CAPACITIES, *ONE_HOTS)]
    assert model.train().optimize_for_inference() is model and not model.training
    assert model.mone.layers[0].mlp.fc1.weight.stride(0) == 1
    tolerance = {"atol": 1e-5 if dtype == torch.float32 else 0.1, "rtol": 0}
    with torch.no_grad():
        for capacity, logits in zip((*CAPACITIES, *ONE_HOTS), expected, strict=True):
            torch.testing.assert_close(model(images, capacity=capacity).logits, logits, **tolerance)
    model.save_pretrained(tmp_path)
    loaded = MoNEForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name

    loaded.train()(images, labels=torch.tensor([0, 1, 2]), capacity=0.4).loss.backward()
    model.train()(images, labels=torch.tensor([0, 1, 2]), capacity=0.4).loss.backward()
    for (name, have), want in zip(model.named_parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(have.grad, want.grad, **tolerance, msg=name)
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_a_hook_sees_and_changes_the_same_with_and_without_gradients(name):
    model, images = make_model(), make_images()
    seen = []

    def drop(module, args, output):
        update = output[0] if isinstance(output, tuple) else output
        seen.append(update.detach().clone())
        return (0 * update, None) if isinstance(output, tuple) else 0 * update

    getattr(model.mone.layers[1], name).register_forward_hook(drop)
    expected = model(images, capacity=0.4).logits
    with torch.no_grad():
        assert_close(model(images, capacity=0.4).logits, expected)
    assert len(seen) == 2
    assert_close(*seen)


def test_adapters_are_refused_where_they_are_not_what_is_merged():
    class Adapter(torch.nn.Module):
        """As PEFT's LoRA wraps a layer."""

        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.merged, self.disable_adapters = base_layer, False, False
            self.update = torch.nn.Linear(base_layer.in_features, base_layer.out_features, bias=False)

        def forward(self, x, *args, **kwargs):
            return self.base_layer(x, *args, **kwargs) + (0 if self.disable_adapters else self.update(x))

    model, images = make_model(), make_images()
    expected = [model(images, capacity=capacity).logits for capacity in (0.4, 1.0)]
    attention = model.mone.layers[-1].attention
    attention.q_proj = Adapter(attention.q_proj)
    for capacity in (0.4, *ONE_HOTS[:-1]):
        with pytest.raises(TypeError, match=r"PEFT adapters are not nested.*capacity=1\.0"):
            model(images, capacity=capacity)
    assert not torch.equal(model(images, capacity=1.0).logits, expected[1])
    attention.q_proj.disable_adapters = True
    assert_close(model(images, capacity=0.4).logits, expected[0])


@pytest.mark.parametrize("batch", [1, 40])
def test_with_and_without_gradients_the_same(batch):
    """They take different ways through the MLP; 40 images have too many rows to share all products."""
    model, images = make_model(pooling="cls"), make_images(batch=batch)
    for capacity in (*CAPACITIES, *ONE_HOTS):
        with torch.no_grad():
            without = model(images, capacity=capacity).logits
        torch.testing.assert_close(model(images, capacity=capacity).logits, without, atol=1e-5, rtol=0)


def test_inference_leaves_recorded_states_alone():
    """Updates are added in place, but never to a tensor that a user gets to see."""
    model, images = make_model(), make_images()
    with torch.no_grad():
        states = model(images, capacity=0.4, output_hidden_states=True).hidden_states
    expected = model(images, capacity=0.4, output_hidden_states=True).hidden_states
    for have, want in zip(states, expected, strict=True):
        torch.testing.assert_close(have, want.detach(), atol=1e-5, rtol=0)


def test_inference_leaves_what_a_hook_sees_alone():
    model, images, seen = make_model(), make_images(), []
    hook = model.mone.layers[0].mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        hooked = model(images, capacity=0.4).logits
    hook.remove()
    assert seen[0].min() < -0.2, "below what GELU gives"
    with torch.no_grad():
        assert torch.equal(model(images, capacity=0.4).logits, hooked)


def test_one_exported_graph_serves_every_batch_size():
    """Without gradients, and on both sides of the number of rows up to which experts share products."""
    model = make_model(image_size=32, patch_size=2)  # 256 tokens
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"pixel_values": {0: batch}, "capacity": None}
    with torch.no_grad():
        exported = torch.export.export(model, (make_images(3, (32, 32)),), {"capacity": 0.4}, dynamic_shapes=shapes)
        for size in (1, 2, 9):
            images = make_images(size, (32, 32))
            expected = model(images, capacity=0.4).logits
            have = exported.module()(images, capacity=0.4).logits
            torch.testing.assert_close(have, expected, atol=1e-5, rtol=0)
