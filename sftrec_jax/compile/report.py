"""What a compiled program takes on a slice: memory, exchanges, and the least time that peak rates allow."""

import re
from dataclasses import dataclass, field
from typing import Any

from sftrec_jax.compile.hlo import Module
from sftrec_jax.config import RunConfig
from sftrec_jax.errors import UserError
from sftrec_jax.model.chips import Chip
from sftrec_jax.model.load import Build
from sftrec_jax.train.flops import forward_flops, step_flops

EXHAUSTED = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE),
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)
"""How the TPU compiler says what a program takes and what there is."""
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Program:
    """One compiled program, on one chip."""

    name: str
    seconds: float
    """Compilation took."""
    arguments: float
    """Bytes of weights, state and batch."""
    temporaries: float
    """Bytes beside them, results that are not written over arguments included."""
    capacity: float
    """Bytes of a chip."""
    memory_bytes: float = 0.0
    """Read from and written to main memory."""
    collectives: dict[str, float] = field(default_factory=dict)
    """Bytes that leave the chip, by kind."""
    module: Module | None = None
    text: str = ""
    """As XLA made it."""

    @property
    def total(self) -> float:
        """Bytes at once."""
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether a chip holds it."""
        return self.total <= self.capacity

    @property
    def collective_bytes(self) -> float:
        """Bytes that leave the chip."""
        return sum(self.collectives.values())


@dataclass(frozen=True)
class Roofline:
    """The least time of a training step, by what bounds it."""

    flops: float
    """Of all chips, nothing computed twice."""
    again: float
    """What is computed again beside."""
    compute: float
    """Seconds at peak, with what is computed again."""
    memory: float
    """Seconds at the memory's rate."""
    links: float
    """Seconds at the rate of both links of one axis of the torus: exchanges along several axes at once may be faster."""
    peak: float
    """FLOP/s of all chips."""

    @property
    def seconds(self) -> float:
        """As if the three ran side by side."""
        return max(self.compute, self.memory, self.links)

    @property
    def mfu_bound(self) -> float:
        """Model FLOPs utilisation that this leaves possible (Chowdhery et al. 2022, PaLM, appendix B)."""
        return self.flops / (self.peak * self.seconds)

    @property
    def bound_by(self) -> str:
        """The largest of the three."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))


def compiled_program(name: str, lowered: Any, chip: Chip, seconds: Any) -> Program:
    """Compiles; a program that XLA finds too large for the chip is a result like another. `seconds` tells the time."""
    import jax

    begin = seconds()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = next((m for pattern in EXHAUSTED if (m := pattern.search(str(error)))), None)
        if found is None:
            raise UserError(f"XLA cannot compile the {name} program for this slice: {str(error).splitlines()[0]}") from error
        used = float(found[1]) * UNITS[found[2].upper()]
        return Program(name, seconds() - begin, 0.0, used, min(chip.hbm_bytes, float(found[3]) * UNITS[found[4].upper()]))
    sizes = compiled.memory_analysis()
    text = compiled.as_text()
    module = Module(text)
    return Program(
        name=name,
        seconds=seconds() - begin,
        arguments=sizes.argument_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes
        + sizes.generated_code_size_in_bytes
        + max(0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes),
        capacity=chip.hbm_bytes,
        memory_bytes=module.memory_bytes(),
        collectives=module.collective_bytes(),
        module=module,
        text=text,
    )


def roofline(config: RunConfig, build: Build, program: Program, targets: int, chip: Chip, chips: int) -> Roofline:
    """Of a training step whose rows are full, each of one example (which has the most pairs of tokens)."""
    train, arch = config.train, build.arch
    rows = train.batch_rows * train.accumulate
    tokens, pairs = rows * train.row_length, rows * train.row_length * (train.row_length + 1) // 2
    counts = (arch, build.adapters, train.method, tokens, rows * targets, pairs, len(build.row_ids))
    flops = step_flops(*counts).total
    again = forward_flops(arch, build.adapters, tokens, pairs) if build.remat == "full" else 0.0
    peak = chips * chip.flops
    links = 2 * chip.link_rate
    return Roofline(
        flops, again, (flops + again) / peak, program.memory_bytes / chip.hbm_rate,
        program.collective_bytes / links if links and chips > 1 else 0.0, peak,
    )  # fmt: skip


def advice(config: RunConfig, build: Build, sizes: dict[str, int], chips: int) -> str:
    """What to change when a step does not fit."""
    ways = []
    if sizes["fsdp"] * sizes["tensor"] < chips:
        ways.append("divide the parameters among more chips (--mesh auto, or a larger --mesh.fsdp)")
    if build.remat != "full":
        ways.append("keep less for the backward pass (--model.remat full)")
    if config.train.batch_rows > sizes["data"] * sizes["fsdp"]:
        ways.append("take fewer rows at a time (a lower --train.batch-rows, a higher --train.accumulate)")
    if build.quantise is None and config.train.method != "full":
        ways.append("hold the base in 8 bits (--model.quantise int8)")
    ways.append("take a larger slice")
    return "; or ".join(ways)
