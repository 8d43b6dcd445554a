"""What the command line understands: verbs, options, help with an example each."""

import argparse
from pathlib import Path
from typing import NoReturn

from sftrec_jax import __version__
from sftrec_jax.errors import UserError

OVERRIDES = "Any field of the config can be changed: --train.epochs 2 --items.tokenizer title (see --help-config)."
DECODING = "Fields of decode and evaluate can be changed: --decode.beam 100 --decode.normaliser children (see run --help-config)."

EXAMPLES = {
    "run": "sftrec run configs/quick.yaml --out runs/quick",
    "prepare": "sftrec prepare configs/quick.yaml --out runs/quick",
    "train": "sftrec train runs/quick --resume",
    "evaluate": "sftrec evaluate runs/quick; other lists: sftrec evaluate runs/quick --lists theirs.csv --to theirs.json",
    "baselines": "sftrec baselines configs/movielens.yaml --tie-seeds 5",
    "export": "sftrec export runs/quick --to exported --format merged",
    "reproduce": "sftrec reproduce quick; to publish: sftrec reproduce quick --publish --seeds 0 1 2",
    "verify-results": "sftrec verify-results docs/results/quick.json --readme README.md",
    "inspect": "sftrec inspect configs/quick.yaml --rows 2; of a run: sftrec inspect runs/quick --step 10",
    "compile": "sftrec compile configs/qwen3_8b_lora.yaml --topology v5e:4x4",
    "add-items": "sftrec add-items runs/beauty --catalogue new.jsonl",
    "recommend": 'sftrec recommend runs/quick --history "Toy Story (1995); Heat (1995)"',
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    """Every verb with its options."""
    parser = _Parser(
        prog="sftrec",
        description="Supervised fine-tuning of a language model for recommendation, and ranking by real items only.",
        epilog=f"Start with: {EXAMPLES['run']}",
    )
    parser.add_argument("--version", action="version", version=f"sftrec-jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, text: str, config: bool = False, folder: bool = True) -> argparse.ArgumentParser:
        more = OVERRIDES if config else DECODING if name in ("evaluate", "recommend") else ""
        notes = f"Example: {EXAMPLES[name]}" + (f"\n{more}" if more else "")
        sub = verbs.add_parser(
            name,
            help=text,
            description=text,
            epilog=notes,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if config:
            sub.add_argument(
                "config", metavar="CONFIG", type=Path, nargs="?", help="YAML file; its relative paths are relative to it"
            )
            if folder:
                sub.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/NAME_OF_CONFIG)")
                sub.add_argument("--overwrite", action="store_true", help="remove an earlier run in DIR first")
            sub.add_argument("--help-config", action="store_true", help="list every field of the config with its default")
        elif folder:
            sub.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
        return sub

    run = verb("run", "Prepare, train, evaluate and export in one go.", config=True)
    run.add_argument("--resume", action="store_true", help="go on with the run in DIR; CONFIG may be left out")
    accept = "with --resume: go on although settings differ, which are named"
    run.add_argument("--accept-changes", action="store_true", help=accept)
    verb("prepare", "Read and split the data, name the items.", config=True)
    train = verb("train", "Train a prepared run.")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    train.add_argument("--accept-changes", action="store_true", help=accept)
    evaluate = verb("evaluate", "Rank the full catalogue for every test user, beside the baselines.")
    evaluate.add_argument(
        "--exact", action="store_true", help="also find the exact top K of the whole catalogue, and count what the beam missed"
    )
    evaluate.add_argument(
        "--lists",
        type=Path,
        metavar="FILE",
        help="score these lists instead of the model's: .parquet, .jsonl or .csv with columns user, rank (from 1), item_id",
    )
    evaluate.add_argument("--to", type=Path, metavar="OUT", help="with --lists: write the metrics as .json, too")
    evaluate.add_argument("--overwrite", action="store_true", help="with --lists: replace the OUT of --to")
    recommend = verb("recommend", "Recommend items for users or histories.")
    recommend.add_argument("--user", action="append", default=[], metavar="ID", help="a user of the run (may be repeated)")
    recommend.add_argument(
        "--history", action="append", default=[], metavar="ITEMS", help="titles or item ids, oldest first, with `;` between them"
    )
    recommend.add_argument(
        "--profile", action="append", default=[], metavar="FIELD=TEXT", help="what is known of the user of --history (repeatable)"
    )
    recommend.add_argument(
        "--file", type=Path, metavar="FILE", help=".jsonl or .parquet with a column `history`, or .txt with a line a user"
    )
    recommend.add_argument("--k", type=int, help="items a user (default 10); a narrower beam is widened to it")
    recommend.add_argument("--only", type=Path, metavar="FILE", help="recommend only these items: a line each, id or title")
    recommend.add_argument("--without", type=Path, metavar="FILE", help="never recommend these items: a line each, id or title")
    recommend.add_argument("--keep-seen", action="store_true", help="items of the history may be recommended again")
    recommend.add_argument(
        "--to", type=Path, metavar="FILE", help="write .parquet or .jsonl instead of printing; if killed, run it again to go on"
    )
    recommend.add_argument(
        "--shard", type=int, metavar="N", help="histories of FILE read, ranked and kept at a time (default 8192); see --to"
    )
    recommend.add_argument("--json", action="store_true", help="print JSON lines")
    recommend.add_argument("--overwrite", action="store_true", help="replace the FILE of --to or --preferences")
    pairs = recommend.add_argument_group(
        "preference pairs", "The last training item of each user against items that the model names."
    )
    pairs.add_argument(
        "--preferences", type=Path, metavar="FILE", help="write .jsonl for TRL's DPOTrainer, and recommend nothing"
    )
    pairs.add_argument("--users", type=int, metavar="N", help="users, drawn by --seed (default: all)")
    pairs.add_argument("--negatives", type=int, metavar="M", help="rejected items a user (default 1)")
    pairs.add_argument("--seed", type=int, metavar="S", help="draws users and rejected items (default 0)")
    add = verb("add-items", "Name new items without training again: semantic ids, titles or keyphrases.")
    add.add_argument(
        "--catalogue",
        type=Path,
        metavar="FILE",
        required=True,
        help="items, with the columns of the run's catalogue; known ones are passed over",
    )
    add.add_argument(
        "--vectors", type=Path, metavar="FILE", help=".npy with a row for each row of FILE, where the run has `embedding.file`"
    )
    counters = verb("baselines", "Score the baselines alone: what a model has to beat on this data.", config=True, folder=False)
    counters.add_argument(
        "--tie-seeds", type=int, default=1, metavar="N", help="orders of tied times to average over, from data.tie_seed up"
    )
    counters.add_argument("--to", type=Path, metavar="FILE", help="write the metrics as .json, too")
    counters.add_argument("--overwrite", action="store_true", help="replace the FILE of --to")
    export = verb("export", "Write the model or the item codes for other tools.")
    export.add_argument(
        "--to", type=Path, metavar="PATH", required=True, help="folder to write (a .json file with `--format index`)"
    )
    export.add_argument(
        "--format",
        choices=("merged", "adapter", "index"),
        default="merged",
        help="Hugging Face model, PEFT adapter, or item codes as index.json (LETTER, MiniOneRec)",
    )
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of merged weights")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export in PATH")
    look = verb("inspect", "Show what is trained on: packed rows, decoded, and counts.", config=True, folder=False)
    look.add_argument("--rows", type=int, default=1, metavar="N", help="rows to show (default 1)")
    look.add_argument("--step", type=int, default=1, metavar="S", help="of this optimizer step (default 1)")
    ahead = verb("compile", "Compile training and search for a TPU slice that need not be there.", config=True, folder=False)
    ahead.add_argument("--topology", metavar="SLICE", help="kind and shape, such as v5e:4x4 or v5p:4x4x4")
    ahead.add_argument("--items", type=int, metavar="N", help="items of the catalogue (default: those of the config's data)")
    ahead.add_argument("--targets-per-row", type=int, metavar="K", help="default: row_length of a stream, an eighth of prompts")
    ahead.add_argument("--only", choices=("train", "search"), help="compile one of the two programs")
    ahead.add_argument("--json", action="store_true", help="print one line of JSON")
    ahead.add_argument("--hlo", type=Path, metavar="DIR", help="write the compiled programs there, as text")
    again = verb("reproduce", "Run a published result again, or publish one.", folder=False)
    again.add_argument("name", metavar="NAME", help="of docs/results/NAME.json; with --publish of configs/NAME.yaml")
    again.add_argument("--seeds", type=int, nargs="+", metavar="S", help="default: the published ones; with --publish 0")
    again.add_argument("--out", type=Path, metavar="DIR", help="runs go to DIR/NAME/seed-S (default: runs/reproduce)")
    again.add_argument("--publish", action="store_true", help="write docs/results/NAME.json and NAME.top10.parquet")
    again.add_argument("--from-runs", type=Path, nargs="+", metavar="RUN", help="publish these finished runs, each one seed")
    again.add_argument("--title", metavar="TEXT", help="with --publish: what the result is, for tables (default: as published)")
    again.add_argument("--overwrite", action="store_true", help="with --publish: replace a result of that name")
    check = verb("verify-results", "Compute published metrics again from the lists beside them.", folder=False)
    check.add_argument("files", metavar="FILE", nargs="*", help="docs/results/NAME.json, or NAME")
    check.add_argument("--readme", type=Path, metavar="FILE", help="compare the tables between <!-- results NAME --> marks, too")
    check.add_argument("--write", action="store_true", help="with --readme: write the tables anew")
    return parser
