# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""What capacity saves on the clock: MoNE against transformers' dense layers, in one process and in turn.

    MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 \\
        python scripts/benchmark.py --models vit_base vit_small --batch_sizes 1 8 --capacities 0.3 0.4 1.0 \\
        --modes eager prepared compiled --output_dir outputs/benchmark

prints a table and writes results.json and speed.png (in the manner of the paper's Fig. 6), with --growth growth.json
and growth.png. The modes onnx and onnx_int8 run in ONNX Runtime, the dense model, too. Efficiency is the speed-up
divided by the reduction in multiply-accumulates. The two variables keep glibc from giving large tensors back to the
system at every call, which would time page faults.
"""

import argparse
import json
from pathlib import Path

import torch

from mone import MoNEConfig, MoNEViViTConfig
from mone.benchmark import BASELINES, MODES, environment, growth, measure, routing_share
from mone.plots import check_matplotlib, plot_growth, plot_speed


def of_width(width: int) -> dict[str, int]:
    """ViT's proportions."""
    return {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}


MODELS = {
    "vit_tiny": MoNEConfig(**of_width(192), num_labels=1000),
    "vit_small": MoNEConfig(**of_width(384), num_labels=1000),
    "vit_base": MoNEConfig(num_labels=1000),
    "vivit_base": MoNEViViTConfig(num_labels=174),
}
# Axis -> value, model, batch size. Of ViT-S, at 224 pixels and batch 1, where it is not the axis.
GROWTH = {
    "image size": [(size, MoNEConfig(**of_width(384), image_size=size), 1) for size in (224, 288, 336, 384, 448)],
    "frames": [(frames, MoNEViViTConfig(**of_width(384), num_frames=frames), 1) for frames in (8, 16, 32, 64)],
    "batch": [(batch, MoNEConfig(**of_width(384)), batch) for batch in (1, 2, 4, 8, 16)],
    "width": [(width, MoNEConfig(**of_width(width)), 1) for width in (192, 384, 768, 1024)],
}
COLUMNS = (
    *("model", "mode", "capacity", "batch", "GMACs", "ms", "spread", "per second"),
    *("peak MB", "less", "faster", "efficiency"),
)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["vit_base"], help="default: %(default)s")
    parser.add_argument("--capacities", nargs="+", type=float, default=[0.3, 0.4, 1.0], help="default: %(default)s")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[8], help="default: %(default)s")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager"], help="default: %(default)s")
    parser.add_argument("--baselines", nargs="+", choices=BASELINES, default=[], help="what else to time, for images")
    parser.add_argument(
        "--growth", action="store_true", help="instead of models and batch sizes: how the cost grows; in one mode"
    )
    parser.add_argument("--train", action="store_true", help="time forward and backward")
    parser.add_argument("--image_size", type=int, help="in pixels; default: 224")
    parser.add_argument("--num_layers", type=int, help="fewer layers, for a quick look; default: the model's")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each variant; default: %(default)s")
    parser.add_argument("--onnx_dir", type=Path, help="keep ONNX files there, to use them again; default: do not")
    parser.add_argument("--output_dir", type=Path, help="for JSON and picture; default: print only")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} must be at least 1")
    if args.output_dir is not None:
        check_matplotlib()
    if args.threads:
        torch.set_num_threads(args.threads)

    if args.growth:
        check_growth_options(parser, args)

    facts = environment()
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    print(" | ".join(COLUMNS))
    if args.growth:
        return time_growth(args, facts)
    results = []
    for name in args.models:
        config = MODELS[name]
        changes = {"image_size": args.image_size, "num_hidden_layers": args.num_layers}
        config = type(config)(**{**config.to_dict(), **{k: v for k, v in changes.items() if v is not None}})
        for batch_size in args.batch_sizes:
            rows = measure(
                config,
                args.capacities,
                batch_size,
                modes=args.modes,
                baselines=args.baselines,
                train=args.train,
                device=args.device,
                dtype=getattr(torch, args.dtype),
                rounds=args.rounds,
                onnx_dir=args.onnx_dir,
            )
            for row in rows:
                row["name"] = name
                print(line_of(row), flush=True)
            results += rows
            if not args.train and not isinstance(config, MoNEViViTConfig) and args.device == "cpu":
                share = routing_share(config, args.capacities[0], batch_size, rounds=args.rounds)
                print(f"    routing takes {share:.2%} of a forward at capacity {args.capacities[0]:g}", flush=True)
                results.append({"name": name, "batch_size": batch_size, "routing_share": share})
    write(args.output_dir, "results", facts, results, plot_speed)
    return results


def check_growth_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if len(args.modes) > 1:
        parser.error("--growth takes one of --modes")
    used = ("growth", "capacities", "modes", "threads", "rounds", "output_dir")
    others = {name: value for name, value in vars(args).items() if name not in used}
    given = [f"--{name}" for name, value in others.items() if value != parser.get_default(name)]
    if given:
        parser.error(f"--growth has models and sizes of its own, in float32 on the CPU: leave out {', '.join(given)}")


def time_growth(args: argparse.Namespace, facts: dict) -> list[dict]:
    results = growth(GROWTH, args.capacities, mode=args.modes[0], rounds=args.rounds)
    for row in results:
        print(line_of({"name": f"{row['axis']} {row['value']}", **row}))
    write(args.output_dir, "growth", facts, results, plot_growth)
    return results


def write(folder: Path | None, name: str, facts: dict, rows: list[dict], plot) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    plot([row for row in rows if "model" in row], folder / f"{'speed' if name == 'results' else name}.png")


def line_of(row: dict) -> str:
    efficiency = f"{row['efficiency']:.2f}"
    if f"efficiency_{row['mode']}" in row:
        efficiency += f" ({row['efficiency_' + row['mode']]:.2f} against dense in this mode)"
    cells = (
        f"{row['name']} {row['model']}",
        row["mode"],
        "" if row["capacity"] is None else f"{row['capacity']:g}",
        str(row["batch_size"]),
        f"{row['gmacs']:.2f}",
        f"{row['milliseconds']:.1f}",
        f"{row['spread']:.1%}",
        f"{row['per_second']:.1f}",
        "" if row["peak_megabytes"] is None else f"{row['peak_megabytes']:.0f}",
        f"{row['reduction']:.2f}x",
        f"{row['speedup']:.2f}x",
        efficiency + (f" compiled in {row['compile_seconds']:.0f} s" if "compile_seconds" in row else ""),
    )
    return " | ".join(cells)


if __name__ == "__main__":
    main()
