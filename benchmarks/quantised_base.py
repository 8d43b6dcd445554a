"""A frozen base in 8 or 4 bits beside float32: memory, loss, time of a step.

    python benchmarks/quantised_base.py --steps 30        # about 6 minutes
    python benchmarks/quantised_base.py --quick           # 5 steps, 3 minutes

LoRA r=16 over SmolLM2-135M on MovieLens latest-small, titles in a worded prompt, the same rows for all, each kind in a process of
its own. The last line is JSON: for each kind `kernel_bytes`, `loss_before` and `loss_after` the steps (nats a target token, the
same four held-out steps), `step_seconds` (median), `peak_bytes` (of the process above what it had before it loaded the base).
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from command import run_main

KINDS = ("none", "int8", "int4", "nf4")
HELD_OUT = 4
"""Steps of rows that are not trained on."""


def measure(kind: str, steps: int, folder: Path) -> dict[str, Any]:
    """In a process of its own."""
    import jax
    from flax import nnx

    from sftrec_jax.config import ItemsConfig, PromptConfig, RunConfig, TrainConfig
    from sftrec_jax.config_file import load_config
    from sftrec_jax.model.sharding import named_arrays
    from sftrec_jax.run.folder import RunFolder
    from sftrec_jax.run.session import prepare
    from sftrec_jax.run.stages import training_segments
    from sftrec_jax.train.batches import BatchPlan
    from sftrec_jax.train.loss import target_loss
    from sftrec_jax.train.optimizer import make_optimizer
    from sftrec_jax.train.step import init_state, make_train_step, shard_batches

    base: RunConfig = load_config(Path(__file__).parent.parent / "configs" / "movielens.yaml")
    config = dataclasses.replace(
        base,
        items=ItemsConfig(tokenizer="title"),
        prompt=PromptConfig("instruct", 10, suffix="", stride=5),
        model=dataclasses.replace(base.model, compute_dtype="float32", quantise=kind, remat="none"),
        train=TrainConfig(row_length=512, batch_rows=1, learning_rate=1e-3, max_steps=1000, epochs=1.0),
    )
    session = prepare(RunFolder(folder / kind), config)
    plan = BatchPlan(training_segments(session)[0][0], config.train)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    decoder = session.base_decoder()
    arrays = named_arrays(nnx.split(decoder)[1])
    held = [array for path, array in arrays.items() if "/kernel" in path]
    bits = {"int4": 4, "uint4": 4}
    kernel_bytes = sum(array.size * bits.get(str(array.dtype), 8 * array.dtype.itemsize) // 8 for array in held)
    graphdef, trained, frozen = session.split(decoder)
    optimizer = make_optimizer(config.train, max(steps, 2))
    state = init_state(named_arrays(trained), optimizer, session.mesh)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained)
    step = make_train_step(graphdef, template, optimizer, None, state)
    loss_of = jax.jit(lambda trained, frozen, batch: target_loss(nnx.merge(graphdef, trained, frozen), batch))

    def held_out(state: Any) -> float:
        from sftrec_jax.model.sharding import with_arrays

        total = targets = 0.0
        for at in range(HELD_OUT):
            batch = jax.tree.map(lambda x: x[0], shard_batches(plan.batch(steps + at), session.mesh))
            total += float(loss_of(with_arrays(template, state.trained), frozen, batch))
            targets += float(np.asarray(batch.weights).sum())
        return total / targets

    first, times = held_out(state), []
    for at in range(steps):
        begin = time.perf_counter()
        state, metrics = step(state, frozen, shard_batches(plan.batch(at), session.mesh))
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - begin)
    return {
        "kernel_bytes": kernel_bytes,
        "loss_before": round(first, 4),
        "loss_after": round(held_out(state), 4),
        "step_seconds": round(statistics.median(times[1:]), 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="training steps of 512 tokens")
    parser.add_argument("--quick", action="store_true", help="5 steps")
    parser.add_argument("--one", nargs=3, metavar=("KIND", "STEPS", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), Path(args.one[2]))))
        return
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for kind in KINDS:
            command = [sys.executable, __file__, "--one", kind, str(5 if args.quick else args.steps), name]
            done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(done.returncode)
            found[kind] = json.loads(done.stdout.splitlines()[-1])
            print(f"{kind}: {found[kind]}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    run_main(main)
