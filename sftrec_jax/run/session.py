"""A run opened in memory: configuration, data, codes, tokenizer, model shape, mesh, prompts."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sftrec_jax.config import MeshConfig, RunConfig
from sftrec_jax.config_file import load_config
from sftrec_jax.console import console
from sftrec_jax.data.dataset import Dataset
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.data.prompts import PromptBuilder, prompt_builder
from sftrec_jax.data.tasks import check_tasks, wanted_tasks
from sftrec_jax.data.user_tasks import IN_WORDS, KINDS
from sftrec_jax.decode.recommender import Recommender
from sftrec_jax.errors import UserError
from sftrec_jax.evaluate.checks import check_evaluable
from sftrec_jax.evaluate.text_metrics import check_installed
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.hub import BaseSource, load_tokenizer, resolve_base
from sftrec_jax.model.load import Build, load_decoder, make_build, source_architecture, trainable_filter
from sftrec_jax.model.memory import choose_mesh
from sftrec_jax.model.mesh import check_mesh, make_mesh, named
from sftrec_jax.model.peft_read import adapter_folder
from sftrec_jax.model.sharding import named_arrays, with_arrays
from sftrec_jax.run.fill_profiles import fill_profiles
from sftrec_jax.run.folder import RunFolder, holds_steps, open_folder, write_text
from sftrec_jax.run.naming import name_items
from sftrec_jax.run.places import open_checkpoints
from sftrec_jax.run.summary import data_table, other_counts
from sftrec_jax.run.vectors import Vectoriser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, eq=False)
class Session:
    """Everything a stage needs. `tokenizer` holds the item tokens."""

    folder: RunFolder
    config: RunConfig
    dataset: Dataset
    codes: ItemCodes
    tokenizer: "PreTrainedTokenizerFast"
    source: BaseSource
    build: Build
    mesh: Mesh
    prompts: PromptBuilder
    """What recommending asks with,"""
    more_prompts: tuple[PromptBuilder, ...]
    """and what training asks with, too."""

    def base_decoder(self) -> Decoder:
        """The decoder before training: base weights, adapters at the identity, new rows at their first values."""
        model = self.config.model
        vectors = np.load(self.folder.item_vectors) if self.folder.item_vectors.exists() else None
        seed, start = self.config.train.seed, self.config.lora.start if self.build.adapters is not None else None
        return load_decoder(self.build, self.source, self.codes, self.mesh, seed, model.from_scratch, vectors, start)

    def computing_as(self, wrote: dict[str, str]) -> "Session":
        """The session with the numeric type and rematerialisation of a checkpoint, where the config leaves them to the machine.

        Measured again they might come out otherwise, and the last bits with them.
        """
        model, build = self.config.model, self.build
        if model.compute_dtype == "auto" and (name := wrote.get("model.compute_dtype")):
            dtype = np.dtype(jax.numpy.dtype(name.strip("'")))
            build = dataclasses.replace(
                build, dtype=dtype, param_dtype=build.param_dtype if self.config.train.method == "full" else dtype
            )
        if model.remat == "auto" and (name := wrote.get("model.remat")):
            build = dataclasses.replace(build, remat=name.strip("'"))
        return dataclasses.replace(self, build=build)

    def split(self, decoder: Decoder) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
        """(graphdef, trained variables, frozen variables)."""
        graphdef, trained, frozen = nnx.split(decoder, trainable_filter(self.config.train.method, self.build.whole), ...)
        return graphdef, trained, frozen

    def trained_decoder(self) -> tuple[Decoder, int]:
        """The best checkpoint's decoder and its step."""
        if not holds_steps(self.folder, self.config.train):
            raise UserError(f"{self.folder.path}: has no checkpoint; run `sftrec train {self.folder.path}` first")
        from sftrec_jax.run.fingerprint import check_readable  # which imports this file

        checkpoints = open_checkpoints(self.folder, self.config.train, writing=False)
        step = checkpoints.best()
        if step is None:
            raise UserError(f"{checkpoints.where}: holds no finished checkpoint; run `sftrec train {self.folder.path} --resume`")
        wrote = checkpoints.manifest_of(step).fingerprint
        check_readable(self, checkpoints.where, step, wrote)
        graphdef, trained, frozen = self.split(self.computing_as(wrote).base_decoder())
        arrays = checkpoints.restore_trained(step, named_arrays(trained))
        checkpoints.close()
        return nnx.merge(graphdef, with_arrays(trained, arrays), frozen), step


