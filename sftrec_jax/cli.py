"""The command line: `sftrec VERB ...`. Verbs only; the work is in the rooms."""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftrec_jax import stopping
from sftrec_jax.cli_parser import EXAMPLES, make_parser
from sftrec_jax.console import lasting
from sftrec_jax.distributed import agree, join, on_main, process_count, wanted
from sftrec_jax.errors import LeakError, UserError, printable

if TYPE_CHECKING:
    from sftrec_jax.run.session import Session


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

    accept = getattr(args, "accept_changes", False)
    return config, new_run(args.out or _default_out(args.config), config, resume, args.overwrite, accept)


def _command(argv: Sequence[str]) -> str:
    import shlex

    return "sftrec " + shlex.join(argv)


def _run(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> None:
    from sftrec_jax.console import console
    from sftrec_jax.run import session as sessions
    from sftrec_jax.run import stages
    from sftrec_jax.run.evaluation import evaluate_stage
    from sftrec_jax.run.lock import locked

    begin = time.monotonic()
    if process_count() > 1:
        session = _prepared_by_one(args, extra)
        stages.train_stage(session, args.resume, args.accept_changes)
    else:
        config, new_run = _new_run(args, extra)
        with new_run as folder:
            prepared = args.resume and folder.whole.exists()
            session = sessions.open_session(folder.path) if prepared else sessions.prepare(folder, config)
            stages.train_stage(session, args.resume, args.accept_changes)
    stopping.pause()
    decoder, step = session.trained_decoder()
    with locked(session.folder.path, "evaluation"):
        evaluate_stage(session, decoder, step)
    stages.export_stage(session, decoder, _command(argv), args.resume or args.overwrite)
    path = session.folder.path
    console.print(f"done in {(time.monotonic() - begin) / 60:.1f} min: {path}")
    console.print(f"next: sftrec recommend {path} --user {session.dataset.user_ids[0]}")


def _prepared_by_one(args: argparse.Namespace, extra: Sequence[str]) -> "Session":
    """A run that the first process prepares and all open, in a folder that all see. The configs must be the same."""
    from sftrec_jax.config_file import to_dict
    from sftrec_jax.run import session as sessions

    config, new_run = _new_run(args, extra)
    out = args.out or _default_out(args.config)
    agree("configuration", json.dumps({"out": str(out.absolute()), **to_dict(config)}))

    def prepare() -> None:
        with new_run as folder:
            if not (args.resume and folder.whole.exists()):
                sessions.prepare(folder, config)

    on_main("prepare", prepare)
    return sessions.open_session(out)


def _prepare(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> None:
    from sftrec_jax.run import session as sessions

    config, new_run = _new_run(args, extra)
    with new_run as folder:
        sessions.prepare(folder, config)


def _train(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> None:
    from sftrec_jax.run import stages
    from sftrec_jax.run.folder import holds_steps
    from sftrec_jax.run.lock import locked
    from sftrec_jax.run.session import open_session

    session = open_session(args.run)
    if not args.resume and holds_steps(session.folder, session.config.train):
        raise UserError(f"{args.run}: is trained already; add --resume to go on, or prepare another folder")
    with locked(session.folder.path):
        stages.train_stage(session, args.resume, args.accept_changes)


def _evaluate(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> None:
    if args.lists:
        _evaluate_lists(args, extra)
        return
    for option in ("to", "overwrite"):
        if getattr(args, option):
            raise UserError(f"--{option} needs --lists; see sftrec evaluate --help")
    from sftrec_jax.run.evaluation import evaluate_stage
    from sftrec_jax.run.lock import locked

    session = _session(args.run, extra)
    with locked(session.folder.path, "evaluation"):
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


def _inspect(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> None:
    from sftrec_jax.overrides import configure, show_config

    if args.help_config:
        show_config()
    if args.config is not None and args.config.is_dir():
        if extra:
            raise UserError(f"unknown option {extra[0]}; a run is shown as it was prepared, or name its config")
        where = args.config
    else:
        where = configure(args.config, extra)
    from sftrec_jax.run.inspect import inspect_stage

    inspect_stage(where, args.rows, args.step)


def _compile(args: argparse.Namespace, extra: Sequence[str], argv: Sequence[str]) -> int:
    from sftrec_jax.overrides import configure, show_config

    if args.help_config:
        show_config()
    from sftrec_jax.compile.topology import pretend

    if args.topology is None:
        raise UserError("name a slice with --topology, such as v5e:4x4; see sftrec compile --help")
    pretend(args.topology)  # before jax is imported
    config = configure(args.config, extra)
    from sftrec_jax.compile.stage import compile_stage

    fits = compile_stage(
        config, args.config.parent, args.topology, args.items, args.targets_per_row, args.only, args.json, args.hlo
    )
    return 0 if fits else 1


def _join(verb: str) -> None:
    """Connects the processes of a run where there are several."""
    if not wanted():
        return
    if verb not in ("run", "train", "evaluate", "export"):
        raise UserError(f"sftrec {verb} runs in one process; unset SFTREC_DISTRIBUTED and SFTREC_COORDINATOR")
    join()
    stopping.install_again()


def _check_extra(verb: str, extra: Sequence[str]) -> None:
    """UserError for options that neither the verb nor the part of the config that it may change has."""
    if verb in ("run", "prepare", "baselines", "inspect", "compile"):
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
    from sftrec_jax.run.recommend import Ranker, allowed_items, check_k, typed_histories
    from sftrec_jax.run.recommend_file import SHARD, Asked, check_out, recommend_to, recommended
    from sftrec_jax.run.tables import check_frame_path

    _check_together(args)
    if args.preferences:
        _preferences(args, extra)
        return
    if any(word.startswith(("--decode.top-k", "--decode.top_k")) for word in extra):
        raise UserError("--decode.top-k: the length of these lists is --k; give that instead")
    if args.to:
        check_frame_path(args.to)
        check_out(args.to, args.overwrite)
    if not (args.user or args.history or args.file):
        raise UserError(f"nobody to recommend to; give --user, --history or --file, as in: {EXAMPLES['recommend']}")
    k = 10 if args.k is None else args.k
    session = _session(args.run, extra, max(1, k))
    check_k(session, k)
    typed = typed_histories(session, args.user, args.history, args.profile)
    asked = Asked(session, typed, args.file, args.shard or SHARD)
    ranker = Ranker(session, k, args.keep_seen, allowed_items(session, args.only, args.without))
    if args.to:
        recommend_to(ranker, asked, args.to, args.overwrite)
        return
    for frame in recommended(ranker, asked):
        for row in frame.to_dicts():
            if args.json:
                print(json.dumps(row, ensure_ascii=False))
                continue
            if row["rank"] == 1:
                print(row["user"])
            print(f"{row['rank']:4d}  {row['score']:8.3f}  {printable(row['title'])}")


def _check_together(args: argparse.Namespace) -> None:
    """UserError for an option of `recommend` that says nothing beside `--preferences`, or without it."""
    lists = ("user", "history", "profile", "file", "only", "without", "k", "keep_seen", "to", "json", "shard")
    pairs = ("users", "negatives", "seed")
    if args.to and args.json:
        raise UserError("--to and --json: choose one; --to writes .jsonl as well")
    if args.overwrite and not (args.to or args.preferences):
        raise UserError("--overwrite needs --to or --preferences; see sftrec recommend --help")
    if args.shard is not None and (args.shard < 1 or not args.file):
        raise UserError(
            f"--shard {args.shard}: " + ("use 1 or more" if args.file else "needs --file; see sftrec recommend --help")
        )
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


VERBS = {
    "run": _run,
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "recommend": _recommend,
    "add-items": _add_items,
    "baselines": _baselines,
    "compile": _compile,
    "inspect": _inspect,
    "export": _export,
    "reproduce": _reproduce,
    "verify-results": _verify_results,
}


GOES_ON = {
    "run": "the same command with --resume goes on",
    "train": "the same command with --resume goes on",
    "reproduce": "the same command goes on",
    "evaluate": "the same command goes on",
    "recommend": "the same command goes on where --file is ranked to --to",
    "export": "the same command does it again",
}
"""Verbs that save what they have when they are asked to stop, or have nothing to lose, and how to go on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Exit codes: 0 done, 1 not as published, or does not fit, 2 wrong input (one line on standard error), 3 leaks found, 75 asked
    to stop: what was done is saved, `--resume` goes on; 130 interrupted, 128 plus a signal's number after a second signal.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Orbax and the tokenizers library speak up about threads and forks that do not concern a user.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        args, extra = make_parser().parse_known_args(argv)
        _check_extra(args.verb, extra)
        if args.verb in GOES_ON:
            stopping.install()
        _join(args.verb)
        return VERBS[args.verb](args, extra, argv) or 0
    except UserError as error:
        print(f"error: {error}", file=lasting)
        return 3 if isinstance(error, LeakError) else 2
    except stopping.Stopped:
        print(f"stopped; {GOES_ON[argv[0]]}", file=lasting)
        return stopping.leave()
    except KeyboardInterrupt:
        print("interrupted", file=lasting)
        return 130


if __name__ == "__main__":
    sys.exit(main())
