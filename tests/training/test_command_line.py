"""What the training scripts share. The rest of it is tested by running them."""

import pytest

from mone import MoNEViViTConfig
from mone.training.command_line import DataArguments, ModelArguments, parse_arguments, parse_overrides


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


def parse(*argv):
    return parse_arguments([*argv, "--use_cpu"], ModelArguments, DataArguments)


def test_options_after_a_file_win_over_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "output_dir: out\nlearning_rate: 1e-3\nflip: false\neval_capacities: [0.2, 0.4]\nhead_bias: -10\n"
        "config_overrides:\n  hidden_size=64, router_layers=(0,1),\n  pooling=cls\n"
        "train_file: [a.parquet, b.parquet]\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nmax_train_samples: null\ncapacity: 0.4\ncapacity_grid: []\n"
    )
    model, data, training = parse(str(file))
    assert (training.learning_rate, training.eval_capacities, training.capacity) == (1e-3, [0.2, 0.4], 0.4)
    assert (data.flip, data.train_file, data.max_train_samples) == (False, ["a.parquet", "b.parquet"], None)
    assert (model.head_bias, training.lr_scheduler_kwargs) == (-10, {"num_cycles": 2})

    options = ["--learning_rate", "0.5", "--eval_capacities", "1", "--flip", "true", "--output_dir", "other"]
    model, data, training = parse(str(file), *options, "--config_overrides", "hidden_size=32")
    assert (training.learning_rate, training.eval_capacities, training.output_dir) == (0.5, [1.0], "other")
    assert data.flip
    fields = {"hidden_size": 32, "router_layers": (0, 1), "pooling": "cls"}
    assert parse_overrides(model.config_overrides) == fields, "which are set one by one"


def test_json_is_read_alike(tmp_path):
    file = tmp_path / "run.json"
    file.write_text('{"output_dir": "out", "train_dir": "x", "eval_capacities": 0.3}')
    _, data, training = parse(str(file), "--max_steps", "3")
    assert (data.train_dir, training.eval_capacities, training.max_steps) == ("x", [0.3], 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"run\.yaml: 'learning_rat' is not an option\. Did you mean learning_rate\?"),
        ("- a\n- b", r"run\.yaml must hold options"),
        ("output_dir: out\nreport_to: []", r"run\.yaml: report_to is an empty list"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(str(file))


def test_unknown_options_are_errors_even_when_they_start_like_one(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: out")
    with pytest.raises(ValueError, match="--learning_rat"):
        parse(str(file), "--learning_rat", "1")