def _open(folder: RunFolder, config: RunConfig, dataset: Dataset, codes: ItemCodes | None) -> Session:
    model = config.model
    source = resolve_base(model.base, model.revision)
    arch = source_architecture(source)
    tokenizer = load_tokenizer(source, model.tokenizer)
    if len(tokenizer) > arch.vocab_size and codes is None:
        raise UserError(
            f"{source.label}: the tokenizer has {len(tokenizer)} tokens but the model only {arch.vocab_size} rows; "
            "set model.tokenizer to the model's own"
        )
    mesh = _mesh(config, arch, len(dataset.item_ids), codes is None)
    config = _with_own_templates(folder, _with_own_start(folder, config))
    if codes is None:
        # Of several processes the first prepares alone, on its own devices.
        own = mesh if jax.process_count() == 1 else make_mesh(MeshConfig(), jax.local_devices())
        codes = name_items(config, dataset, Vectoriser(config, source, tokenizer, own, folder.prepared))
        codes.save(folder.prepared)
    elif codes.new_tokens:
        from transformers import AddedToken

        new: list[str | AddedToken] = [AddedToken(name, normalized=False, special=False) for name in codes.new_tokens]
        tokenizer.add_tokens(new)
        if tokenizer.convert_tokens_to_ids(list(codes.new_tokens)) != codes.new_token_ids.tolist():
            raise UserError(f"{folder.prepared}: was prepared with another tokenizer than {source.label}; prepare again")
    context = min(arch.context, config.train.row_length)
    templates = config.prompt.templates or (None,)
    builders = [prompt_builder(config.prompt, codes, tokenizer, context, dataset, template) for template in templates]
    return Session(
        folder=folder,
        config=config,
        dataset=dataset,
        codes=codes,
        tokenizer=tokenizer,
        source=source,
        build=make_build(model, config.lora, config.train, arch, codes, mesh),
        mesh=mesh,
        prompts=builders[0],
        more_prompts=tuple(builders[1:]),
    )


def _mesh(config: RunConfig, arch: Architecture, items: int, new: bool) -> Mesh:
    chosen, why = config.mesh, ""
    if chosen.auto:
        chosen, why = choose_mesh(config, arch, items, jax.devices())
    mesh = make_mesh(chosen)
    # The batch only of a new run: recommending works on any number of devices.
    check_mesh(mesh, arch, config.train if new else None)
    if why:
        console.print(f"mesh: {named(mesh.shape)} ({why})")
    return mesh


def _with_own_start(folder: RunFolder, config: RunConfig) -> RunConfig:
    """The config with `lora.start` in the run's own folder, copied there at first, so that the run stands by itself."""
    if config.lora.start is None or config.train.method != "lora":
        return config
    own = folder.prepared / "start_adapter"
    if not own.exists():
        shutil.copytree(adapter_folder(config.lora.start), own)
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, start=str(own)))


def _with_own_templates(folder: RunFolder, config: RunConfig) -> RunConfig:
    """The config with templates in the run's own folder, copied there at first, so that a later change does not reach the run."""
    own = folder.prepared / "templates"
    prompt, tasks = config.prompt, config.tasks
    names = [f"{number}_{Path(template).name}" for number, template in enumerate(prompt.templates)]
    if not own.exists() and (names or tasks.templates is not None):
        temporary = own.with_name(f".{own.name}.{os.getpid()}")
        temporary.mkdir(parents=True)
        try:
            for name, template in zip(names, prompt.templates, strict=True):
                shutil.copyfile(template, temporary / name)
            if tasks.templates is not None:
                shutil.copytree(tasks.templates, temporary / "tasks")
        except OSError as error:
            shutil.rmtree(temporary)
            raise UserError(f"{error.filename}: the template cannot be read ({error.strerror}); correct the path") from None
        temporary.rename(own)
    prompt = dataclasses.replace(prompt, templates=tuple(str(own / name) for name in names))
    if tasks.templates is not None:
        tasks = dataclasses.replace(tasks, templates=str(own / "tasks"))
    return dataclasses.replace(config, prompt=prompt, tasks=tasks)


