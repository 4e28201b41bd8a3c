# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints in a folder: damaged ones are named, legitimate gaps are filled, an interrupted save loses nothing."""

import errno
import json
import shutil

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, ViTConfig, ViTForImageClassification, pipeline

from mone import (
    MoNEConfig,
    MoNEForImageClassification,
    MoNEModel,
    MoNEViViTConfig,
    MoNEViViTForVideoClassification,
    MoNEViViTModel,
)
from mone.routing import Router


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def make_model(seed=0, **config):
    torch.manual_seed(seed)
    return MoNEForImageClassification(MoNEConfig(**SIZES, image_size=16, patch_size=4, num_labels=3, **config))


def make_video_model():
    config = MoNEViViTConfig(
        **SIZES, num_temporal_layers=1, image_size=16, tubelet_size=(2, 4, 4), num_frames=4, num_labels=3
    )
    return MoNEViViTForVideoClassification(config)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    model = make_model()
    model.save_pretrained(root / "image")
    model.mone.save_pretrained(root / "image_base")
    model.save_pretrained(root / "sharded", max_shard_size="20KB")
    make_video_model().save_pretrained(root / "video")
    vit = ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=3))
    vit.save_pretrained(root / "vit")
    return root


@pytest.fixture
def folder(originals, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(originals, tmp_path / "copy")


def change(folder, **weights):
    """Set weights of the checkpoint in `folder`, or remove those set to None. `__` stands for a dot."""
    state = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        name = name.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class TestWhatDoesNotFit:
    @pytest.mark.parametrize("auto", [AutoModelForImageClassification, AutoModel])
    def test_missing(self, folder, auto):
        change(folder / "image", mone__layers__1__mlp__fc1__weight=None)
        with pytest.raises(ValueError, match=r"copy.image of MoNEForImageClassification.*missing: .*layers\.1\.mlp"):
            auto.from_pretrained(folder / "image")

    def test_half_a_router_is_not_made_anew_unasked(self, folder):
        change(folder / "image", mone__routers__0__alpha=None)
        with pytest.raises(ValueError, match=r"missing: mone\.routers\.0\.alpha\. Pass ignore_mismatched_sizes"):
            MoNEForImageClassification.from_pretrained(folder / "image")

    def test_too_many(self, folder):
        change(folder / "image", mone__layers__7__mlp__fc1__weight=torch.zeros(2))
        for auto in (AutoModelForImageClassification, AutoModel):
            for ignore in (False, True):
                with pytest.raises(ValueError, match=r"not in this model: .*layers\.7\.mlp\.fc1\.weight"):
                    auto.from_pretrained(folder / "image", ignore_mismatched_sizes=ignore)

    def test_another_shape(self, folder):
        change(folder / "image", mone__layers__1__mlp__fc1__weight=torch.zeros(64, 16))
        message = r"of another shape: mone\.layers\.1\.mlp\.fc1\.weight \(64, 16\) instead of \(64, 32\)"
        with pytest.raises(ValueError, match=message):
            MoNEForImageClassification.from_pretrained(folder / "image")

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"image_size": 24}, r"position_embeddings \(1, 16, 32\) instead of \(1, 36, 32\)"),
            ({"num_frames": 8}, r"temporal\.position_embeddings \(1, 2, 32\) instead of \(1, 4, 32\)"),
            ({"intermediate_size": 32}, r"fc1\.weight \(64, 32\) instead of \(32, 32\)"),
        ],
    )
    def test_another_shape_than_that_of_classifier_and_routers_is_never_ignored(self, originals, config, message):
        for options in ({}, {"ignore_mismatched_sizes": True, "num_labels": 7, "num_experts": 3}):
            with pytest.raises(ValueError, match=message) as error:
                MoNEViViTForVideoClassification.from_pretrained(originals / "video", **config, **options)
            assert "Pass ignore_mismatched_sizes" not in str(error.value)

    def test_a_classifier_that_the_checkpoint_should_have(self, folder):
        change(folder / "image", classifier__bias=None)
        with pytest.raises(ValueError, match=r"missing: classifier\.bias"):
            MoNEForImageClassification.from_pretrained(folder / "image")

    def test_video(self, folder):
        change(folder / "video", mone_vivit__temporal__layernorm__bias=None)
        for cls in (MoNEViViTForVideoClassification, MoNEViViTModel):
            with pytest.raises(ValueError, match=r"missing: .*temporal\.layernorm\.bias"):
                cls.from_pretrained(folder / "video")

    def test_another_architecture(self, folder):
        for cls, name in (
            (MoNEForImageClassification, "vit"),
            (MoNEForImageClassification, "video"),
            (MoNEModel, "video"),
        ):
            architecture = json.loads((folder / name / "config.json").read_text())["architectures"][0]
            with pytest.raises(ValueError, match=f"of {architecture} does not fit {cls.__name__}"):
                cls.from_pretrained(folder / name)

    @pytest.mark.parametrize("size", [0, 5, 400, 20_000])
    def test_truncated(self, folder, size):
        path = folder / "image" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(OSError, match=r"copy.image cannot be read; .*image.model\.safetensors may be truncated"):
            AutoModelForImageClassification.from_pretrained(folder / "image")

    # Every size has torch's reader raise something else.
    @pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
    def test_truncated_file_of_torch(self, folder, share):
        (folder / "image" / "model.safetensors").unlink()
        path = folder / "image" / "pytorch_model.bin"
        torch.save(make_model().state_dict(), path)
        assert MoNEForImageClassification.from_pretrained(folder / "image")
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(OSError, match=r"copy.image cannot be read; .*image.pytorch_model\.bin may be truncated"):
            MoNEForImageClassification.from_pretrained(folder / "image")

    def test_other_errors_stay_what_they_are(self, folder, monkeypatch):
        def fail(*args):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(MoNEForImageClassification, "__init__", fail)
        with pytest.raises(RuntimeError, match=r"^out of memory"):
            MoNEForImageClassification.from_pretrained(folder / "image")

    def test_truncated_or_missing_shards(self, folder):
        shards = sorted((folder / "sharded").glob("model-*.safetensors"))
        assert len(shards) > 2
        shards[1].write_bytes(shards[1].read_bytes()[:-1])
        with pytest.raises(OSError, match=f"copy.sharded cannot be read; .*{shards[1].name} may be truncated"):
            AutoModelForImageClassification.from_pretrained(folder / "sharded")
        shards[1].unlink()
        with pytest.raises(OSError, match=shards[1].name):
            AutoModelForImageClassification.from_pretrained(folder / "sharded")
        index = folder / "sharded" / "model.safetensors.index.json"
        index.write_text(index.read_text()[:100])
        with pytest.raises(OSError, match=f"copy.sharded cannot be read; .*{index.name} may be truncated"):
            AutoModelForImageClassification.from_pretrained(folder / "sharded")

    def test_a_truncated_shard_of_torch(self, folder):
        state = make_model().state_dict()
        names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        for path in (folder / "image").glob("*.safetensors"):
            path.unlink()
        files = {key: names[number % 2] for number, key in enumerate(state)}
        for name in names:
            shard = {key: value for key, value in state.items() if files[key] == name}
            torch.save(shard, folder / "image" / name)
        index = folder / "image" / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
        # As Trainer leaves it: a pickle of more than tensors, and no weights.
        torch.save(torch.nn.Identity(), folder / "image" / "training_args.bin")
        assert MoNEForImageClassification.from_pretrained(folder / "image")
        path = folder / "image" / names[1]
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(OSError, match=rf"image cannot be read; .*image.{names[1]} may be truncated"):
            MoNEForImageClassification.from_pretrained(folder / "image")
        index.write_text("no JSON")
        with pytest.raises(OSError, match=rf"image cannot be read; .*image.{index.name} may be truncated"):
            MoNEForImageClassification.from_pretrained(folder / "image")

    def test_truncated_in_a_subfolder_and_in_the_cache_of_the_hub(self, folder):
        path = folder / "image" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:400])
        with pytest.raises(OSError, match=r"copy cannot be read; .*image.model\.safetensors may be truncated"):
            MoNEForImageClassification.from_pretrained(folder, subfolder="image")
        cached, commit = folder / "models--alice--image", "0" * 40
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(commit)
        shutil.copytree(folder / "image", cached / "snapshots" / commit)
        with pytest.raises(
            OSError, match=rf"alice/image cannot be read; .*{commit}.model\.safetensors may be truncated"
        ):
            MoNEForImageClassification.from_pretrained("alice/image", cache_dir=folder, local_files_only=True)

    def test_a_damaged_file_that_is_not_loaded_is_not_to_blame(self, folder):
        (folder / "image" / "pytorch_model.bin").write_bytes(b"")
        assert MoNEForImageClassification.from_pretrained(folder / "image")
        with pytest.raises(ValueError, match=r"^num_experts"):
            MoNEForImageClassification.from_pretrained(folder / "image", num_experts=0)
        with pytest.raises(OSError, match="never"):
            MoNEForImageClassification.from_pretrained(folder / "never")

    def test_a_pipeline_says_so_too(self, folder):
        change(folder / "image", mone__layers__1__mlp__fc1__weight=None)
        with pytest.raises(ValueError, match=r"missing: mone\.layers\.1\.mlp"):
            pipeline("image-classification", model=str(folder / "image"), device="cpu")


