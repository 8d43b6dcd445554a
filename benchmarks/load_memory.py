"""Peak host memory of loading a checkpoint, on one device and divided over four, against what must be held anyway.

    python benchmarks/load_memory.py --gigabytes 2      (--quick: 0.3)

Writes a random Llama in bfloat16, in several files, into a temporary folder, and loads it in processes of their own. On a CPU the
arrays themselves are host memory. The last line is JSON: for one and four devices `largest_tensor_bytes`, `local_shard_bytes`,
`peak_bytes` (above what the process had before it loaded), `ratio` = peak / (1.2 largest + shards), at most 1; `seconds`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from command import run_main

VOCAB, HIDDEN, FFW, HEADS = 65_536, 2_048, 5_632, 16


def write_model(folder: Path, gigabytes: float) -> None:
    """Layers until the size is reached; weights repeat a block of random numbers, which costs no time to make."""
    import ml_dtypes
    from safetensors.numpy import save_file

    per_layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFW)
    layers = max(1, round((gigabytes * 1e9 - 2 * VOCAB * HIDDEN) / per_layer))
    config = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFW, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "tie_word_embeddings": True, "max_position_embeddings": 2048,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    block = (np.random.default_rng(0).standard_normal(1 << 20) * 0.02).astype(ml_dtypes.bfloat16)

    def values(*shape: int) -> np.ndarray:
        return np.resize(block, shape)

    save_file(
        {"model.embed_tokens.weight": values(VOCAB, HIDDEN), "model.norm.weight": values(HIDDEN)},
        folder / "model-00000.safetensors",
    )
    for i in range(layers):
        at = f"model.layers.{i}"
        tensors = {
            f"{at}.{name}.weight": values(*shape)
            for name, shape in (
                ("input_layernorm", (HIDDEN,)),
                ("post_attention_layernorm", (HIDDEN,)),
                *((f"self_attn.{p}_proj", (HIDDEN, HIDDEN)) for p in "qkvo"),
                ("mlp.gate_proj", (FFW, HIDDEN)),
                ("mlp.up_proj", (FFW, HIDDEN)),
                ("mlp.down_proj", (HIDDEN, FFW)),
            )
        }
        save_file(tensors, folder / f"model-{i + 1:05d}.safetensors")


def load(folder: Path, devices: int) -> None:
    """In a process of its own: prints the figures as JSON."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from sftrec_jax.config import MeshConfig
    from sftrec_jax.items.codes import ItemCodes
    from sftrec_jax.model.hub import BaseSource
    from sftrec_jax.model.load import Build, load_decoder, source_architecture
    from sftrec_jax.model.mesh import make_mesh

    codes = ItemCodes(np.array([[5], [6]], np.int32), (), np.zeros(0, np.int32), (), np.array(["a", "b"], object))
    source = BaseSource(folder=folder, gguf=None, tokenizer=folder, label=str(folder))
    arch = source_architecture(source)
    build = Build(arch, None, (), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16), "none")
    mesh = make_mesh(MeshConfig(data=1, fsdp=devices))
    jax.block_until_ready(jnp.ones((256, 256)) @ jnp.ones((256, 256)))
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter()
    decoder = load_decoder(build, source, codes, mesh, 0, False)
    state = jax.block_until_ready(nnx.split(decoder)[1])
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    leaves = jax.tree.leaves(state)
    shards = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    largest = 2 * VOCAB * HIDDEN
    figures = {
        "largest_tensor_bytes": largest,
        "local_shard_bytes": shards,
        "peak_bytes": peak,
        "ratio": round(peak / (1.2 * largest + shards), 3),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--quick", action="store_true", help="0.3 GB")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "DEVICES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(Path(args.load[0]), int(args.load[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), 0.3 if args.quick else args.gigabytes)
        found = {}
        for devices in (1, 4):
            flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
            command = [sys.executable, __file__, "--load", name, str(devices)]
            done = subprocess.run(command, env=os.environ | flags, stdout=subprocess.PIPE, text=True, check=True)
            found[f"devices_{devices}"] = json.loads(done.stdout.splitlines()[-1])
            print(f"{devices} device(s): {found[f'devices_{devices}']}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    run_main(main)
