"""Where adapters sit and how large they are, by PEFT's rules and names: targets, patterns, layers, scaling."""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sftrec_jax.config import LoraConfig
from sftrec_jax.errors import UserError
from sftrec_jax.model.architecture import Architecture
from sftrec_jax.model.families import module_of, weight_map

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterSpec:
    """LoRA (Hu et al. 2021) as PEFT defines it: W x + s B A dropout(x), s = alpha / r, on the named projections."""

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    """Projections with an adapter in some layer, in the decoder's order."""
    rslora: bool = False
    """s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """The sum's columns are brought to trained lengths (Liu et al. 2024, arXiv:2402.09353)."""
    pissa: bool = False
    """A and B begin with the kernel's principal part, which leaves the base (Meng et al. 2024, arXiv:2404.02948)."""
    ranks: tuple[tuple[int, ...], ...] = ()
    """By target and layer, 0 where there is no adapter; empty: r everywhere."""
    alphas: tuple[tuple[float, ...], ...] = ()
    """By target and layer; empty: alpha everywhere."""

    def rank(self, name: str) -> int:
        """The largest rank of a projection in any layer, 0 without an adapter."""
        if name not in self.targets:
            return 0
        return max(self.ranks[self.targets.index(name)]) if self.ranks else self.r

    def mean_rank(self, name: str) -> float:
        """Over layers."""
        if not self.ranks or name not in self.targets:
            return float(self.rank(name))
        of_layers = self.ranks[self.targets.index(name)]
        return sum(of_layers) / len(of_layers)

    def layer_ranks(self, name: str, layers: int) -> tuple[int, ...]:
        """Of every layer."""
        return self.ranks[self.targets.index(name)] if self.ranks else (self.r,) * layers

    def scale(self, name: str, layer: int) -> float:
        """s of one adapter; 0 where there is none."""
        at = self.targets.index(name)
        rank = self.ranks[at][layer] if self.ranks else self.r
        alpha = self.alphas[at][layer] if self.alphas else self.alpha
        return alpha / (math.sqrt(rank) if self.rslora else rank) if rank else 0.0


def module_paths(arch: Architecture) -> dict[tuple[int, str], str]:
    """(layer, projection) -> the module's path in Hugging Face's model, such as `model.layers.3.self_attn.q_proj`."""
    return {(i, p): f"model.layers.{i}.{module_of(arch, p)}" for i in range(arch.layers) for p in PROJECTIONS}


def adapter_spec(config: LoraConfig, arch: Architecture) -> AdapterSpec:
    """Resolves targets, patterns and layers; UserError for one that matches nothing, with the nearest name."""
    paths = module_paths(arch)
    chosen = _targets(config, paths)
    if config.layers_to_transform is not None:
        beyond = [i for i in config.layers_to_transform if not 0 <= i < arch.layers]
        if beyond or not config.layers_to_transform:
            wrong = beyond[0] if beyond else "the list is empty"
            raise UserError(f"lora.layers_to_transform: {wrong}; the model has layers 0 to {arch.layers - 1}")
        chosen = {at for at in chosen if at[0] in config.layers_to_transform}
        if not chosen:
            raise UserError("lora.layers_to_transform leaves no module of lora.targets; add layers or targets")
    own = {at: paths[at] for at in sorted(chosen)}
    ranks = {at: int(value) for at, value in _by_pattern("rank_pattern", config.rank_pattern, config.r, own).items()}
    alphas = _by_pattern("alpha_pattern", config.alpha_pattern, config.alpha, own)
    spec = AdapterSpec(
        config.r,
        config.alpha,
        config.dropout,
        tuple(p for p in PROJECTIONS if any(name == p for _, name in chosen)),
        config.use_rslora,
        config.use_dora,
        config.init == "pissa",
    )
    return with_sizes(spec, ranks, alphas, arch.layers)


def with_sizes(
    spec: AdapterSpec, ranks: dict[tuple[int, str], int], alphas: dict[tuple[int, str], float], layers: int
) -> AdapterSpec:
    """`spec` with ranks and alphas of (layer, projection), left out where all are the same."""
    table = tuple(tuple(ranks.get((i, p), 0) for i in range(layers)) for p in spec.targets)
    scales = tuple(tuple(alphas.get((i, p), spec.alpha) for i in range(layers)) for p in spec.targets)
    same = {r for row in table for r in row}, {a for row in scales for a in row}
    if len(same[0]) == len(same[1]) == 1:
        return dataclasses.replace(spec, r=same[0].pop(), alpha=same[1].pop())
    return dataclasses.replace(spec, ranks=table, alphas=scales)


TABLES = ("embed_tokens/weight", "lm_head/weight")


def saved_paths(names: Sequence[str], arch: Architecture) -> tuple[str, ...]:
    """Parameters of the modules in `lora.modules_to_save`, whose paths end so, as PEFT matches them."""
    found: list[str] = []
    for name in names:
        if name.endswith("lm_head") and arch.tied:
            raise UserError(f"lora.modules_to_save: {name!r}, but the head is the token table; use embed_tokens")
        own = [
            path
            for path, tensor in weight_map(arch).items()
            if tensor.name.removesuffix(".weight").endswith(name) and (path in TABLES or "norm" in path)
        ]
        if not own:
            norms = sorted({t.name.removesuffix(".weight").split(".")[-1] for p, t in weight_map(arch).items() if "norm" in p})
            known = ["embed_tokens", *([] if arch.tied else ["lm_head"]), *norms]
            raise UserError(
                f"lora.modules_to_save: {name!r} is none of {', '.join(known)}; for projections use lora.targets, for everything "
                "train.method: full"
            )
        found += [path for path in own if path not in found]
    return tuple(found)


def _by_pattern(
    name: str, patterns: Mapping[str, float], else_value: float, paths: dict[tuple[int, str], str]
) -> dict[tuple[int, str], float]:
    """The value of the first pattern that matches a path or its end, as PEFT takes it."""
    values, used = {}, set()
    for at, path in paths.items():
        try:
            key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)
        except re.error as error:
            raise UserError(f"lora.{name}: a key is no regular expression ({error}); use names or paths of modules") from None
        used.add(key)
        values[at] = else_value if key is None else patterns[key]
    for key in patterns:
        if key not in used:
            raise UserError(f"lora.{name}: {key!r} matches no module of lora.targets first{_hint(key, paths.values())}")
    return values


def _targets(config: LoraConfig, paths: dict[tuple[int, str], str]) -> set[tuple[int, str]]:
    wanted = config.targets
    if wanted == "all-linear":
        return set(paths)
    if isinstance(wanted, str):
        try:
            found = {at for at, path in paths.items() if re.fullmatch(wanted, path) or _ends(path, wanted)}
        except re.error as error:
            raise UserError(f"lora.targets: {wanted!r} is no regular expression ({error}); use names or all-linear") from None
        if not found:
            raise UserError(f"lora.targets: {wanted!r} matches no projection{_hint(wanted, paths.values())}")
        return found
    if not wanted:
        raise UserError(f"lora.targets: the list is empty; use all-linear or names among {', '.join(PROJECTIONS)}")
    found = set()
    for name in wanted:
        own = {at for at, path in paths.items() if _ends(path, name)}
        if not own:
            raise UserError(f"lora.targets: {name!r} matches no projection{_hint(name, paths.values())}")
        found |= own
    return found


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _hint(name: str, paths: Iterable[str]) -> str:
    """The nearest name, and all."""
    known: Sequence[str] = [*PROJECTIONS, *paths]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; the nearest is {near[0]}; use all-linear, names among {', '.join(PROJECTIONS)}, or a regular expression of paths"
