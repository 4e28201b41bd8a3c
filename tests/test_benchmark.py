"""Timing: the order of the calls, what is compared with what, and what is made of it; never how long it took."""

import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

import mone.benchmark as benchmark
from mone import MoNEConfig, MoNEForImageClassification, MoNEViViTConfig, count_macs
from mone.baselines import DenseModel
from mone.benchmark import (
    PeakMemory,
    capacity_for_latency,
    environment,
    growth,
    interleaved_seconds,
    measure,
    routing_share,
)
from mone.export import example_input
from mone.flops import attention_macs


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import benchmark as script


IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "num_labels": 5,
    "layer_norm_eps": 1e-6,
}


def image_config() -> MoNEConfig:
    return MoNEConfig(**IMAGE, patch_size=4)


def video_config() -> MoNEViViTConfig:
    return MoNEViViTConfig(**IMAGE, tubelet_size=(2, 4, 4), num_frames=4, num_temporal_layers=1)


def test_variants_run_in_turn_and_warmup_is_dropped():
    calls = []
    seconds = interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_times_are_of_the_calls():
    seconds = interleaved_seconds({"slow": lambda: time.sleep(0.05)}, rounds=2, warmup=0)
    assert min(seconds["slow"]) >= 0.05


def test_the_dense_model_is_transformers_vit():
    """Its layers in its order: with a ViT's weights it gives what that ViT's tokens give."""
    config = image_config()
    dense = DenseModel(config).eval()
    vit = ViTForImageClassification(ViTConfig(**IMAGE, patch_size=4, attn_implementation="sdpa")).eval()
    assert type(dense.layers[0]) is type(vit.vit.layers[0])
    assert dense.layers[0].attention.config._attn_implementation == "sdpa"
    dense.layers.load_state_dict(vit.vit.layers.state_dict())
    hidden = torch.randn(2, 16, 32)
    expected, have = hidden, hidden
    for ours, theirs in zip(dense.layers, vit.vit.layers, strict=True):
        have, expected = ours(have), theirs(expected)
    assert torch.equal(have, expected)
    assert dense(example_input(config, 2)).shape == (2, 5)
    assert DenseModel(video_config())(example_input(video_config(), 2)).shape == (2, 5)


def fake_clock(monkeypatch, seconds_of):
    """Every variant "takes" what `seconds_of(name)` says; it is still called, once."""

    def fake(variants, *, rounds=10, warmup=2):
        for call in variants.values():
            call()
        return {name: [seconds_of(name)] * rounds for name in variants}

    monkeypatch.setattr(benchmark, "interleaved_seconds", fake)


@pytest.mark.parametrize("config", [image_config(), video_config()], ids=["image", "video"])
def test_efficiency_is_speedup_over_reduction(monkeypatch, config):
    fake_clock(monkeypatch, lambda name: {"dense": 1.0, "mone": 0.5}[name[0]])
    rows = measure(config, [0.4, 1.0], 2, modes=("eager", "prepared"))
    assert [(row["model"], row["mode"], row["capacity"]) for row in rows] == [
        ("dense", "eager", None),
        *(("mone", mode, capacity) for mode in ("eager", "prepared") for capacity in (0.4, 1.0)),
    ]
    assert rows[0]["efficiency"] == rows[0]["reduction"] == 1
    for row in rows[1:]:
        assert row["gmacs"] == count_macs(config, row["capacity"]) / 1e9
        assert row["reduction"] == pytest.approx(rows[0]["gmacs"] / row["gmacs"])
        assert row["speedup"] == 2 and row["efficiency"] == pytest.approx(2 / row["reduction"])
        assert (row["per_second"], row["milliseconds"], row["spread"]) == (4, 500, 0)
    # At 1.0 only the routers come on top of the dense model.
    time = 2 if config.model_type == "mone_vivit" else 1
    assert (rows[2]["gmacs"] - rows[0]["gmacs"]) * 1e9 == pytest.approx(time * 16 * 32 * 4)