@contextmanager
def _templates_as_given(folder: RunFolder, config: RunConfig) -> Iterator[None]:
    """Errors name the user's templates, and not their copies in the run's folder."""
    try:
        yield
    except UserError as error:
        text, own = str(error), folder.prepared / "templates"
        for number, template in enumerate(config.prompt.templates):
            text = text.replace(str(own / f"{number}_{Path(template).name}"), template)
        if config.tasks.templates is not None:
            text = text.replace(str(own / "tasks"), config.tasks.templates.rstrip("/"))
        raise (error if text == str(error) else type(error)(text)) from None


def prepare(folder: RunFolder, config: RunConfig) -> Session:
    """Reads the log and the catalogue, splits, names the items; writes `prepared/`. LeakError for what `check_leaks` finds."""
    from sftrec_jax.run.lint import check_leaks, record_fit  # which imports this file

    dataset = prepare_dataset(config.data, config.profile)
    check_evaluable(folder.path, config, dataset)
    if config.profile.filler is not None:
        dataset = fill_profiles(config, dataset)
    dataset.save(folder.prepared)
    with _templates_as_given(folder, config):  # an error now and not after training
        session = _open(folder, config, dataset, None)
        for template in config.evaluate.templates:
            prompt_builder(config.prompt, session.codes, session.tokenizer, session.prompts.context, dataset, template)
        check_tasks(session.config, dataset, session.codes, session.tokenizer, session.prompts.context)
    if any(KINDS[name].answer in IN_WORDS for name in wanted_tasks(config.tasks) if name in KINDS):
        check_installed()
    record_fit(dataset, folder.prepared)
    lengths = np.diff(dataset.offsets)
    spread = f"({lengths.min()} to {lengths.max()} each, median {int(np.median(lengths))})"
    if dataset.given:
        order = f"{len(lengths):,} examples, {len(dataset.item_ids):,} items {spread}, split as given"
    else:
        order = (
            f"{len(dataset.user_ids):,} users, {len(dataset.item_ids):,} items, {len(dataset.items):,} interactions {spread}, "
            f"split {config.data.split}; "
        )
        tied = (
            f"{dataset.report.get('tied_timestamp_share') or 0:.1%} of interactions tied in time, ordered by a hash of tie_seed"
        )
        order += tied if dataset.timed else "in the order of the source"
    console.print(f"data: {order}")
    codes = session.codes
    console.print(
        f"items: {config.items.tokenizer}, {codes.codes.shape[1]} tokens at most, {len(codes.new_tokens):,} new tokens; "
        f"base {session.source.label}"
    )
    check_leaks(session)
    console.print(data_table(dataset.report, config.data), soft_wrap=False)
    for line in other_counts(dataset.report):
        console.print(f"  {line}", markup=False)
    write_text(folder.whole, "prepared to the end\n")
    return session


def open_session(path: Path) -> Session:
    """Opens a prepared run."""
    folder = open_folder(path)
    if folder.replaced.exists() and not folder.prepared.exists():
        folder.replaced.rename(folder.prepared)  # `add-items` was stopped between its two renames
    if not folder.whole.exists():
        raise UserError(f"{path}: is not prepared; run `sftrec prepare CONFIG --out {path}`")
    return _open(folder, load_config(folder.config), Dataset.load(folder.prepared), ItemCodes.load(folder.prepared))


def describe_devices(mesh: Mesh) -> str:
    """One line on devices and mesh."""
    device = jax.devices()[0]
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{mesh.size} {device.platform} device(s) ({device.device_kind}), mesh {shape}"


def recommender(session: Session, decoder: Decoder) -> Recommender:
    """Decoding with a decoder of the run."""
    return Recommender(decoder, session.codes, session.config.decode, session.mesh, session.prompts.beginning)
