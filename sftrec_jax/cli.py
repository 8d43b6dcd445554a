"""The command line: `sftrec VERB ...`. Verbs only; the work is in the rooms."""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sftrec_jax import __version__
from sftrec_jax.errors import LeakError, UserError

if TYPE_CHECKING:
    from sftrec_jax.run.session import Session

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
    "add-items": "sftrec add-items runs/beauty --catalogue new.jsonl",
    "recommend": 'sftrec recommend runs/quick --history "Toy Story (1995); Heat (1995)"',
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
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
    verb("prepare", "Read and split the data, name the items.", config=True)
    train = verb("train", "Train a prepared run.")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
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
        "--file", type=Path, metavar="FILE", help=".jsonl or .parquet with a column `history`, or .txt with a line a user"
    )
    recommend.add_argument("--k", type=int, help="items a user (default 10); a narrower beam is widened to it")
    recommend.add_argument("--only", type=Path, metavar="FILE", help="recommend only these items: a line each, id or title")
    recommend.add_argument("--without", type=Path, metavar="FILE", help="never recommend these items: a line each, id or title")
    recommend.add_argument("--keep-seen", action="store_true", help="items of the history may be recommended again")
    recommend.add_argument("--to", type=Path, metavar="FILE", help="write .parquet or .jsonl instead of printing")
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


def _default_out(config: Path) -> Path:
    return Path("runs") / config.stem


def _new_run(args: argparse.Namespace, extra: Sequence[str]) -> Any:
    from sftrec_jax.overrides import configure, show_config

    if args.help_config:
        show_config()
    resume = getattr(args, "resume", False)
    written = args.out / "config.yaml" if resume and args.out and not args.config else args.config
    config = configure(written, extra)
    from sftrec_jax.run.folder import new_run

    return config, new_run(args.out or _default_out(args.config), config, resume, args.overwrite)


def _command(argv: Sequence[str]) -> str:
    import shlex

    return "sftrec " + shlex.join(argv)