def test_training_steps_run_backward(monkeypatch):
    fake_clock(monkeypatch, lambda name: 1.0)
    stepped = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: stepped.append(loss.requires_grad))
    rows = measure(image_config(), [0.4], 2, train=True)
    assert stepped and all(stepped)
    calls = {"dense": 1, "eager": 1, "uniform": 9, "joint": 4}
    assert len(stepped) % sum(calls.values()) == 0
    uniform, joint = rows[2:]
    assert [(row["mode"], row["capacity"]) for row in (uniform, joint)] == [("uniform", None), ("joint", None)]
    assert uniform["gmacs"] == pytest.approx(sum(count_macs(image_config(), c / 100) for c in range(15, 96, 10)) / 9e9)
    widths = [[float(i == j) for i in range(4)] for j in range(4)]
    assert joint["gmacs"] == pytest.approx(sum(count_macs(image_config(), shares) for shares in widths) / 1e9)
    assert (uniform["per_second"], joint["per_second"]) == (18, 2), "of nine calls the mean, of four the sum"


def test_compiled_layers_give_the_same_rows(monkeypatch):
    fake_clock(monkeypatch, lambda name: {"eager": 1.0, "compiled": 0.8}[name[1]] / (1 + (name[0] == "mone")))
    limit = torch._dynamo.config.recompile_limit
    rows = measure(image_config(), [0.4], 2, modes=("compiled",))
    assert [(row["model"], row["mode"]) for row in rows] == [
        ("dense", "eager"),
        ("dense", "compiled"),
        ("mone", "compiled"),
    ]
    assert rows[2]["speedup"] == pytest.approx(2.5)
    assert rows[2]["compile_seconds"] == 0 and rows[2]["peak_megabytes"] is None
    assert rows[2]["efficiency_compiled"] == pytest.approx(2 / rows[2]["reduction"])
    assert torch._dynamo.config.recompile_limit == limit, "settings are put back"


def test_a_budget_that_token_merging_cannot_meet_leaves_the_rest(monkeypatch, caplog):
    fake_clock(monkeypatch, lambda name: 1.0)
    rows = measure(image_config(), [0.15, 0.9], 2, baselines=["token_merging"])
    assert [(r["model"], r["capacity"]) for r in rows] == [
        *(("dense", None), ("mone", 0.15), ("mone", 0.9), ("token_merging", 0.9)),
    ]
    assert "Token merging is left out at capacity 0.15: A budget of" in caplog.text


def test_baselines_at_the_same_multiply_accumulates(monkeypatch):
    seconds = {"dense": 1.0, "mone": 0.5, "timm": 1.0, "token_merging": 0.8, "mixture_of_depths": 0.5}
    fake_clock(monkeypatch, lambda name: seconds[name[0]])
    rows = {(r["model"], r["capacity"]): r for r in measure(image_config(), [0.9], 2, baselines=benchmark.BASELINES)}
    assert set(rows) == {
        *(("dense", None), ("mone", 0.9), ("timm", None), ("token_merging", 0.9)),
        ("mixture_of_depths", None),
    }
    depths = rows["mixture_of_depths", None]
    assert 0.5 < 1 / depths["reduction"] < 0.7 and depths["efficiency"] == pytest.approx(2 / depths["reduction"])
    merging, mone = rows["token_merging", 0.9], rows["mone", 0.9]
    assert merging["gmacs"] == mone["gmacs"] and merging["speedup"] == 1.25
    assert all(row["peak_megabytes"] > 0 for row in rows.values())
    timm_macs = FlopCounterMode(display=False)
    with timm_macs:
        benchmark.timm_vit(image_config())(example_input(image_config(), 1))
    attention = 2 * (2 * 16 * 16 * 32)  # of two layers, which the counter does not see on a CPU
    assert timm_macs.get_total_flops() / 2 + attention == pytest.approx(rows["timm", None]["gmacs"] * 1e9)
    with pytest.raises(ValueError, match="baselines="):
        measure(image_config(), [0.5], 1, baselines=("moe",))
    with pytest.raises(ValueError, match="for images"):
        measure(video_config(), [0.5], 1, baselines=("timm",))


