"""`sftrec compile`: a run's training step and search, compiled for a slice, and told in figures."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from sftrec_jax.compile.programs import Assumed, assumed_targets, lower_search, lower_step
from sftrec_jax.compile.report import Program, Roofline, advice, compiled_program, roofline
from sftrec_jax.compile.topology import topology_devices
from sftrec_jax.config import RunConfig
from sftrec_jax.console import console
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.errors import UserError
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.chips import CHIPS, Chip
from sftrec_jax.model.hf_config import read_architecture
from sftrec_jax.model.hub import ASSETS, SMOLLM2
from sftrec_jax.model.memory import assumed_build, assumed_new_rows, choose_mesh, parameters, step_memory
from sftrec_jax.model.mesh import check_mesh, make_mesh, named
from sftrec_jax.model.packed_attention import attention_path


def shipped_architecture(base: str, folder: Path) -> Architecture:
    """The shape of `model.base` without its weights: its own config.json, or one that lies beside the run's config.

    Args:
        folder: of the run's config; `models/NAME/config.json` below it serves for a hub id `org/NAME`, in lower case.

    Raises: UserError where there is none.
    """
    if base == SMOLLM2:
        return read_architecture(ASSETS / SMOLLM2)
    path = Path(base).expanduser()
    if path.is_dir() or path.name == "config.json":
        return read_architecture(path)
    beside = folder / "models" / base.split("/")[-1].lower() / "config.json"
    if beside.is_file():
        return read_architecture(beside)
    raise UserError(f"model.base {base}: its config.json is not here; save it as {beside}, or name a folder with --model.base")


def compile_stage(
    config: RunConfig,
    folder: Path,
    topology: str,
    items: int | None,
    targets: int | None,
    only: str | None,
    as_json: bool,
    hlo: Path | None = None,
) -> bool:
    """Compiles and prints; True where everything fits. `hlo`: folder for the compiled programs as text."""
    if hlo is not None and not hlo.is_dir():
        raise UserError(f"--hlo {hlo}: there is no such folder; make it first")
    devices = topology_devices(topology)
    chip = CHIPS.get(devices[0].device_kind)
    if chip is None:
        raise UserError(f"--topology {topology}: no figures for {devices[0].device_kind}; known: {', '.join(CHIPS)}")
    arch = shipped_architecture(config.model.base, folder)
    for name, value in (("--items", items), ("--targets-per-row", targets)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: use 1 or more")
    if items is None:
        items = len(prepare_dataset(config.data).item_ids)
    why = ""
    if config.mesh.auto:
        chosen, why = choose_mesh(config, arch, items, devices, "tpu")
        config = dataclasses.replace(config, mesh=chosen)
    mesh = make_mesh(config.mesh, devices)
    check_mesh(mesh, arch, config.train)
    assumed = Assumed(items, targets or assumed_targets(config))
    build = assumed_build(config, arch, assumed_new_rows(config, items), mesh, chip.hbm_bytes, "tpu")
    t, d, sizes = config.train, config.decode, dict(mesh.shape)
    console.print(f"slice: {topology}, {len(devices)} chips ({devices[0].device_kind}); mesh {named(sizes)}{why and f' ({why})'}")
    console.print(
        f"model: {config.model.base}, {_parameters(arch) / 1e9:.2f} billion parameters; {t.method}, {build.dtype.name}, "
        f"remat {build.remat}; attention {attention_path(t.row_length, arch.head_dim, build.dtype, 'tpu')[1]}"
    )
    console.print(
        f"assumed: {items:,} items ({config.items.tokenizer}, {len(build.row_ids):,} new token rows), "
        f"{assumed.targets_per_row:,} targets a row"
    )
    programs: dict[str, Program] = {}
    if only != "search":
        console.print(f"compiling the training step: {t.accumulate} x {t.batch_rows} rows of {t.row_length} tokens ...")
        programs["train"] = compiled_program("train", lower_step(config, build, mesh, assumed), chip, time.monotonic)
    if only != "train":
        console.print(f"compiling the search: {d.batch_users} users, beam {d.beam}, prompts of up to {t.row_length} tokens ...")
        programs["search"] = compiled_program("search", lower_search(config, build, mesh, assumed), chip, time.monotonic)
    bound = None
    if "train" in programs:
        bound = roofline(config, build, programs["train"], assumed.targets_per_row, chip, len(devices))
    _show(programs, bound)
    counted = step_memory(build, parameters(build, t.method), sizes, t.batch_rows, t.row_length).total
    fits = all(p.fits for p in programs.values())
    if not fits:
        console.print(f"does NOT fit: {advice(config, build, sizes, len(devices))}")
    if hlo is not None:
        for name, program in programs.items():
            if program.module is not None:
                (hlo / f"{name}.txt").write_text(program.text, encoding="utf-8")
    if as_json:
        print(json.dumps(_line(topology, sizes, programs, bound, fits, counted, chip)))
    return fits


def _parameters(arch: Architecture) -> int:
    from sftrec_jax.model.families import weight_map

    total = 0
    for tensor in weight_map(arch).values():
        count = 1
        for size in tensor.shape:
            count *= size
        total += count * (arch.layers if tensor.stacked else 1)
    return total


def _show(programs: dict[str, Program], bound: Roofline | None) -> None:
    table = Table("on one chip", *programs)

    def row(name: str, value: Any) -> None:
        table.add_row(name, *(value(p) for p in programs.values()))

    row("compiled in", lambda p: f"{p.seconds:.0f} s")
    row("arguments", lambda p: f"{p.arguments / 1e9:.2f} GB")
    row("temporaries", lambda p: f"{p.temporaries / 1e9:.2f} GB")
    row("total", lambda p: f"{p.total / 1e9:.2f} of {p.capacity / 1e9:.0f} GB, {'fits' if p.fits else 'does NOT fit'}")
    row("memory traffic", lambda p: f"{p.memory_bytes / 1e9:.1f} GB")
    for kind in sorted({k for p in programs.values() for k in p.collectives}):
        row(kind, lambda p, kind=kind: f"{p.collectives.get(kind, 0.0) / 1e9:.3f} GB")
    row("loops of unknown length", lambda p: str(len(p.module.unknown_loops)) if p.module else "-")
    console.print(table)
    if bound is not None and programs["train"].module is not None:
        console.print(
            f"training step at best {bound.seconds:.3f} s, bound by {bound.bound_by}: compute {bound.compute:.3f} s "
            f"({bound.flops / 1e12:.0f} TFLOP, {bound.again / 1e12:.0f} more computed again), memory {bound.memory:.3f} s, "
            f"links {bound.links:.3f} s; MFU at most {bound.mfu_bound:.2f}"
        )


def _line(
    topology: str,
    sizes: dict[str, int],
    programs: dict[str, Program],
    bound: Roofline | None,
    fits: bool,
    counted: float,
    chip: Chip,
) -> dict[str, Any]:
    """Top-level figures are the training step's, or the search's where it is alone."""
    first = next(iter(programs.values()))
    line: dict[str, Any] = {
        "topology": topology,
        "mesh": sizes,
        "fits": fits,
        "hbm_bytes_per_chip": round(first.total),
        "hbm_capacity": round(chip.hbm_bytes),
        "mfu_bound": None if bound is None or not bound.seconds else round(bound.mfu_bound, 4),
        "collective_bytes": {k: round(v) for k, v in first.collectives.items()},
    }
    if bound is not None:
        line |= {
            "flops": bound.flops,
            "flops_again": bound.again,
            "step_seconds": round(bound.seconds, 5),
            "bound_by": bound.bound_by,
        }
        line["counted_bytes_per_chip"] = round(counted)
    for name, p in programs.items():
        line[name] = {
            "arguments": round(p.arguments),
            "temporaries": round(p.temporaries),
            "memory_bytes": round(p.memory_bytes),
            "collective_bytes": {k: round(v) for k, v in p.collectives.items()},
            "compile_seconds": round(p.seconds, 1),
            "fits": p.fits,
        }
    return line | {"jax": jax.__version__}