def _run(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> None:
    from sftrec_jax.console import console
    from sftrec_jax.run import session as sessions
    from sftrec_jax.run import stages
    from sftrec_jax.run.evaluation import evaluate_stage

    begin = time.monotonic()
    config, new_run = _new_run(args, extra)
    with new_run as folder:
        prepared = args.resume and (folder.prepared / "item_codes.json").exists()
        session = sessions.open_session(folder.path) if prepared else sessions.prepare(folder, config)
        stages.train_stage(session, args.resume)
    decoder, step = session.trained_decoder()
    evaluate_stage(session, decoder, step)
    stages.export_stage(session, decoder, _command(argv), args.resume or args.overwrite)
    console.print(f"done in {(time.monotonic() - begin) / 60:.1f} min: {folder.path}")
    console.print(f"next: sftrec recommend {folder.path} --user {session.dataset.user_ids[0]}")


def _prepare(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> None:
    from sftrec_jax.run import session as sessions

    config, new_run = _new_run(args, extra)
    with new_run as folder:
        sessions.prepare(folder, config)


def _train(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> None:
    from sftrec_jax.run import stages
    from sftrec_jax.run.session import open_session

    session = open_session(args.run)
    if not args.resume and session.folder.trained:
        raise UserError(f"{args.run}: is trained already; add --resume to go on, or prepare another folder")
    stages.train_stage(session, args.resume)


def _evaluate(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> None:
    if args.lists:
        _evaluate_lists(args, extra)
        return
    for option in ("to", "overwrite"):
        if getattr(args, option):
            raise UserError(f"--{option} needs --lists; see sftrec evaluate --help")
    from sftrec_jax.run.evaluation import evaluate_stage

    session = _session(args.run, extra)
    evaluate_stage(session, *session.trained_decoder(), exact=args.exact)


def _evaluate_lists(args: argparse.Namespace, extra: Sequence[str]) -> None:
    if args.exact:
        raise UserError("--exact says nothing beside --lists, which has no model; see sftrec evaluate --help")
    if args.overwrite and not args.to:
        raise UserError("--overwrite needs --to; see sftrec evaluate --help")
    for word in extra:
        if word.startswith(("--decode.", "--evaluate.unconstrained", "--evaluate.grounding")):
            raise UserError(f"{word.split('=')[0]} says nothing beside --lists, which has no model; leave it out")
    from sftrec_jax.config_file import load_config
    from sftrec_jax.overrides import overridden
    from sftrec_jax.run.folder import open_folder
    from sftrec_jax.run.outside import lists_stage

    folder = open_folder(args.run)
    config = load_config(folder.config)
    lists_stage(folder, overridden(config, extra) if extra else config, args.lists, args.to, args.overwrite)


def _baselines(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> None:
    from sftrec_jax.overrides import configure, show_config

    if args.help_config:
        show_config()
    config = configure(args.config, extra)
    from sftrec_jax.run.baselines import baselines_stage

    baselines_stage(config, args.tie_seeds, args.to, args.overwrite)


def _check_extra(verb: str, extra: Sequence[str]) -> None:
    """UserError for options that neither the verb nor the part of the config that it may change has."""
    if verb in ("run", "prepare", "baselines"):
        return  # with the config, which knows all fields
    sections = ("--decode.", "--evaluate.") if verb in ("evaluate", "recommend") else ()
    for at, word in enumerate(extra):
        if word.startswith("--") and "." in word and sections and not word.startswith(sections):
            raise UserError(f"{word.split('=')[0]} would change a finished run; only options of decode and evaluate can be given")
        if not word.startswith(sections) and (word.startswith("--") or at == 0 or not sections):
            raise UserError(f"unknown option {word}; see sftrec {verb} --help")


def _session(run: Path, extra: Sequence[str], k: int | None = None) -> "Session":
    """A run, decoded and evaluated as the options say; with `k`, decoded for so many items a user."""
    from sftrec_jax.overrides import overridden
    from sftrec_jax.run.session import open_session

    session = open_session(run)
    config = session.config
    if k is not None:  # in place of decode.top_k, which must not stand in the way of a narrower beam
        config = dataclasses.replace(config, decode=dataclasses.replace(config.decode, top_k=1))
    if extra:
        config = overridden(config, extra)
    if k is not None:
        config = dataclasses.replace(config, decode=dataclasses.replace(config.decode, top_k=k, beam=max(k, config.decode.beam)))
    return dataclasses.replace(session, config=config)


def _export(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> None:
    from sftrec_jax.run import stages
    from sftrec_jax.run.session import open_session

    session = open_session(args.run)
    if args.format == "index":
        stages.export_index(session, args.to, args.overwrite)
        return
    stages.export_to(session, session.trained_decoder()[0], _command(argv), args.to, args.format, args.dtype, args.overwrite)


def _add_items(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> None:
    from sftrec_jax.run.extend import add_items
    from sftrec_jax.run.session import open_session

    add_items(open_session(args.run), args.catalogue, args.vectors)


def _recommend(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> None:
    from sftrec_jax.console import console
    from sftrec_jax.items.titles import TitleIndex
    from sftrec_jax.run.recommend import allowed_items, file_histories, recommend, user_history
    from sftrec_jax.run.tables import check_frame_path, write_frame

    _check_together(args)
    if args.preferences:
        _preferences(args, extra)
        return
    if any(word.startswith(("--decode.top-k", "--decode.top_k")) for word in extra):
        raise UserError("--decode.top-k: the length of these lists is --k; give that instead")
    if args.to:
        check_frame_path(args.to)
        if args.to.exists() and not args.overwrite:
            raise UserError(f"--to {args.to}: exists already; name another file or add --overwrite")
    if not (args.user or args.history or args.file):
        raise UserError(f"nobody to recommend to; give --user, --history or --file, as in: {EXAMPLES['recommend']}")
    k = 10 if args.k is None else args.k
    session = _session(args.run, extra, max(1, k))
    names, histories = [], []
    for user in args.user:
        names.append(user)
        histories.append(user_history(session, user))
    if args.history:
        index = TitleIndex(session.codes.titles, session.dataset.item_ids)
        for number, text in enumerate(args.history, start=1):
            names.append(f"history {number}")
            histories.append(_as_items(index.split(text)))
    if args.file:
        more_names, more = file_histories(session, args.file)
        names += more_names
        histories += more
    allowed = allowed_items(session, args.only, args.without)
    frame = recommend(session, names, histories, k, args.keep_seen, allowed)
    if args.to:
        write_frame(args.to, frame)
        console.print(f"wrote {frame.height:,} rows to {args.to}")
    elif args.json:
        for row in frame.to_dicts():
            print(json.dumps(row, ensure_ascii=False))
    else:
        for row in frame.to_dicts():
            if row["rank"] == 1:
                print(row["user"])
            print(f"{row['rank']:4d}  {row['score']:8.3f}  {row['title']}")


def _check_together(args: argparse.Namespace) -> None:
    """UserError for an option of `recommend` that says nothing beside `--preferences`, or without it."""
    lists = ("user", "history", "file", "only", "without", "k", "keep_seen", "to", "json")
    pairs = ("users", "negatives", "seed")
    if args.to and args.json:
        raise UserError("--to and --json: choose one; --to writes .jsonl as well")
    if args.overwrite and not (args.to or args.preferences):
        raise UserError("--overwrite needs --to or --preferences; see sftrec recommend --help")
    for name in lists if args.preferences else pairs:
        value = getattr(args, name)
        if value is not None and value is not False and value != []:
            relation = "says nothing beside" if args.preferences else "needs"
            raise UserError(f"--{name.replace('_', '-')} {relation} --preferences; see sftrec recommend --help")


def _preferences(args: argparse.Namespace, extra: Sequence[str]) -> None:
    from sftrec_jax.run.preferences import check_preferences, write_preferences

    settings = (args.users, 1 if args.negatives is None else args.negatives, args.seed or 0, args.overwrite)
    check_preferences(args.preferences, *settings)
    write_preferences(_session(args.run, extra), args.preferences, *settings)


def _reproduce(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> int | None:
    from sftrec_jax.results.reproduce import OUT, publish_stage, reproduce_stage

    if args.publish:
        return publish_stage(args.name, args.seeds, args.out or OUT, args.from_runs or [], args.title, args.overwrite)
    for option in ("from_runs", "title", "overwrite"):
        if getattr(args, option):
            raise UserError(f"--{option.replace('_', '-')} needs --publish; see sftrec reproduce --help")
    return reproduce_stage(args.name, args.seeds, args.out or OUT)


def _verify_results(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> int:
    from sftrec_jax.results.verify import verify_stage

    return verify_stage(args.files, args.readme, args.write)


def _as_items(items: list[int]) -> Any:
    import numpy as np

    return np.asarray(items, np.int32)


VERBS = {
    "run": _run,
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "recommend": _recommend,
    "add-items": _add_items,
    "baselines": _baselines,
    "export": _export,
    "reproduce": _reproduce,
    "verify-results": _verify_results,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Exit codes: 0 done, 1 a result is not as published, 2 wrong input (one line on standard error), 3 leaks found,
    130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Orbax and the tokenizers library speak up about threads and forks that do not concern a user.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        args, extra = _parser().parse_known_args(argv)
        _check_extra(args.verb, extra)
        return VERBS[args.verb](args, extra, argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, LeakError) else 2
    except KeyboardInterrupt:
        how = "the same command" if argv[:1] == ["reproduce"] else "`--resume`"
        print(f"interrupted; {how} goes on from the newest checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