class TestWhatMayDiffer:
    def test_a_base_model_from_a_classifier_and_back(self, originals):
        classifier = MoNEForImageClassification.from_pretrained(originals / "image")
        base = MoNEModel.from_pretrained(originals / "image")
        assert same_weights(base, classifier.mone)
        new, info = MoNEForImageClassification.from_pretrained(
            originals / "image_base", num_labels=5, output_loading_info=True
        )
        assert same_weights(new.mone, base)
        assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
        assert new.classifier.weight.shape == (5, 32)

    def test_no_classes(self, originals):
        assert same_weights(
            MoNEForImageClassification.from_pretrained(originals / "image", num_labels=0).mone,
            MoNEModel.from_pretrained(originals / "image"),
        )

    def test_other_labels_and_routers_where_asked_for(self, originals):
        old = MoNEForImageClassification.from_pretrained(originals / "image")
        changes = {"num_labels": 7, "router_layers": (0, 1)}
        with pytest.raises(ValueError, match=r"routers\.1\.alpha.*classifier\.bias \(3,\) instead of \(7,\)"):
            MoNEForImageClassification.from_pretrained(originals / "image", **changes)
        new = MoNEForImageClassification.from_pretrained(originals / "image", ignore_mismatched_sizes=True, **changes)
        assert same_weights(new.mone.layers, old.mone.layers)
        assert same_weights(new.mone.routers[0], old.mone.routers[0])
        assert new.classifier.bias.shape == (7,)
        with pytest.raises(
            ValueError, match=r"not in this model: .* Pass ignore_mismatched_sizes=True to leave them out"
        ):
            MoNEForImageClassification.from_pretrained(originals / "image", router_type="random")
        random = MoNEForImageClassification.from_pretrained(
            originals / "image", router_type="random", ignore_mismatched_sizes=True
        )
        assert same_weights(random.mone.layers, old.mone.layers)

    @pytest.mark.parametrize(
        ("cls", "name", "encoder"),
        [
            (MoNEForImageClassification, "image", "mone"),
            (MoNEViViTForVideoClassification, "video", "mone_vivit__spatial"),
        ],
    )
    def test_a_router_is_new_as_a_whole(self, folder, cls, name, encoder):
        def load(**config):
            model = cls.from_pretrained(folder / name, ignore_mismatched_sizes=True, **config)
            (router,) = (module for module in model.modules() if isinstance(module, Router))
            return router

        alpha, bias = f"{encoder}__routers__0__alpha", f"{encoder}__routers__0__proj__bias"
        change(folder / name, **{alpha: torch.tensor([0.3]), bias: torch.ones(4)})
        assert load().alpha.item() == pytest.approx(0.3)
        new = load(num_experts=3)
        assert new.proj.weight.shape == (3, 32)
        assert new.alpha.item() == 0, "a trained alpha is no gate for a random projection"
        change(folder / name, **{alpha: None})
        assert not load().proj.bias.any()

    def test_weights_given_as_a_state_dict(self):
        model = make_model(1)
        config = make_model().config
        config.architectures = None
        loaded = MoNEForImageClassification.from_pretrained(None, config=config, state_dict=model.state_dict())
        assert same_weights(loaded, model)
        loaded = MoNEForImageClassification.from_pretrained(None, config=config, state_dict=model.mone.state_dict())
        assert same_weights(loaded.mone, model.mone)


