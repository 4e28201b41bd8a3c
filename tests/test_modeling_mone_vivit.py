"""The video model against the naive reference, its invariants, and what it shares with the image model's conventions.

The layers are the image model's: their fast paths, precisions and losses are tested in test_modeling_mone.py.
"""

from types import SimpleNamespace

import pytest
import torch
from reference import (
    add_positions,
    assert_close,
    check_forward_and_gradients,
    double_weights,
    linear,
    patch_tokens,
    pool,
    randomise_,
    reference_encoder,
)
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification

from mone import MoNEViViTConfig, MoNEViViTForVideoClassification, MoNEViViTModel
from mone.capacity import resolve_capacity, tokens_per_expert


ONE_HOTS = [[float(i == j) for j in range(4)] for i in range(4)]


def tiny_config(**fields):
    """Two temporal indices of 16 tokens of width 16: experts of width 2, 4, 8, 16."""
    defaults = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_temporal_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 16,
        "tubelet_size": (2, 4, 4),
        "num_frames": 4,
        "num_labels": 5,
    }
    return MoNEViViTConfig(**{**defaults, **fields})


def make_model(model_class=MoNEViViTForVideoClassification, std=0.2, alpha=0.5, attn="sdpa", **fields):
    torch.manual_seed(0)
    model = model_class._from_config(tiny_config(**fields), attn_implementation=attn)
    return randomise_(model, std, alpha).eval()


def make_clips(batch=2, frames=4, size=(16, 16), seed=2):
    return torch.randn(batch, frames, 3, *size, generator=torch.Generator().manual_seed(seed))


def reference_video(weights, config, pixel_values, capacity, scores=None):
    """Model 2 of ViViT, one clip, one temporal index and one token at a time."""
    clips = [reference_clip(weights, config, clip, capacity) for clip in pixel_values]
    out = SimpleNamespace()
    for name in ("logits", "last_hidden_state", "pooler_output"):
        setattr(out, name, torch.stack([getattr(clip, name) for clip in clips]))
    for name in ("hidden_states", "attentions", "router_logits", "expert_indices"):
        setattr(out, name, [torch.stack(values) for values in zip(*(getattr(c, name) for c in clips), strict=True)])
    return out


def reference_clip(weights, config, clip, capacity):
    kernel = weights["mone_vivit.embeddings.patch_embeddings.projection.weight"]  # (D, C, frames, rows, columns)
    bias = weights["mone_vivit.embeddings.patch_embeddings.projection.bias"]
    duration = kernel.shape[2]
    indices = []
    for start in range(0, len(clip), duration):
        tubelets = clip[start : start + duration].transpose(0, 1)  # (C, frames, height, width)
        tokens = add_positions(weights, "mone_vivit.spatial", patch_tokens(kernel, bias, tubelets))
        depth = config.num_hidden_layers
        indices.append(reference_encoder(weights, config, "mone_vivit.spatial", depth, tokens, capacity))
    tokens = add_positions(weights, "mone_vivit.temporal", [pool(config, i.last_hidden_state) for i in indices])
    depth = config.num_temporal_layers
    out = reference_encoder(weights, config, "mone_vivit.temporal", depth, tokens, 1.0, routed=False)
    final = out.last_hidden_state
    per_index = {
        name: [torch.stack(values) for values in zip(*(getattr(i, name) for i in indices), strict=True)]
        for name in ("hidden_states", "attentions", "router_logits", "expert_indices")
    }
    return SimpleNamespace(
        logits=linear(weights, "classifier", pool(config, final)),
        last_hidden_state=final,
        pooler_output=pool(config, final),
        **per_index,
    )


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("capacity", [0.15, 0.4, 0.8, 1.0, *ONE_HOTS], ids=str)
def test_model_equals_the_reference_forward_and_backward(capacity, pooling):
    model = make_model(pooling=pooling)
    check_forward_and_gradients(model, capacity, make_clips(), reference=reference_video)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_several_routers_and_longer_tubelets(pooling):
    fields = {"router_layers": (1, 2), "tubelet_size": (4, 8, 4), "num_frames": 12, "image_size": (16, 8)}
    model = make_model(pooling=pooling, **fields)
    clips = make_clips(frames=12, size=(16, 8))
    check_forward_and_gradients(model, 0.5, clips, reference=reference_video)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_everything_a_user_sees_is_in_the_original_order(pooling):
    model = make_model(MoNEViViTForVideoClassification, attn="eager", pooling=pooling, router_layers=(0, 2))
    clips = make_clips()
    with torch.no_grad():
        out = model.mone_vivit(
            clips, capacity=0.4, output_hidden_states=True, output_attentions=True, output_router_logits=True
        )
        expected = reference_video(double_weights(model), model.config, clips.double(), 0.4)
    for name in ("last_hidden_state", "pooler_output"):
        assert_close(out[name], getattr(expected, name))
    for name, count in (("hidden_states", 4), ("attentions", 3), ("router_logits", 2)):
        assert len(out[name]) == count
        for actual, wanted in zip(out[name], getattr(expected, name), strict=True):
            assert_close(actual, wanted)
    for actual, wanted in zip(out.expert_indices, expected.expert_indices, strict=True):
        assert torch.equal(actual, wanted)
    prefix = pooling == "cls"
    assert [tuple(x.shape) for x in out.temporal_hidden_states] == [(2, 2 + prefix, 16)] * 2
    assert [tuple(x.shape) for x in out.temporal_attentions] == [(2, 2, 2 + prefix, 2 + prefix)] * 2
    assert_close(model.mone_vivit.temporal.layernorm(out.temporal_hidden_states[-1]), out.last_hidden_state)


