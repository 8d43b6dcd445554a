"""How time and memory grow: training steps over rows, row length, rank, layers and devices; data preparation over examples.

    python benchmarks/scaling.py --to docs/plots/scaling.png          # about 15 minutes; --quick: the smaller half of each axis

A step trains LoRA (rank 16, all linear) on a random Llama (hidden 256, 4 layers, 8 heads over 4 kv-heads of 32, FFN 768, 8,192
tokens, float32) on rows of 512 tokens in segments of 128, a quarter of the tokens targets; each axis changes one of these.
`devices` are virtual ones on the same cores, over whose data axis 8 rows are divided: the work is the same throughout, so time
should be level. `examples` cuts synthetic histories (8 to 40 of 20,000 items, titles of 4 to 12 tokens) into segments, plans
an epoch of rows of 1,024 and packs the first 16. Every point is a process of its own; its time is the least of several steps (of
one preparation), its memory the process' peak.

The last line is one JSON object: `slopes` (of each axis the exponent of time and of memory beyond the smallest point, by least
squares of logarithms over the larger half), `points` (axis, value, seconds, gigabytes), `device`, `versions`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

AXES = {
    "rows": [1, 2, 4, 8, 16],
    "tokens a row": [256, 512, 1024, 2048, 4096, 8192],
    "rank": [4, 8, 16, 32, 64, 128],
    "layers": [2, 4, 8, 16, 32],
    "devices": [1, 2, 4, 8],
    "examples": [10_000, 100_000, 1_000_000, 10_000_000],
}
STEPS = 6
SEGMENT, ROW = 128, 512
ITEMS, PLAN_ROW, PACKED = 20_000, 1024, 16


def step_point(axis: str, value: int) -> tuple[float, float]:
    """Seconds of a step and gigabytes of the process."""
    import jax
    from flax import nnx

    from sftrec_jax.config import LoraConfig, MeshConfig, ModelConfig, TrainConfig
    from sftrec_jax.data.segments import PackedBatch
    from sftrec_jax.items.codes import ItemCodes
    from sftrec_jax.model.hub import BaseSource
    from sftrec_jax.model.load import load_decoder, make_build, source_architecture, trainable_filter
    from sftrec_jax.model.mesh import make_mesh
    from sftrec_jax.model.sharding import named_arrays
    from sftrec_jax.train.meter import memory_peak
    from sftrec_jax.train.optimizer import make_optimizer
    from sftrec_jax.train.step import init_state, make_train_step, shard_batches

    sizes = {"rows": 1, "tokens a row": ROW, "rank": 16, "layers": 4, "devices": 1} | {axis: value}
    rows, length = (8 if axis == "devices" else sizes["rows"]), sizes["tokens a row"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8192, "hidden_size": 256,
            "intermediate_size": 768, "num_hidden_layers": sizes["layers"], "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 32, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": 16384, "tie_word_embeddings": True, "hidden_act": "silu",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        source = BaseSource(folder=folder, gguf=None, tokenizer=folder, label="random")
        codes = ItemCodes(np.array([[5], [6]], np.int32), (), np.zeros(0, np.int32), (), np.array(["a", "b"], object))
        train, model = TrainConfig(), ModelConfig(compute_dtype="float32", from_scratch=True, remat="dots")
        build = make_build(model, LoraConfig(r=sizes["rank"]), train, source_architecture(source), codes)
        mesh = make_mesh(MeshConfig(data=sizes["devices"]), jax.devices()[: sizes["devices"]])
        decoder = load_decoder(build, source, codes, mesh, 0, True)
    graphdef, trained, frozen = nnx.split(decoder, trainable_filter("lora"), ...)
    optimizer = make_optimizer(train, 100)
    state = init_state(named_arrays(trained), optimizer, mesh)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained)
    step = make_train_step(graphdef, template, optimizer, None, state)
    place = np.arange(length)
    rng = np.random.default_rng(0)

    def everywhere(x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, (1, rows, len(x))).astype(np.int32)

    targets = everywhere(place[3::4])
    batch = shard_batches(
        PackedBatch(
            rng.integers(7, 8192, (1, rows, length)).astype(np.int32), everywhere(place % SEGMENT),
            everywhere(place // SEGMENT + 1), everywhere(place * 0), everywhere(place % SEGMENT + 1), targets,
            rng.integers(7, 8192, targets.shape).astype(np.int32), np.ones(targets.shape, np.float32),
        ), mesh,
    )  # fmt: skip
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - begin)
    return min(times), memory_peak() / 1e9


def data_point(examples: int) -> tuple[float, float]:
    """Seconds of preparing so many examples, and gigabytes of the process."""
    from sftrec_jax.config import TrainConfig
    from sftrec_jax.data.segments import Pieces, Segments
    from sftrec_jax.data.windows import Windows, with_history
    from sftrec_jax.train.batches import BatchPlan
    from sftrec_jax.train.meter import memory_peak

    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 41, examples // 23 + 1)
    items = rng.integers(0, ITEMS, lengths.sum()).astype(np.int32)
    titles = [rng.integers(10, 9000, n).astype(np.int32) for n in rng.integers(4, 13, ITEMS)]
    written = [np.append(title, 9).astype(np.int32) for title in titles]
    codes = np.full((ITEMS, 13), -1, np.int32)
    for row, title in zip(codes, titles, strict=True):
        row[: len(title) + 1] = [*title, 9]
    begin = time.perf_counter()
    nothing = np.zeros(0, np.int32)
    pieces = Pieces.of([np.asarray([1], np.int32)], nothing, written, codes)
    sums = np.concatenate([[0], np.cumsum(np.diff(pieces.texts)[items])])
    edges = np.concatenate([[0], np.cumsum(lengths)])
    histories = Windows(edges[:-1], edges[:-1] + 1, edges[1:])
    segments = Segments(items, with_history(sums, histories, 50, PLAN_ROW - 14, 1), pieces)
    plan = BatchPlan(segments, TrainConfig(row_length=PLAN_ROW, batch_rows=PACKED))
    plan.batch(0)
    made = int(segments.target_items.sum())
    return (time.perf_counter() - begin) * examples / made, memory_peak() / 1e9


def slope(points: list[dict[str, Any]], key: str) -> float:
    """The exponent of growth over the larger half, for memory beyond that of the smallest point."""
    base = points[0][key] if key == "gigabytes" else 0.0
    half = points[len(points) // 2 :] if len(points) > 3 else points[1:]
    x, y = np.log([p["value"] for p in half]), np.log([max(p[key] - base, 1e-3) for p in half])
    return float(np.polyfit(x, y, 1)[0])


def plot(points: list[dict[str, Any]], to: Path) -> None:
    """One panel an axis: seconds and gigabytes, both scales logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for panel, axis in zip(panels.flat, AXES, strict=True):
        here = [p for p in points if p["axis"] == axis]
        x = [p["value"] for p in here]
        panel.loglog(x, [p["seconds"] for p in here], "o-", label="seconds")
        panel.loglog(x, [p["gigabytes"] for p in here], "s--", label="peak GB of the process")
        panel.loglog(x, [here[0]["seconds"] * v / x[0] for v in x], ":", color="grey", label="linear in the first point")
        panel.set_xticks(x, [f"{v:,}" if v < 10_000 else f"{v:.0e}" for v in x])
        panel.minorticks_off()
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3)
    panels.flat[0].legend()
    temporary = to.with_name(f".{to.name}")
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smaller half of each axis")
    parser.add_argument("--to", type=Path, help="where the plot goes (.png)")
    parser.add_argument("--point", nargs=2, metavar=("AXIS", "VALUE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        axis, value = args.point[0], int(args.point[1])
        seconds, gigabytes = data_point(value) if axis == "examples" else step_point(axis, value)
        print(json.dumps({"axis": axis, "value": value, "seconds": seconds, "gigabytes": gigabytes}))
        return
    points = []
    for axis, values in AXES.items():
        for value in values[: len(values) // 2 + 1] if args.quick else values:
            environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
            if axis == "devices":
                environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={value}"
            done = subprocess.run(
                [sys.executable, __file__, "--point", axis, str(value)],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            points.append(json.loads(done.stdout.splitlines()[-1]))
            print("{axis} {value}: {seconds:.3f} s, {gigabytes:.2f} GB".format(**points[-1]), flush=True)
    if args.to:
        plot(points, args.to)
    slopes = {}
    for axis in AXES:
        here = [p for p in points if p["axis"] == axis]
        slopes[axis] = {key: round(slope(here, key), 3) for key in ("seconds", "gigabytes")}
    print(json.dumps({
        "slopes": slopes,
        "points": points,
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("jax", "flax", "numpy")},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
