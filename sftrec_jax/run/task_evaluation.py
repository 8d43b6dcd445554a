"""How well a run answers its tasks beside the recommendation, and prompts that it never saw in training."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sftrec_jax.console import Progress, console, progress
from sftrec_jax.data.prompts import prompt_builder
from sftrec_jax.data.task_words import TaskWords
from sftrec_jax.data.tasks import wanted_tasks
from sftrec_jax.data.templates import PromptTemplate
from sftrec_jax.data.user_tasks import KINDS, Asked, UserTasks
from sftrec_jax.decode.recommender import Recommender
from sftrec_jax.evaluate.metrics import user_metrics
from sftrec_jax.evaluate.text_metrics import overlap, rating_errors
from sftrec_jax.run.asked import Asked as People
from sftrec_jax.run.asked import Ranked, in_shards
from sftrec_jax.run.parts import Parts
from sftrec_jax.run.session import Session


def evaluate_tasks(session: Session, decode: Recommender) -> tuple[dict[str, Any], list[str]]:
    """By task, and as `TASK (unseen template)` for templates that training had not: metrics, and a line on each.

    Asked about are test interactions (profiles: of users kept out of training) of at most `evaluate.task_users` users. Ratings
    stand beside the user's mean in training, `direct` beside chance.
    """
    names = [name for name in wanted_tasks(session.config.tasks) if name in KINDS]
    if not names:
        return {}, []
    context = min(session.build.arch.context, session.config.train.row_length)
    tasks = UserTasks(TaskWords(session.config, session.dataset, session.codes, session.tokenizer, context))
    found: dict[str, Any] = {}
    for name in names:
        asked = tasks.held_out(name, session.config.evaluate.task_users, session.config.train.seed)
        if not asked:
            console.print(f"task {name}: nothing is held out to evaluate it with")
            continue
        found[name] = _evaluate(session, tasks, decode, name, tasks.templates(name)[0], asked)
        for template in tasks.templates(name, unseen=True):
            found[f"{name} (unseen {template.path.stem})"] = _evaluate(session, tasks, decode, name, template, asked)
    return found, [f"task {name}: {_shown(values)}" for name, values in found.items()]


def _shown(values: dict[str, Any]) -> str:
    shown = {
        key: f"{value:.1%}" if key == "unreadable" else f"{value:.4g}" for key, value in values.items() if key != "questions"
    }
    numbers = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())
    return f"{values['questions']:,} questions: {numbers}"


def _evaluate(
    session: Session, tasks: UserTasks, decode: Recommender, name: str, template: PromptTemplate, asked: Sequence[Asked]
) -> dict[str, Any]:
    kind = KINDS[name]
    rng = np.random.default_rng([session.config.train.seed, *name.encode(), 2])
    in_words = kind.answer != "item"
    most = session.config.items.max_title_tokens + 1 if in_words else session.codes.codes.shape[1]
    made = [tasks.prompt(name, template, one, most, rng) for one in asked]
    prompts = [prompt for prompt, _ in made]
    values: dict[str, Any] = {"questions": len(asked)}
    if kind.candidates:
        return values | _among(decode, prompts, asked, np.asarray([listed for _, listed in made], np.int32))
    if not in_words:
        k = min(session.config.decode.top_k, len(session.dataset.item_ids))
        lists = decode.rank(prompts, None, k, progress(name, len(prompts))).items
        means = {metric: float(v.mean()) for metric, v in user_metrics(_padded(lists), _targets(asked)).items()}
        return values | {metric: means[metric] for metric in ("recall@10", "ndcg@10") if k >= 10}
    tokens = decode.write(prompts, most, tasks.words.end, progress(name, len(prompts)))
    written = [tasks.words.read(row) for row in tokens]
    wanted = [str(one.answer) for one in asked]
    if kind.answer != "rating":
        return values | overlap(written, wanted)
    return values | _ratings(session, asked, written, np.asarray([float(text) for text in wanted]))


def _ratings(session: Session, asked: Sequence[Asked], written: list[str], ratings: np.ndarray) -> dict[str, float]:
    data = session.dataset
    assert data.ratings is not None
    trained = data.ratings[data.trains & ~np.isnan(data.ratings)]
    means = []
    for one in asked:
        own = data.ratings[data.offsets[one.user] : data.offsets[one.user] + data.train_end[one.user]]
        own = own[~np.isnan(own)]
        means.append(float(own.mean()) if len(own) else float(trained.mean()))
    usual = np.asarray(means)
    low, high = float(trained.min()), float(trained.max())
    by_mean = rating_errors([f"{value}" for value in means], ratings, usual, low, high)
    errors = rating_errors(written, ratings, usual, low, high)
    return errors | {"rmse_of_user_mean": by_mean["rmse"], "mae_of_user_mean": by_mean["mae"]}


def _among(decode: Recommender, prompts: list[np.ndarray], asked: Sequence[Asked], listed: np.ndarray) -> dict[str, float]:
    """Hit rate and NDCG of the target among the candidates that a prompt lists."""
    scores = decode.log_probabilities(prompts, listed, progress("direct", len(prompts)))
    order = np.argsort(-scores, axis=1, kind="stable")
    found = user_metrics(_padded(np.take_along_axis(listed, order, axis=1)), _targets(asked))
    names = [name for name in ("recall@1", "recall@5", "ndcg@5", "ndcg@10") if int(name.split("@")[1]) < listed.shape[1]]
    return {name: float(found[name].mean()) for name in names} | {"recall@1_of_chance": 1 / listed.shape[1]}


def _targets(asked: Sequence[Asked]) -> np.ndarray:
    return np.asarray([one.answer for one in asked], np.int32)


def _padded(items: np.ndarray, width: int = 20) -> np.ndarray:
    out = np.full((len(items), max(width, items.shape[1])), -1, np.int32)
    out[:, : items.shape[1]] = items
    return out[:, :width]


def evaluate_templates(
    session: Session, decode: Recommender, asked: People, tested: int, k: int, parts: Parts | None
) -> tuple[dict[str, Any], list[str]]:
    """By `evaluate.templates`: metrics of the first `tested` users, asked with a template that training had not (P5's
    zero-shot); `parts` as for `in_shards`."""
    found: dict[str, Any] = {}
    prompt, data, mask = session.config.prompt, session.dataset, session.config.evaluate.mask_seen
    targets, histories = asked.targets[:tested], asked.histories[:tested]
    for template in session.config.evaluate.templates:
        context = min(session.build.arch.context, session.config.train.row_length)
        builder = prompt_builder(prompt, session.codes, session.tokenizer, context, data, template)
        report = progress("unseen template", tested)

        def rank(prompts: list[np.ndarray], seen: list[np.ndarray], report: Progress = report) -> Ranked:
            return {"items": decode.rank(prompts, seen if mask else None, k, report).items}

        lists = in_shards(asked, tested, rank, report, parts, f"template-{len(found)}", builder)["items"]
        ties = decode.groups.ties(lists, targets, histories if mask else None) if decode.groups.shared else None
        means = user_metrics(_padded(lists), targets, ties=ties)
        found[template.rsplit("/", 1)[-1]] = {name: float(v.mean()) for name, v in means.items()}
    lines = [f"unseen template {name}: R@10 {v['recall@10']:.4f} N@10 {v['ndcg@10']:.4f}" for name, v in found.items()]
    return found, lines
