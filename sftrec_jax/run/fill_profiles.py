"""A language model fills in what profiles lack from what users did (LGIR, Du et al. 2024, arXiv:2307.10747)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sftrec_jax.config import DecodeConfig, LoraConfig, ModelConfig, PromptConfig, RunConfig, TrainConfig
from sftrec_jax.console import console, progress
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.task_words import TaskWords
from sftrec_jax.data.user_tasks import FILLER, Asked, UserTasks
from sftrec_jax.decode.recommender import Recommender
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.items.naming import terminator, text_array
from sftrec_jax.items.titles import distinct_titles
from sftrec_jax.model.hub import load_tokenizer, resolve_base
from sftrec_jax.model.load import load_decoder, make_build, source_architecture
from sftrec_jax.model.mesh import make_mesh
from sftrec_jax.run.folder import RunFolder

EXAMPLES = 3
"""Users with the field that a base is shown first, with what they took."""
BATCH = 16


def fill_profiles(config: RunConfig, dataset: Dataset) -> Dataset:
    """The data set with the field `profile.complete` of every user that lacks it and has training items, as the filler writes it.

    Nothing of validation or test is shown to it. `report` says how many it filled in and how many stayed empty.

    Raises: UserError for a field that there is not, and for a run over other items.
    """
    field, filler = config.profile.complete, config.profile.filler
    assert field is not None and filler is not None
    if field not in dataset.profiles:
        known = ", ".join(dataset.profiles) or "none"
        raise UserError(f"profile.complete is {field}; name the field to fill in ({known})")
    texts = dataset.profiles[field]
    lacking = np.flatnonzero((texts == "") & (dataset.train_end > 0)).tolist()
    # With the time of a test target unknown to it, the filler is asked at the end of the training part.
    asked = [Asked(user, int(dataset.train_end[user]), "") for user in lacking]
    console.print(f"profiles: {filler} fills in {field} of {len(asked):,} of {len(texts):,} users")
    shown = dataclasses.replace(config.prompt, max_history=config.profile.filler_items, stride=1)
    write = _of_run if (Path(filler) / "prepared").exists() else _of_base
    written = write(dataclasses.replace(config, prompt=shown), dataset, asked) if asked else []
    filled = texts.copy()
    for one, text in zip(asked, written, strict=True):
        parts = (part.strip(" .;\"'") for part in " ".join(text.rstrip("\ufffd").split()).split(","))
        filled[one.user] = ", ".join(dict.fromkeys(part for part in parts if part))
    empty = int((filled[lacking] == "").sum()) if lacking else 0
    report = dataset.report | {f"users_with_{field}_filled_in": len(asked) - empty, f"users_with_{field}_left_empty": empty}
    return dataclasses.replace(dataset, profiles=dataset.profiles | {field: filled}, report=report)


def _of_base(config: RunConfig, dataset: Dataset, asked: Sequence[Asked]) -> list[str]:
    """By a base as it is, shown how some other users are described. It goes on with a text, so no chat is made of it."""
    profile = config.profile
    assert profile.filler is not None and profile.complete is not None
    source = resolve_base(profile.filler)
    tokenizer = load_tokenizer(source, None)
    mesh = make_mesh(config.mesh)
    titles = distinct_titles(dataset.titles, dataset.item_ids)
    nothing = np.zeros(0, np.int32)
    # Items have titles here and no tokens: a template for the filler names them in words.
    codes = ItemCodes(np.full((len(titles), 1), terminator(tokenizer), np.int32), (), nothing, (), text_array(titles))
    asks = dataclasses.replace(config, prompt=PromptConfig("instruct", config.prompt.max_history))
    arch = source_architecture(source)
    model = ModelConfig(compute_dtype=config.model.compute_dtype)
    train = TrainConfig(method="lora")
    build = make_build(model, LoraConfig(), train, arch, codes, mesh)
    decoder = load_decoder(build, source, codes, mesh, 0, False)
    tasks = UserTasks(TaskWords(asks, dataset, codes, tokenizer, arch.context))
    told = [user for user, text in enumerate(dataset.profiles[profile.complete].tolist()) if text and dataset.train_end[user]]
    examples = [
        {"history": tasks.entries(user, int(dataset.train_end[user]))}
        | tasks.profile(FILLER, user)
        | {"answer": dataset.profiles[profile.complete][user]}
        for user in told[:EXAMPLES]
    ]
    prompts = _prompts(tasks, FILLER, asked, profile.filler_tokens, {"examples": examples})
    one = dataclasses.replace(codes, codes=codes.codes[:1], titles=codes.titles[:1])
    decode = Recommender(decoder, one, DecodeConfig(beam=1, top_k=1, batch_users=BATCH), mesh, _shared(prompts))
    return _write(tasks, decode, prompts, profile.filler_tokens)


def _shared(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """int32 tokens with which all prompts begin, each going on after them."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    same = np.all([prompt[:shortest] == prompts[0][:shortest] for prompt in prompts], axis=0)
    return prompts[0][: shortest if same.all() else int(same.argmin())]


def _of_run(config: RunConfig, dataset: Dataset, asked: Sequence[Asked]) -> list[str]:
    """By a run that was trained for `profile_completion`."""
    from sftrec_jax.run.session import open_session, recommender  # which imports this file

    profile = config.profile
    assert profile.filler is not None
    session = open_session(RunFolder(Path(profile.filler)).path)
    if session.dataset.item_ids.tolist() != dataset.item_ids.tolist():
        raise UserError(f"profile.filler: {profile.filler} was trained over other items; train it with the same catalogue")
    if not session.config.tasks.profile_completion:
        raise UserError(f"profile.filler: {profile.filler} was not trained for it; set tasks.profile_completion there")
    decoder, _ = session.trained_decoder()
    context = min(session.build.arch.context, session.config.train.row_length)
    prompt = dataclasses.replace(session.config.prompt, max_history=config.prompt.max_history, stride=1)
    asks = dataclasses.replace(session.config, prompt=prompt)
    tasks = UserTasks(TaskWords(asks, dataset, session.codes, session.tokenizer, context))
    prompts = _prompts(tasks, "profile_completion", asked, profile.filler_tokens, {})
    return _write(tasks, recommender(session, decoder), prompts, profile.filler_tokens)


def _prompts(tasks: UserTasks, task: str, asked: Sequence[Asked], most: int, more: dict[str, Any]) -> list[np.ndarray]:
    template, rng = tasks.templates(task)[0], np.random.default_rng(0)
    return [tasks.prompt(task, template, one, most, rng, more)[0] for one in asked]


def _write(tasks: UserTasks, decode: Recommender, prompts: list[np.ndarray], most: int) -> list[str]:
    tokens = decode.write(prompts, most, tasks.words.end, progress("filling in profiles", len(prompts)))
    return [tasks.words.read(row) for row in tokens]