def test_onnx_modes_compare_with_dense_in_the_same_runtime(monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    written = []
    for name in ("export_onnx", "write_onnx", "quantize_onnx"):
        function = getattr(benchmark, name)
        monkeypatch.setattr(benchmark, name, lambda *a, f=function, n=name: (written.append(n), f(*a)))
    speed = {"eager": 1.0, "onnx": 0.8, "onnx_int8": 0.4}
    fake_clock(monkeypatch, lambda name: speed[name[1]] / (1 + (name[0] == "mone")))
    for _ in range(2):  # the second time, the files are there
        rows = measure(image_config(), [0.4], 2, modes=("onnx", "onnx_int8"), onnx_dir=tmp_path)
        assert [(row["model"], row["mode"]) for row in rows] == [
            ("dense", "eager"),
            *((model, mode) for mode in ("onnx", "onnx_int8") for model in ("dense", "mone")),
        ]
        assert rows[4]["speedup"] == pytest.approx(5)
        assert rows[4]["efficiency_onnx_int8"] == pytest.approx(2 / rows[4]["reduction"])
        assert sorted(written) == ["export_onnx", "quantize_onnx", "quantize_onnx", "write_onnx"]
    with pytest.raises(ValueError, match=r"\['onnx'\] run on the CPU in float32"):
        measure(image_config(), [0.4], 2, modes=("onnx",), dtype=torch.bfloat16)


def test_onnx_files_of_other_code_are_not_timed(monkeypatch, tmp_path):
    package = tmp_path / "mone"
    (package / "baselines").mkdir(parents=True)
    source = package / "baselines" / "dense.py"
    source.write_text("old")
    monkeypatch.setattr(benchmark, "__file__", str(package / "benchmark.py"))
    monkeypatch.setattr(benchmark, "export_onnx", lambda model, path, capacity: path.write_text(source.read_text()))

    def written(config, capacity):
        path = benchmark._onnx_file(lambda kind: kind, MoNEForImageClassification, config, capacity, "onnx", tmp_path)
        return path.name, path.read_text()

    first = written(image_config(), 0.4)
    assert written(image_config(), 0.4) == first and first[1] == "old"
    source.write_text("new")
    assert written(image_config(), 0.4)[1] == "new"
    other = MoNEConfig(**{**IMAGE, "num_labels": 6}, patch_size=4)
    assert len({first[0], *(written(config, c)[0] for config in (image_config(), other) for c in (0.4, 0.5))}) == 5


def test_growth_names_axes_and_attention(monkeypatch):
    fake_clock(monkeypatch, lambda name: 1.0)
    series = {"image size": [(16, image_config(), 1)], "frames": [(4, video_config(), 2)]}
    rows = growth(series, [0.4], mode="prepared")
    assert [(row["axis"], row["value"], row["capacity"], row["batch_size"]) for row in rows] == [
        ("image size", 16, None, 1),
        ("image size", 16, 0.4, 1),
        ("frames", 4, None, 2),
        ("frames", 4, 0.4, 2),
    ]
    expected = attention_macs(image_config()) / count_macs(image_config(), 0.4)
    assert rows[1]["attention_share"] == pytest.approx(expected)
    assert rows[1]["attention_share"] > rows[0]["attention_share"] > 0


@pytest.mark.parametrize("options", [{"modes": ("fast",)}, {"modes": ("compiled",), "train": True}])
def test_modes_that_do_not_exist(options):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        measure(image_config(), [0.5], 0)
    with pytest.raises(ValueError, match="modes="):
        measure(image_config(), [0.4], 1, **options)
    with pytest.raises(ValueError, match="mode 'graphed' needs device='cuda', got 'cpu'"):
        measure(image_config(), [0.4], 1, modes=("graphed",))


def test_the_routing_share_is_of_the_forward(monkeypatch):
    fake_clock(monkeypatch, lambda name: {"route": 0.01, "forward": 2.0}[name])
    assert routing_share(image_config(), 0.4, 2) == 0.005


def latency_model() -> MoNEForImageClassification:
    return MoNEForImageClassification(image_config()).eval()


@pytest.mark.parametrize(("milliseconds", "capacity"), [(125, 0.125), (300, 0.3), (617, 0.617), (1000, 1.0), (5e3, 1)])
def test_capacity_for_latency_on_a_known_curve(monkeypatch, milliseconds, capacity):
    fake_clock(monkeypatch, float)  # a call at capacity c takes c seconds
    got = capacity_for_latency(latency_model(), milliseconds, example_input(image_config(), 1))
    assert got == pytest.approx(capacity)


def test_capacity_for_latency_passes_over_noise(monkeypatch):
    """The second point came out slower than the third: a budget between the two must not choose the third."""
    times = iter([0.1, 0.5, 0.3, 1.0])
    measured = {}
    fake_clock(monkeypatch, lambda name: measured.setdefault(name, next(times)))
    got = capacity_for_latency(latency_model(), 400, example_input(image_config(), 1), points=4)
    assert 0.125 < got < float(list(measured)[1])


def test_a_latency_that_cannot_be_met_names_the_least(monkeypatch):
    fake_clock(monkeypatch, float)
    model, example = latency_model(), example_input(image_config(), 1)
    with pytest.raises(TypeError, match="milliseconds='5' must be a number"):
        capacity_for_latency(model, "5", None)  # before anything is timed
    for budget in (100, 0, -1, float("nan")):
        with pytest.raises(ValueError, match=r"cannot be met: capacity 0\.125 already takes 125 ms"):
            capacity_for_latency(model, budget, example)
    with pytest.raises(ValueError, match="points=1"):
        capacity_for_latency(model, 500, example, points=1)


def test_capacity_for_latency_by_the_clock():
    model, example = latency_model(), example_input(image_config(), 1)
    with torch.no_grad():
        dense = statistics.median(interleaved_seconds({"": lambda: model(example)}, rounds=5)[""])
    assert capacity_for_latency(model, 1e5 * dense, example, points=2, rounds=2) == 1.0


def test_the_environment_is_named():
    facts = environment()
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["machine"]


def test_what_cannot_end_well_does_not_begin(tmp_path, capsys, monkeypatch, request):
    monkeypatch.setattr(script, "measure", lambda *args, **kwargs: pytest.fail("it had begun"))
    with pytest.raises(SystemExit):
        script.main(["--rounds", "0"])
    assert "--rounds 0 must be at least 1" in capsys.readouterr().err
    request.getfixturevalue("without_matplotlib")
    with pytest.raises(ImportError, match="pip install matplotlib"):
        script.main(["--output_dir", str(tmp_path)])


def test_the_script_prints_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(script.MODELS, "vit_tiny", image_config())
    options = ["--modes", "eager", "prepared", "--rounds", "2", "--capacities", "0.4", "1", "--batch_sizes", "1", "2"]
    rows = script.main(["--models", "vit_tiny", *options, "--image_size", "16", "--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("vit_tiny mone | prepared") == 4 and printed.count("routing takes") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "speed.png"}
    assert len([row for row in rows if row.get("model") == "mone"]) == 8


# --- memory ---------------------------------------------------------------------------------------------------------


def test_peak_memory_of_a_chain():
    """Three tensors of 4 kB, never more than two at once; a view and what was there before are not counted."""
    x = torch.ones(1000)
    with PeakMemory() as memory:
        y = x * 2
        y = y.view(10, 100) + 1
        y = y + 1
        del y
    assert memory.peak == 8000
    with PeakMemory() as memory:
        x.add_(1)
        x.view(10, 100)
    assert memory.peak == 0


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("capacity", [0.2, 0.4, 1.0])
def test_a_mone_needs_no_more_memory_than_the_dense_model(capacity, train):
    config = MoNEConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=64,
        patch_size=8,
        num_labels=10,
    )
    images = example_input(config, 4)
    peaks = []
    for model, kwargs in ((DenseModel(config), {}), (MoNEForImageClassification(config), {"capacity": capacity})):
        model.train(train)
        with torch.set_grad_enabled(train), PeakMemory() as memory:
            logits = model(images, **kwargs)
            logits = logits if isinstance(logits, torch.Tensor) else logits.logits
            if train:
                logits.sum().backward()
        peaks.append(memory.peak)
    dense, mone = peaks
    assert mone <= dense


def test_the_script_draws_growth(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "GROWTH", {"batch": [(n, image_config(), n) for n in (1, 2)]})
    rows = script.main(["--growth", "--capacities", "0.4", "--rounds", "1", "--output_dir", str(tmp_path)])
    assert len(rows) == 4 and "batch 2 mone | eager | 0.4 | 2" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"growth.json", "growth.png"}
    with pytest.raises(SystemExit):
        script.main(["--growth", "--modes", "eager", "prepared"])
    with pytest.raises(SystemExit):
        script.main(["--growth", "--device", "cuda", "--dtype", "bfloat16"])
    assert "leave out --device, --dtype" in capsys.readouterr().err
    assert all(config.resolve_capacity(0.4) for points in script.GROWTH.values() for _, config, _ in points)
