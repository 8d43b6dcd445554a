"""TIGER-style training on Amazon Beauty with each way to name an item, all for the same number of minutes.

    python benchmarks/naming_training.py --minutes 3 --users 4000

Everything but the naming is `configs/tiger_beauty.yaml`. For each naming a probe of a few steps measures the seconds a step,
then a run of as many steps as fit into the minutes is trained from the start (with its own warm-up and cosine) and ranks the
full catalogue for test users drawn by `train.seed`, seen items masked. The last line is JSON: for each naming `ndcg@10`,
`recall@10`, `tokens_an_item` (mean), `steps`, `epochs`, `train_seconds`, `prepare_seconds`.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from command import run_main

from sftrec_jax.config import RunConfig
from sftrec_jax.config_file import load_config, parse_config, to_dict
from sftrec_jax.run import evaluation, stages
from sftrec_jax.run.folder import RunFolder
from sftrec_jax.run.session import Session, prepare

CONFIG = Path(__file__).parent.parent / "configs" / "tiger_beauty.yaml"
PROBE = 24
"""Steps of a probe; the first third holds the compilation."""

NAMINGS: dict[str, dict[str, dict[str, object]]] = {
    "atomic": {"items": {"tokenizer": "atomic", "init": "codebook"}},
    "atomic, rows at the mean": {"items": {"tokenizer": "atomic", "init": "mean"}},
    "cid": {"items": {"tokenizer": "cid", "init": "collaborative"}},
    "rqvae": {},
    "rqvae, nearest": {"semantic": {"collisions": "nearest"}},
    "rqvae of text alone": {"embedding": {"collaborative": "none"}},
    "rqkmeans": {"items": {"tokenizer": "rqkmeans"}},
    "rqkmeans balanced": {"items": {"tokenizer": "rqkmeans"}, "semantic": {"balanced": True}},
    "opq": {"items": {"tokenizer": "opq"}},
    "letter": {
        "items": {
            "tokenizer": "file", "codes_file": "$SFTREC_DATA/amazon-beauty/semantic_ids_letter.json.gz", "codes_keys": "row",
            "init": "collaborative",
        }
    },
    "keyphrase": {"items": {"tokenizer": "keyphrase", "init": "mean", "max_title_tokens": 12}, "prompt": {"max_history": 8}},
}  # fmt: skip


def configured(base: RunConfig, changes: dict[str, dict[str, object]], folder: Path) -> RunConfig:
    """The base configuration with some fields changed, read as a file is, so that paths resolve alike."""
    values = to_dict(base)
    for section, fields in changes.items():
        values[section] |= fields
    parse_config(values, "naming_training.py")
    path = folder / "config.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return load_config(path)


def with_steps(session: Session, folder: Path, steps: int) -> Session:
    """The prepared run in a folder of its own, to be trained for that many steps, validated at the end alone."""
    train = dataclasses.replace(session.config.train, epochs=1e6, max_steps=steps, validate_every=steps)
    shutil.copytree(session.folder.prepared, folder / "prepared")
    return dataclasses.replace(session, folder=RunFolder(folder), config=dataclasses.replace(session.config, train=train))


def seconds_a_step(folder: Path) -> float:
    """From the records of a probe, the compilation left out."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    at = {record["step"]: record["seconds"] for record in map(json.loads, lines) if "loss" in record}
    first = PROBE // 3
    return (at[PROBE - 1] - at[first]) / (PROBE - 1 - first)


def measure(name: str, base: RunConfig, minutes: float, folder: Path) -> dict[str, object]:
    """Prepares, probes, trains and evaluates one naming."""
    folder.mkdir()
    begin = time.monotonic()
    session = prepare(RunFolder(folder), configured(base, NAMINGS[name], folder))
    prepared = time.monotonic() - begin
    probe = with_steps(session, folder / "probe", PROBE)
    stages.train_stage(probe, False)
    steps = max(PROBE, round(minutes * 60 / seconds_a_step(probe.folder.path)))
    run = with_steps(session, folder / "run", steps)
    result = stages.train_stage(run, False)
    decoder, step = run.trained_decoder()
    metrics = evaluation.evaluate_stage(run, decoder, step)
    return {
        "ndcg@10": round(metrics["model"]["ndcg@10"], 4),
        "recall@10": round(metrics["model"]["recall@10"], 4),
        "users": metrics["users"],
        "tokens_an_item": round(float(session.codes.lengths.mean()), 2),
        "steps": steps,
        "epochs": round(result.targets / (session.dataset.train_end.sum() * float(np.mean(session.codes.lengths))), 2),
        "train_seconds": round(result.seconds - result.seconds_validating, 1),
        "prepare_seconds": round(prepared, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of training for each naming")
    parser.add_argument("--users", type=int, default=4000, help="test users")
    parser.add_argument("--only", nargs="*", choices=list(NAMINGS), default=list(NAMINGS))
    args = parser.parse_args()
    base = load_config(CONFIG)
    evaluate = dataclasses.replace(base.evaluate, users=args.users, unconstrained_users=0)
    base = dataclasses.replace(base, evaluate=evaluate)
    rows: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(args.only):
            rows[name] = measure(name, base, args.minutes, Path(folder) / str(i))
            print(f"== {name}: {json.dumps(rows[name])}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    run_main(main)