def test_each_temporal_index_is_routed_for_itself():
    model = make_model(num_frames=8)
    out = model(make_clips(frames=8), capacity=0.4, output_router_logits=True)
    counts = tokens_per_expert(resolve_capacity(0.4), 16)
    experts = out.expert_indices[0]
    assert experts.shape == (2, 4, 16)
    for row in experts.flatten(0, 1):
        assert tuple(torch.bincount(row, minlength=4).tolist()) == counts
    assert len({tuple(row.tolist()) for row in experts[0]}) > 1


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_shuffled_time_with_shuffled_positions_gives_shuffled_results(pooling):
    model = make_model(MoNEViViTModel, num_frames=8, pooling=pooling)
    clips = make_clips(frames=8)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = clips.unflatten(1, (4, 2))[:, order].flatten(1, 2)
    prefix = int(pooling == "cls")
    with torch.no_grad():
        before = model(clips, capacity=0.4, output_router_logits=True)
        positions = model.temporal.position_embeddings
        positions.copy_(torch.cat([positions[:, :prefix], positions[:, prefix:][:, order]], dim=1))
        after = model(shuffled, capacity=0.4, output_router_logits=True)
    assert_close(after.last_hidden_state[:, prefix:], before.last_hidden_state[:, prefix:][:, order])
    assert_close(after.pooler_output, before.pooler_output)
    assert torch.equal(after.expert_indices[0], before.expert_indices[0][:, order])


def test_the_order_of_time_matters():
    model = make_model(num_frames=8)
    clips = make_clips(frames=8)
    assert (model(clips.flip(1)).logits - model(clips).logits).abs().max() > 1e-3


def test_a_clip_does_not_see_the_others_in_its_batch():
    model = make_model()
    clips = make_clips(batch=3)
    together = model(clips, capacity=0.3).logits
    assert_close(torch.cat([model(clip[None], capacity=0.3).logits for clip in clips]), together)


def test_another_frame_size_with_interpolated_positions():
    model = make_model()
    clips = make_clips(size=(24, 16))
    with pytest.raises(ValueError, match=r"24x16 differs from the model's 16x16"):
        model(clips)
    grown = model.mone_vivit.spatial.interpolate_positions((6, 4)).detach()
    larger = make_model(image_size=(24, 16))
    weights = {**model.state_dict(), "mone_vivit.spatial.position_embeddings": grown}
    larger.load_state_dict(weights)
    actual = model(clips, capacity=0.4, interpolate_pos_encoding=True).logits
    assert_close(actual, larger(clips, capacity=0.4).logits)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(make_clips(), labels=torch.tensor([1, 3]), capacity=0.4).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected, 1e-6)


def test_compiled_model_equals_eager_with_one_graph_per_capacity():
    torch.compiler.reset()
    counters.clear()
    model = make_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    clips = make_clips()
    for capacity in (0.4, 1.0, 0.4):
        with torch.no_grad():
            assert_close(compiled(clips, capacity=capacity).logits, model(clips, capacity=capacity).logits)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    model = make_model(std=0.05)
    expected = model(make_clips(), capacity=0.4).logits
    actual = model.to(dtype)(make_clips(), capacity=0.4).logits
    assert actual.dtype == dtype
    assert_close(actual.float(), expected, 0.05)


def test_auto_classes_load_a_saved_folder(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    clips = make_clips()
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MoNEViViTConfig)
    assert tuple(config.tubelet_size) == (2, 4, 4)
    loaded = AutoModelForVideoClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, MoNEViViTForVideoClassification)
    assert_close(loaded(clips, capacity=0.3).logits, model(clips, capacity=0.3).logits, 1e-6)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, MoNEViViTModel)
    assert_close(base(clips).pooler_output, model.mone_vivit(clips).pooler_output, 1e-6)
    assert {path.name for path in tmp_path.glob("*.py")} >= {
        "modeling_mone_vivit.py",
        "modeling_mone.py",
        "configuration_mone.py",
        "routing.py",
        "capacity.py",
    }


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, 3, 16, 16), r"\(2, 5, 3, 16, 16\); expected \(batch, 4, 3, 16, 16\)"),
        ((2, 4, 1, 16, 16), r"expected \(batch, 4, 3, 16, 16\)"),
        ((2, 3, 16, 16), r"expected \(batch, 4, 3, 16, 16\)\.$"),
        ((2, 8, 4, 3, 16, 16), r"expected \(batch, 4, 3, 16, 16\)\. Average the logits of several clips"),
        ((2, 4, 3, 16, 12), r"16x12 differs from the model's 16x16"),
    ],
)
@pytest.mark.parametrize("model_class", [MoNEViViTModel, MoNEViViTForVideoClassification])
def test_clips_of_a_wrong_shape(shape, message, model_class):
    with pytest.raises(ValueError, match=message):
        make_model(model_class)(torch.zeros(shape))


def test_a_misspelt_keyword_and_a_bad_capacity():
    model = make_model()
    with pytest.raises(TypeError, match=r"'capasity'.*'capacity'"):
        model(make_clips(), capasity=0.4)
    with pytest.raises(ValueError, match=r"capacity=1\.2 .*\[0\.125, 1\]"):
        model(make_clips(), capacity=1.2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 5}, r"num_frames=5 .*tubelet_size\[0\]=2"),
        ({"tubelet_size": (2, 4)}, r"tubelet_size=\(2, 4\)"),
        ({"tubelet_size": (2, 5, 5)}, r"image_size=16 .*patch_size=\[5, 5\]"),
        ({"patch_size": 8}, r"patch_size=8 differs from tubelet_size=\(2, 4, 4\)"),
        ({"num_temporal_layers": 0}, "num_temporal_layers=0"),
    ],
)
def test_configs_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)
