"""What the training scripts share. The rest of it is tested by running them."""

import pytest

from mone import MoNEViViTConfig
from mone.training.command_line import parse_overrides


def test_overrides_of_every_kind():
    text = "hidden_size=64, router_layers=(0,2),image_size=[32,16],pooling=cls,qkv_bias=false,layer_norm_eps=1e-6,"
    assert parse_overrides(text) == {
        "hidden_size": 64,
        "router_layers": (0, 2),
        "image_size": [32, 16],
        "pooling": "cls",
        "qkv_bias": False,
        "layer_norm_eps": 1e-6,
    }
    assert parse_overrides(None) == {}


def test_overrides_of_a_video_model():
    fields = parse_overrides("tubelet_size=(2,8,8),num_frames=16,hidden_size=64", MoNEViViTConfig)
    assert fields == {"tubelet_size": (2, 8, 8), "num_frames": 16, "hidden_size": 64}
    with pytest.raises(ValueError, match=r"'num_frame=16' is not .* MoNEViViTConfig\. Did you mean num_frames"):
        parse_overrides("num_frame=16", MoNEViViTConfig)
    with pytest.raises(ValueError, match=r"'num_frames=16' is not .* field of MoNEConfig"):
        parse_overrides("num_frames=16")
