"""Evaluation of a run: metrics over the full catalogue, baselines, what the model would write unconstrained, the exact audit."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from sftrec_jax.console import console, progress
from sftrec_jax.decode.audit import exact_ranking, missed
from sftrec_jax.decode.grounding import Grounder
from sftrec_jax.decode.groups import CodeGroups
from sftrec_jax.decode.recommender import Ranking, Recommender
from sftrec_jax.evaluate.breakdown import code_metrics, exposure, recall_by_history, recall_by_target
from sftrec_jax.evaluate.checks import check_evaluable
from sftrec_jax.evaluate.comparison import COUNTER, compare, fit_baselines
from sftrec_jax.evaluate.metrics import DEFAULT_KS, user_metrics
from sftrec_jax.evaluate.uncertainty import draw
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.run.asked import Asked, Ranked, in_shards, kept_parts
from sftrec_jax.run.card import protocol_card
from sftrec_jax.run.folder import write_json
from sftrec_jax.run.lint import check_leaks
from sftrec_jax.run.parts import Parts
from sftrec_jax.run.session import Session, recommender
from sftrec_jax.run.tables import metrics_table, write_recommendations
from sftrec_jax.run.task_evaluation import evaluate_tasks, evaluate_templates

RECOMMENDED = 10
"""Items a user in recommendations.parquet."""
BIGREC_BEAMS = 4
"""As in the paper; the best is grounded."""


def list_values(
    items: np.ndarray,
    targets: np.ndarray,
    groups: CodeGroups | None = None,
    exclude: Sequence[np.ndarray] | None = None,
    n_items: int | None = None,
) -> dict[str, np.ndarray]:
    """float64 [U] each: metrics of every user's list; with `groups` items that share a code are tied.

    `exclude`: what was left out of each list.

    With `n_items`, the size of the catalogue, cut-offs beyond lists that do not hold all of it are left out.
    """
    ties = groups.ties(items, targets, exclude) if groups is not None and groups.shared else None
    padded = np.full((len(items), max(DEFAULT_KS)), -1, np.int32)
    width = min(items.shape[1], padded.shape[1])
    padded[:, :width] = items[:, :width]
    found = user_metrics(padded, targets, ties=ties)
    if n_items is None or items.shape[1] >= min(n_items, max(DEFAULT_KS)):
        return found
    return {name: v for name, v in found.items() if "@" in name and int(name.split("@")[1]) <= items.shape[1]}


def list_metrics(
    items: np.ndarray,
    targets: np.ndarray,
    groups: CodeGroups | None = None,
    exclude: Sequence[np.ndarray] | None = None,
    n_items: int | None = None,
) -> dict[str, float]:
    """Means of `list_values` over users."""
    return _means(list_values(items, targets, groups, exclude, n_items))


def _means(values: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(v.mean()) for name, v in values.items()}


def _shown(metrics: dict[str, float]) -> str:
    """Recall and NDCG at 10, or at the largest cut-off below that the lists have."""
    k = max(k for k in DEFAULT_KS if k <= 10 and f"recall@{k}" in metrics)
    return f"R@{k} {metrics[f'recall@{k}']:.4f} N@{k} {metrics[f'ndcg@{k}']:.4f}"


def evaluate_stage(session: Session, decoder: Decoder, step: int, exact: bool = False) -> dict[str, Any]:
    """Ranks the full catalogue for every test user; leaves `metrics.json` and `recommendations.parquet`.

    `exact`: also count what the beam missed, see `decode/audit.py`.
    """
    begin = time.monotonic()
    dataset, config = session.dataset, session.config
    check_evaluable(session.folder.path, config, dataset)
    leaks = check_leaks(session)
    k = config.decode.top_k
    with_target = draw(np.flatnonzero(dataset.test_position >= 0), config.evaluate.users, session.config.train.seed)
    # Rows of train and validation are nobody who waits for a recommendation.
    everyone = config.evaluate.users is None and not dataset.given
    others = np.flatnonzero(dataset.test_position < 0) if everyone else with_target[:0]
    users = np.concatenate([with_target, others])
    asked = Asked(session, users, dataset.test_position)
    decode = recommender(session, decoder)
    parts = kept_parts(asked, step)
    masked, unmasked = _rank_all(decode, asked, k, parts)
    tested = len(with_target)
    targets, histories = asked.targets[:tested], asked.histories[:tested]
    groups, n_items = decode.groups, len(dataset.item_ids)
    mask = config.evaluate.mask_seen
    shown, other = (masked, unmasked) if mask else (unmasked, masked)
    rows: dict[str, tuple[np.ndarray, np.ndarray, CodeGroups | None]] = {
        "model": (shown.items[:tested], other.items[:tested], groups)
    }
    for name, baseline in fit_baselines(dataset, config.evaluate.counter_decay).items():
        rows[name] = (baseline.rank(histories, k, mask), baseline.rank(histories, k, not mask), None)
    result: dict[str, Any] = {name: {} for name in rows}
    if tested:
        left_out = (histories, None) if mask else (None, histories)
        values = {name: list_values(lists, targets, tied, left_out[0], n_items) for name, (lists, _, tied) in rows.items()}
        for name, (_, lists, tied) in rows.items():
            means = _means(list_values(lists, targets, tied, left_out[1], n_items))
            result[name] = _means(values[name]) | {f"{key}_{'unmasked' if mask else 'masked'}": v for key, v in means.items()}
        result |= compare(values, config.train.seed)
        lists = {name: judged for name, (judged, _, _) in rows.items()}
        result |= _breakdown(session, lists, values, targets, histories)
    result |= {"users": tested, "checkpoint_step": step, "items": len(dataset.item_ids)}
    result |= {"beam": config.decode.beam, "normaliser": config.decode.normaliser}
    result["mask_seen"] = mask
    result["protocol"] = protocol_card(session, step, tested) | {"leaks": leaks}
    if groups.shared:
        result["items_sharing_a_code"] = groups.shared
    remarks = _certainty(result) if tested else []
    remarks += _unconstrained(session, decode, asked, result)
    if tested and config.evaluate.grounding_users:
        remarks += _grounded(session, decoder, decode, asked, shown, tested, result)
    if tested:
        result["tasks"], lines = evaluate_tasks(session, decode)
        result["templates"], more = evaluate_templates(session, decode, asked, tested, k, parts)
        remarks += lines + more
    if tested and exact:
        remarks += _exact(decode, asked, shown, tested, k, mask, parts, result)
    result["seconds_evaluating"] = round(time.monotonic() - begin, 1)
    if session.folder.metrics.exists():
        remarks.append(f"replaced the earlier results in {session.folder.metrics.name} and {session.folder.recommendations.name}")
    write_json(session.folder.metrics, result)
    top = min(RECOMMENDED, k)
    lists = Ranking(shown.items[:, :top], shown.scores[:, :top])
    write_recommendations(session.folder.recommendations, dataset, session.codes.titles, users, lists, config.decode.normaliser)
    if parts is not None:
        parts.drop()
    console.print(metrics_table(result))
    if groups.shared:
        console.print(f"{groups.shared:,} items share a code with others; the ranks of these are expected ones")
    for remark in remarks:
        console.print(remark)
    return result


def _rank_all(decode: Recommender, asked: Asked, k: int, parts: Parts | None) -> tuple[Ranking, Ranking]:
    """Of all users (without seen items, with them)."""
    report = progress("evaluating", len(asked.users))

    def rank(prompts: list[np.ndarray], histories: list[np.ndarray]) -> Ranked:
        masked, unmasked = decode.rank_both(prompts, histories, k, report)
        return {"items": masked.items, "scores": masked.scores, "all_items": unmasked.items, "all_scores": unmasked.scores}

    found = in_shards(asked, len(asked.users), rank, report, parts, "model")
    return Ranking(found["items"], found["scores"]), Ranking(found["all_items"], found["all_scores"])


def _breakdown(
    session: Session,
    lists: dict[str, np.ndarray],
    values: dict[str, dict[str, np.ndarray]],
    targets: np.ndarray,
    histories: Sequence[np.ndarray],
) -> dict[str, Any]:
    """`by_target`, `by_history` (model and counter), `exposure` (all rows), `codes` (the model)."""
    dataset, top = session.dataset, min(RECOMMENDED, lists["model"].shape[1])
    counts = np.bincount(dataset.items[dataset.trains], minlength=len(dataset.item_ids))
    lengths = np.asarray([len(h) for h in histories])
    both = ("model", COUNTER)
    return {
        "by_target": {name: recall_by_target(values[name], targets, counts) for name in both},
        "by_history": {name: recall_by_history(values[name], lengths) for name in both},
        "exposure": {name: exposure(items, top, counts) for name, items in lists.items()},
        "codes": code_metrics(lists["model"], targets, session.codes.codes, top),
    }


def _certainty(result: dict[str, Any]) -> list[str]:
    """The model's metric with its interval, and how it stands against the counter."""
    name = next(name for name in ("ndcg@10", "ndcg@5", "ndcg@1") if name in result["model"])
    (low, high), other = result["ci"]["model"][name], result["paired"][COUNTER][name]
    shown = name.upper().replace("NDCG", "N")
    against = f"{other['difference']:+.4f} [{other['low']:+.4f}, {other['high']:+.4f}], p = {other['p']:.3g}"
    return [
        f"model {shown} {result['model'][name]:.4f}, 95 % interval over users [{low:.4f}, {high:.4f}]; "
        f"against item_item {against}"
        + ("; the model is BELOW item_item, which only counts: train longer or better" if result["below_counter"] else ""),
        f"model {shown} by target: " + _parts(result["by_target"]["model"], name),
        f"model {shown} by history: " + _parts(result["by_history"]["model"], name),
        "lists show: " + ", ".join(f"{name} {value:.3g}" for name, value in result["exposure"]["model"].items()),
    ]


