"""What only a GPU can show. Skipped without one.

Outputs are compared with the CPU's or with the plain model's on the same GPU; that nothing waits for the device is
asked of torch, which raises at every synchronisation.
"""

import contextlib
import copy

import pytest
import torch
from reference import assert_close, randomise_
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import pipeline

import mone  # noqa: F401  # registers the pipelines
from mone import MoNEConfig, MoNEForImageClassification, MoNEViViTConfig, MoNEViViTForVideoClassification
from mone.benchmark import measure
from mone.conversion import calibrate
from mone.training import MoNETrainer, MoNETrainingArguments


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WIDTHS = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256, "num_labels": 7}
CAPACITIES = [0.2, 0.4, (0.0, 0.0, 1.0, 0.0), 1.0]


def image_model(**config):
    torch.manual_seed(0)
    fields = {**WIDTHS, "num_hidden_layers": 3, "image_size": 64, "patch_size": 8, "router_layers": [0, 2]}
    return randomise_(MoNEForImageClassification(MoNEConfig(**{**fields, **config})), std=0.05).eval()


def video_model(**config):
    torch.manual_seed(0)
    fields = {**WIDTHS, "num_hidden_layers": 2, "num_temporal_layers": 1, "image_size": 32, "num_frames": 4}
    model = MoNEViViTForVideoClassification(MoNEViViTConfig(**fields, tubelet_size=(2, 8, 8), **config))
    return randomise_(model, std=0.05).eval()


MODELS = pytest.mark.parametrize("make", [image_model, video_model])


def example(model, batch=5):
    frames = (model.config.num_frames,) if isinstance(model.config, MoNEViViTConfig) else ()
    size = model.config.image_size
    return torch.randn(batch, *frames, 3, size, size, generator=torch.Generator().manual_seed(3))