class TestSaving:
    def test_one_file_replaces_shards_and_shards_one_file(self, tmp_path):
        for seed, size in enumerate(("1GB", "20KB", "30KB", "1GB", "20KB")):
            model = make_model(seed)
            model.save_pretrained(tmp_path, max_shard_size=size)
            assert (tmp_path / "model.safetensors").exists() == (size == "1GB")
            assert (tmp_path / "model.safetensors.index.json").exists() == (size != "1GB")
            assert same_weights(MoNEForImageClassification.from_pretrained(tmp_path), model)
        variant = make_model(9)
        variant.save_pretrained(tmp_path, variant="other")
        assert same_weights(MoNEForImageClassification.from_pretrained(tmp_path), model)
        assert same_weights(MoNEForImageClassification.from_pretrained(tmp_path, variant="other"), variant)

    @pytest.mark.parametrize("size", ["1GB", "20KB"])
    def test_a_full_disk_leaves_what_was_there(self, tmp_path, monkeypatch, size):
        old = make_model(0)
        old.save_pretrained(tmp_path, max_shard_size=size)
        (tmp_path / "README.md").write_text("mine")
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        written = []

        def save_one(tensors, filename, metadata=None):
            if written:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(filename)
            safetensors.torch.save_file(tensors, filename, metadata)
            if size == "1GB":
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save_one)
        with pytest.raises(OSError, match="No space left"):
            make_model(1, layer_norm_eps=1e-3, router_layers=(1,)).save_pretrained(tmp_path, max_shard_size=size)
        assert written
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        assert same_weights(MoNEForImageClassification.from_pretrained(tmp_path), old)