def _parts(parts: dict[str, Any], name: str) -> str:
    return ", ".join(f"{part} {row[name]:.4f} ({row['users']:,} users)" for part, row in parts.items() if row["users"])


def _unconstrained(session: Session, decode: Recommender, asked: Asked, result: dict[str, Any]) -> list[str]:
    """How much of what the model writes with no catalogue to hold it is no item."""
    sample = draw(np.arange(len(asked.users)), session.config.evaluate.unconstrained_users, session.config.train.seed)
    result |= {"invalid_rate_unconstrained": None, "invalid_rate_unconstrained_users": len(sample)}
    if not len(sample):
        return []
    most = min(RECOMMENDED, session.config.decode.beam)
    rate = decode.invalid_rate(asked.prompts(sample), most, progress("unconstrained", len(sample)))
    result["invalid_rate_unconstrained"] = rate
    return [f"without the constraint {rate:.1%} of the top {most} ({len(sample)} users) would be no item; with it, none is"]


def _grounded(
    session: Session, decoder: Decoder, decode: Recommender, asked: Asked, shown: Ranking, tested: int, result: dict[str, Any]
) -> list[str]:
    """The items nearest to what the model writes freely (see `Grounder`), beside its own lists for the same users."""
    sample = draw(np.arange(tested), session.config.evaluate.grounding_users, session.config.train.seed)
    prompts = asked.prompts(sample)
    left_out = [asked.histories[i] for i in sample] if session.config.evaluate.mask_seen else None
    tokens, scores = decode.generate(prompts, min(BIGREC_BEAMS, session.config.decode.beam), progress("free text", len(sample)))
    grounder = Grounder(decoder, session.codes, session.mesh)
    lists = grounder.rank(tokens, scores, shown.items.shape[1], left_out)
    found = list_metrics(lists.items, asked.targets[sample], decode.groups, left_out, decode.tree.n_items)
    own = list_metrics(shown.items[sample], asked.targets[sample], decode.groups, left_out, decode.tree.n_items)
    result["bigrec"] = found | {"users": len(sample)} | {f"model_{name}": value for name, value in own.items()}
    free, held = _shown(found), _shown(own)
    return [f"free text and its nearest items (BIGRec), {len(sample)} users: {free}; constrained, the same users: {held}"]