@contextlib.contextmanager
def no_waiting():
    """Raises where Python waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_noticed():
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


@MODELS
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_outputs_and_gradients_are_those_of_the_cpu(make, capacity, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # by which convolutions would round
    results = []
    for device in ("cpu", "cuda"):
        model = make().to(device)
        x = example(model).to(device)
        with torch.no_grad():
            plain = model(x, capacity=capacity).logits
        logits = model(x, capacity=capacity).logits
        logits.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"inference": plain, "logits": logits.detach(), **gradients})
    cpu, gpu = results
    assert cpu.keys() == gpu.keys()
    for name in cpu:
        assert_close(gpu[name].cpu(), cpu[name], 1e-4)


@MODELS
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_nothing_waits_for_the_device(make, autocast):
    model = make().cuda()
    x, labels = example(model).cuda(), torch.arange(5, device="cuda")
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)

    def steps():
        for capacity in CAPACITIES:
            with torch.autocast("cuda", autocast, enabled=autocast is not None):
                with torch.no_grad():
                    model.eval()(x, capacity=capacity)
                loss = model.train()(x, capacity=capacity, labels=labels, output_router_logits=True).loss
            loss.backward()
            optimiser.step()
            model.project_alpha_()
            optimiser.zero_grad()

    steps()  # libraries are loaded at their first call
    with no_waiting():
        steps()


@MODELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision(make, dtype):
    model = make().cuda()
    x = example(model).cuda()
    for capacity in CAPACITIES:
        with torch.no_grad():
            expected = model(x, capacity=capacity).logits
            half = copy.deepcopy(model).to(dtype)
            plain = half(x.to(dtype), capacity=capacity).logits
            with torch.autocast("cuda", dtype):
                cast = model(x, capacity=capacity).logits
        with torch.autocast("cuda", dtype):
            trained = model(x, capacity=capacity).logits
        trained.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert plain.dtype == dtype
        if isinstance(capacity, tuple) or capacity == 1.0:  # elsewhere rounding moves tokens to other experts
            for logits in (plain, cast, trained):
                assert_close(logits.float(), expected, 0.05)


@MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_captured_graph_replays_on_other_input(make, dtype):
    model = make().to("cuda", dtype)
    x = example(model).to("cuda", dtype)
    with torch.no_grad():
        model(x, capacity=0.4)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(x, capacity=0.4)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(x, capacity=0.4).logits
        other = x.flip(0) + 1
        expected = model(other, capacity=0.4).logits
        x.copy_(other)
        graph.replay()
    assert_close(logits, expected)


@MODELS
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(make, mode):
    model = make().cuda()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for capacity in (0.4, 1.0):
            for seed in range(3):
                x = example(model).cuda() + seed
                expected = model(x, capacity=capacity).logits
                assert_close(compiled(x, capacity=capacity).logits, expected, 1e-3)


def test_compiled_layers_train_as_plain_ones():
    gradients = []
    for compiled in (False, True):
        model = image_model().cuda().train()
        torch._dynamo.reset()
        if compiled:
            for layer in model.mone.layers:
                layer.compile(dynamic=False)
        model(example(model).cuda(), capacity=0.4, labels=torch.arange(5, device="cuda")).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, 1e-3)


@MODELS
def test_flash_and_flex_attention(make):
    model = make(pooling="mean").cuda().to(torch.bfloat16)
    x = example(model).cuda().to(torch.bfloat16)
    with torch.no_grad():
        with sdpa_kernel(SDPBackend.MATH):
            expected = model(x, capacity=1.0).logits.float()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            assert_close(model(x, capacity=1.0).logits.float(), expected, 0.05)
            model(x, capacity=0.4)
        model.set_attn_implementation("flex_attention")
        assert_close(model(x, capacity=1.0).logits.float(), expected, 0.05)


def test_gradient_checkpointing_under_autocast():
    gradients = []
    for checkpointing in (False, True):
        model = image_model().cuda().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(example(model).cuda(), capacity=0.4, labels=torch.arange(5, device="cuda")).loss
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, plain)


@MODELS
@pytest.mark.parametrize("on_gpu", [False, True])
def test_random_routers_take_a_generator_of_either_device(make, on_gpu):
    model = make(router_type="random").cuda()
    x = example(model).cuda()
    with torch.no_grad():
        first, again = (
            model(x, capacity=0.4, generator=torch.Generator("cuda" if on_gpu else "cpu").manual_seed(1)).logits
            for _ in range(2)
        )
    assert torch.equal(first, again)


def test_optimize_for_inference_and_back():
    model = image_model().cuda()
    x = example(model).cuda()
    with torch.no_grad():
        expected = model(x, capacity=0.4).logits
        assert_close(model.optimize_for_inference()(x, capacity=0.4).logits, expected)
    model.train()(x, capacity=0.4).logits.sum().backward()
    with torch.no_grad():
        assert_close(model.cpu().optimize_for_inference()(x.cpu(), capacity=0.4).logits, expected.cpu(), 1e-4)
        assert_close(model.cuda()(x, capacity=0.4).logits, expected)


def test_calibration_is_that_of_the_cpu():
    logits = []
    for device in ("cpu", "cuda"):
        model = image_model(router_layers=[1]).to(device)
        with torch.no_grad():
            for router in model.mone.routers:
                router.alpha.zero_()
        x = example(model, 32).to(device)
        calibrate(model, x)
        with torch.no_grad():
            logits.append(model(x, capacity=1.0).logits.cpu())
            assert model(x, capacity=0.3).logits.isfinite().all()
    assert_close(logits[1], logits[0], 1e-3)


def test_loads_onto_the_gpu(tmp_path):
    model = image_model()
    model.save_pretrained(tmp_path)
    x = example(model)
    with torch.no_grad():
        expected = model(x, capacity=0.4).logits
        for device_map in ("cuda", "auto"):
            loaded = MoNEForImageClassification.from_pretrained(tmp_path, device_map=device_map)
            assert loaded.device.type == "cuda"
            assert_close(loaded(x.cuda(), capacity=0.4).logits.cpu(), expected, 1e-4)
    half = MoNEForImageClassification.from_pretrained(tmp_path, device_map="cuda", dtype=torch.float16)
    assert half(x.cuda(), capacity=0.4).logits.dtype == torch.float16


def test_pipeline():
    from transformers import ViTImageProcessor

    model = image_model()
    images = [(255 * (image - image.min()) / (image.max() - image.min())).byte().numpy() for image in example(model)]
    processor = ViTImageProcessor(size={"height": 64, "width": 64})
    answers = []
    for device in ("cpu", "cuda:0"):
        classify = pipeline(
            "image-classification", model=copy.deepcopy(model), image_processor=processor, device=device
        )
        answers.append(classify([image.transpose(1, 2, 0) for image in images], capacity=0.4, batch_size=3, top_k=7))
    for of_cpu, of_gpu in zip(*answers, strict=True):
        scores = {answer["label"]: answer["score"] for answer in of_gpu}
        for answer in of_cpu:
            assert abs(scores[answer["label"]] - answer["score"]) < 1e-3


def rows(count):
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(3, 64, 64, generator=generator), "labels": i % 7} for i in range(count)]


def make_trainer(folder, **args):
    defaults = {"per_device_train_batch_size": 8, "report_to": "none", "disable_tqdm": True, "max_steps": 6}
    arguments = {**defaults, "learning_rate": 1e-3, "logging_steps": 2, "capacity_schedule": "uniform", **args}
    return MoNETrainer(
        model=image_model(),
        args=MoNETrainingArguments(output_dir=str(folder), eval_capacities=[0.3, 1.0], **arguments),
        train_dataset=rows(32),
        eval_dataset=rows(12),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"fp16": True},
        {"bf16": True, "mixup": 0.2, "label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
        {"bf16": True, "distill_from": "self"},
        {"bf16": True, "capacity_schedule": "joint"},
        {"bf16": True, "compile_layers": True, "capacity_grid": [0.3, 0.5]},
    ],
    ids=lambda options: "-".join(options) or "float32",
)
def test_trainer(tmp_path, options):
    trainer = make_trainer(tmp_path, save_steps=3, **options)
    torch._dynamo.reset()
    result = trainer.train()
    assert torch.isfinite(torch.tensor(result.training_loss))
    assert next(trainer.model.parameters()).device.type == "cuda"
    assert trainer.evaluate()["eval_capacity_0.3_loss"] > 0
    # Resumed from the middle it ends with the same weights, but for the order of sums on the device.
    resumed = make_trainer(tmp_path, save_steps=3, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in trainer.model.state_dict().items():
        assert_close(resumed.model.state_dict()[name].cpu(), value.cpu(), 2e-3)


def test_training_steps_do_not_wait(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, logging_steps=100, max_grad_norm=1.0)
    trainer.train()
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows(8)]).cuda() for name in rows(1)[0]}
    with no_waiting():
        for _ in range(3):
            trainer.training_step(trainer.model, batch)


@pytest.mark.parametrize("modes", [("eager",), ("eager", "graphed")])
def test_benchmark(modes):
    config = image_model().config
    rows = measure(config, [0.4], 4, modes=modes, device="cuda", dtype=torch.bfloat16, rounds=2)
    assert [(row["model"], row["mode"]) for row in rows if row["mode"] in modes]
    assert all(row["milliseconds"] > 0 for row in rows)