def _exact(
    decode: Recommender,
    asked: Asked,
    shown: Ranking,
    tested: int,
    k: int,
    mask: bool,
    parts: Parts | None,
    result: dict[str, Any],
) -> list[str]:
    """How many of the exact top K the beam missed."""
    begin = time.monotonic()
    report = progress("exact", tested)

    def rank(prompts: list[np.ndarray], seen: list[np.ndarray]) -> Ranked:
        found = exact_ranking(decode, prompts, seen if mask else None, k, report)
        return {"items": found.ranking.items, "scores": found.ranking.scores, "widths": found.widths}

    found = in_shards(asked, tested, rank, report, parts, "exact")
    exact, histories = Ranking(found["items"], found["scores"]), asked.histories[:tested] if mask else None
    lost = missed(Ranking(shown.items[:tested], shown.scores[:tested]), exact)
    metrics = list_metrics(exact.items, asked.targets[:tested], decode.groups, histories, decode.tree.n_items)
    result["exact"] = metrics | {
        "k": k,
        "beam": decode.config.beam,
        "missed": int(lost.sum()),
        "missed_share": float(lost.sum() / max(1, (exact.items >= 0).sum())),
        "users_with_missed": int((lost > 0).sum()),
        "widest_beam": int(found["widths"].max()),
        "seconds": round(time.monotonic() - begin, 1),
    }
    one = result["exact"]
    return [
        f"exact: of the top {k} of the whole catalogue the beam of {one['beam']} missed {one['missed']:,} "
        f"({one['missed_share']:.2%}; {one['users_with_missed']:,} of {tested:,} users); exact {_shown(metrics)}; "
        f"{one['seconds']:.0f} s, at most {one['widest_beam']:,} beams"
    ]
