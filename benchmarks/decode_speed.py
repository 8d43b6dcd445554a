"""Constrained beam search: transformers' `generate` with a dict trie on torch against this package, same weights, same CPU.

    python benchmarks/decode_speed.py --quick

A random Llama (vocabulary 50,000, hidden 256, 4 layers, 8 heads over 4 kv-heads of 32, FFN 768, tied head, float32) ranks 12,000
random items of four tokens, 256 tokens a level, for 4 users in one batch, whose prompts are random and equally long. In each
repetition transformers runs once and ours five times, in turns; a ratio is transformers' time over the median of those five.
Whole calls are timed, from prompts on the host to lists on the host; compilation and the first call of each stand apart.

transformers runs in float32 with its cache under `torch.inference_mode`, on as many threads as there are cores. Its trie is one
dict from the tokens generated so far to a tensor of those allowed next. Every score of ours is checked once more: the prompt's
cache, copied to all items found, gives their log-probability in one plain torch forward pass.

The last line is one JSON object: `ratio_vs_transformers` (width 50, prompt 512, the exact normaliser `full`; median over the
repetitions), `same_items` (all lists equal, in order), `identical_ranks` (share of places with the same item), `max_score_diff`
(of log-probabilities, over items in both lists), `invalid` (entries of our lists that are no item, stand there twice, or whose
score is not what the forward pass gives), `rows`, `device`, `versions`. A row has milliseconds (least and median) of both, of our
pass over the prompts alone, and of our other normalisers. Run it on an idle machine: `load` is the load average before
a row.
"""

import argparse
import dataclasses
import gc
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from command import run_main
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

from sftrec_jax.config import DecodeConfig, MeshConfig
from sftrec_jax.decode.prefix import prefill
from sftrec_jax.decode.recommender import Ranking, Recommender
from sftrec_jax.errors import UserError
from sftrec_jax.items.codes import ItemCodes
from sftrec_jax.model.decoder import Decoder
from sftrec_jax.model.hub import BaseSource
from sftrec_jax.model.load import Build, load_decoder, source_architecture
from sftrec_jax.model.mesh import make_mesh

USERS, ITEMS, LEVELS, CODES, VOCAB = 4, 12_000, 4, 256, 50_000
FIRST_TOKEN = 1_000
"""The first token of the first level; each level has the next 256."""
WIDTHS, OURS_ONLY, PROMPTS = (10, 20, 50), (100, 200), (128, 512)
CALLS = 5
"""Our calls in a repetition."""
PAUSE = 0.3
"""Seconds between the two: idle OpenMP threads of torch spin for a while and would take a core from the other."""
NORMALISERS = ("items", "level", "children")
"""Beside `full`, where the decoder has them."""
TOLERANCE = 1e-3
"""A score further from the forward pass than this is wrong: rounding stays below 1e-4."""


def catalogue(seed: int) -> ItemCodes:
    """Distinct random codes; level l has the tokens FIRST_TOKEN + 256 l and the 255 after it."""
    keys = np.random.default_rng(seed).choice(CODES**LEVELS, ITEMS, replace=False)
    digits = keys[:, None] // CODES ** np.arange(LEVELS) % CODES
    codes = (FIRST_TOKEN + CODES * np.arange(LEVELS) + digits).astype(np.int32)
    titles = np.asarray([f"item {i}" for i in range(ITEMS)], object)
    return ItemCodes(codes, (), np.zeros(0, np.int32), (), titles)


def models(folder: Path, codes: ItemCodes, seed: int) -> tuple[Any, Decoder]:
    """The same random weights in both. At this initializer_range scores lie hundredths apart, far more than rounding."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.1,
        bos_token_id=None, eos_token_id=None, dtype="float32",
    )  # fmt: skip
    reference = LlamaForCausalLM(config).eval()
    reference.save_pretrained(folder)
    source = BaseSource(folder=folder, gguf=None, tokenizer=folder, label=str(folder))
    build = Build(source_architecture(source), None, (), jnp.dtype(jnp.float32), jnp.dtype(jnp.float32), "none")
    return reference, load_decoder(build, source, codes, make_mesh(MeshConfig()), 0, False)


class Transformers:
    """`generate` under a dict trie."""

    def __init__(self, model: Any, codes: np.ndarray):
        self.model = model
        following: dict[tuple[int, ...], set[int]] = {}
        for row in codes.tolist():
            for at, token in enumerate(row):
                following.setdefault(tuple(row[:at]), set()).add(token)
        self.trie = {prefix: torch.tensor(sorted(tokens)) for prefix, tokens in following.items()}
        self.item_of = {tuple(row): item for item, row in enumerate(codes.tolist())}

    def generate(self, prompts: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 [U * width, P + 4] and scores float32 [U * width]."""
        start = prompts.shape[1]
        with torch.inference_mode():
            found = self.model.generate(
                prompts, attention_mask=torch.ones_like(prompts), num_beams=width, num_return_sequences=width,
                max_new_tokens=LEVELS, prefix_allowed_tokens_fn=lambda _, tokens: self.trie[tuple(tokens[start:].tolist())],
                length_penalty=0.0, do_sample=False, use_cache=True, pad_token_id=0, return_dict_in_generate=True,
                output_scores=True,
            )  # fmt: skip
        return found.sequences, found.sequences_scores

    def ranking(self, prompts: torch.Tensor, width: int) -> Ranking:
        """The same as items; a sequence that is none is a KeyError."""
        tokens, scores = self.generate(prompts, width)
        items = [self.item_of[tuple(row)] for row in tokens[:, prompts.shape[1] :].tolist()]
        return Ranking(np.asarray(items, np.int32).reshape(-1, width), scores.numpy().reshape(-1, width))

    def scores(self, prompt: torch.Tensor, codes: np.ndarray) -> np.ndarray:
        """float64 [n] log-probability of each code int [n, 4] after a prompt [P], the prompt run once."""
        tokens = torch.tensor(codes).long()
        with torch.inference_mode():
            first = self.model(prompt[None], use_cache=True, logits_to_keep=1)
            first.past_key_values.batch_repeat_interleave(len(codes))
            rest = self.model(tokens[:, :-1], past_key_values=first.past_key_values).logits.double()
            every = torch.cat([first.logits.double().expand(len(codes), 1, -1), rest], 1)
            return torch.log_softmax(every, -1).gather(2, tokens[..., None]).sum((1, 2)).numpy()


def prompts_alone(decoder: Decoder, prompts: Sequence[np.ndarray]) -> Callable[[], Any]:
    """A call that only runs the prompts and keeps what the search starts from."""
    graphdef, state = nnx.split(decoder)
    tokens = jnp.asarray(np.stack(prompts))
    lengths = jnp.full(len(tokens), tokens.shape[1], jnp.int32)
    run = jax.jit(lambda state, tokens, lengths: prefill(nnx.merge(graphdef, state), tokens, lengths, None))
    return lambda: jax.block_until_ready(run(state, tokens, lengths))


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    begin = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begin)


def several(call: Callable[[], Any]) -> list[float]:
    """Milliseconds of our calls in one repetition, after a pause."""
    time.sleep(PAUSE)
    return [timed(call) for _ in range(CALLS)]


def summary(milliseconds: list[float]) -> dict[str, float]:
    """Least and median."""
    return {"min_ms": round(min(milliseconds), 1), "median_ms": round(float(np.median(milliseconds)), 1)}


def invalid_entries(theirs: Transformers, codes: np.ndarray, prompts: Sequence[np.ndarray], ours: Ranking) -> int:
    """Entries of our lists that are no item, repeat one, or have a score that the forward pass does not confirm."""
    wrong = 0
    for prompt, items, scores in zip(prompts, ours.items, ours.scores, strict=True):
        real = (items >= 0) & (items < len(codes))
        expected = theirs.scores(torch.tensor(prompt).long(), codes[np.where(real, items, 0)])
        first = np.zeros(len(items), bool)
        first[np.unique(items, return_index=True)[1]] = True
        for at in np.flatnonzero(~(real & first & (np.abs(scores - expected) < TOLERANCE))):
            print(
                f"invalid: place {at}, item {items[at]}, score {scores[at]}, by the forward pass {expected[at]}", file=sys.stderr
            )
            wrong += 1
    return wrong


def compare(ours: Ranking, theirs: Ranking) -> dict[str, object]:
    """How far two rankings of the same users agree."""
    difference = 0.0
    for a, x, b, y in zip(ours.items, ours.scores, theirs.items, theirs.scores, strict=True):
        _, at, other = np.intersect1d(a, b, return_indices=True)
        difference = max(difference, float(np.abs(x[at] - y[other]).max(initial=0.0)))
    return {
        "same_items": bool((ours.items == theirs.items).all()),
        "identical_ranks": round(float((ours.items == theirs.items).mean()), 4),
        "max_score_diff": difference,
        "least_gap": float(-np.diff(theirs.scores, axis=1).max()) if theirs.scores.shape[1] > 1 else None,
    }


class Bench:
    """Both decoders, and the rows measured so far."""

    def __init__(self, folder: Path, seed: int):
        self.seed = seed
        self.codes = catalogue(seed)
        reference, self.decoder = models(folder, self.codes, seed)
        self.theirs = Transformers(reference, self.codes.codes)
        self.rows: list[dict[str, Any]] = []

    def recommender(self, width: int, **settings: Any) -> Recommender:
        config = dataclasses.replace(DecodeConfig(beam=width, top_k=width, batch_users=USERS), **settings)
        return Recommender(self.decoder, self.codes, config, make_mesh(MeshConfig()))

    def measure(self, width: int, length: int, repeats: int, reference: bool) -> None:
        """One row; without `reference` transformers is left out."""
        rng = np.random.default_rng([self.seed, length])
        prompts = [rng.integers(0, VOCAB, length).astype(np.int32) for _ in range(USERS)]
        tensors = torch.tensor(np.stack(prompts)).long()
        recommender = self.recommender(width)
        calls: dict[str, Callable[[], Any]] = {"full": lambda: recommender.rank(prompts, None, width)}
        if any(f.name == "normaliser" for f in dataclasses.fields(DecodeConfig)):
            for name in NORMALISERS:
                other = self.recommender(width, normaliser=name)
                calls[name] = lambda other=other: other.rank(prompts, None, width)
        calls["prefill"] = prompts_alone(self.decoder, prompts)
        row: dict[str, Any] = {"width": width, "prompt": length, "load": round(os.getloadavg()[0], 2)}
        row["first_call_s"] = round(timed(calls["full"]) / 1000, 2)
        ours = calls["full"]()
        for call in calls.values():
            call()
        row["invalid"] = invalid_entries(self.theirs, self.codes.codes, prompts, ours)
        if reference:
            row |= compare(ours, self.theirs.ranking(tensors, width))
        theirs: list[float] = []
        times: dict[str, list[float]] = {name: [] for name in calls}
        ratios: dict[str, list[float]] = {name: [] for name in calls if name != "prefill"}
        for _ in range(repeats):
            gc.collect()
            if reference:
                time.sleep(PAUSE)
                theirs.append(timed(lambda: self.theirs.generate(tensors, width)))
            for name, call in calls.items():
                here = several(call)
                times[name] += here
                if reference and name in ratios:
                    ratios[name].append(theirs[-1] / float(np.median(here)))
        row |= {"ours": summary(times["full"]), "prefill": summary(times["prefill"])}
        if reference:
            row |= {"transformers": summary(theirs), "ratio": round(float(np.median(ratios["full"])), 2)}
            row["ratios"] = [round(r, 2) for r in ratios["full"]]
        for name in calls:
            if name not in ("full", "prefill"):
                row[name] = summary(times[name])
                if reference:
                    row[name]["ratio"] = round(float(np.median(ratios[name])), 2)
        self.rows.append(row)
        print(describe(row), flush=True)


def describe(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    text = f"width {row['width']:3d}, prompt {row['prompt']}: ours {row['ours']['median_ms']:.0f} ms"
    text += f" (prompts alone {row['prefill']['median_ms']:.0f}; first call {row['first_call_s']:.1f} s)"
    if "ratio" in row:
        text += f", transformers {row['transformers']['median_ms']:.0f} ms, ratio {row['ratio']:.1f}"
        text += f", same ranks {row['identical_ranks']:.2%}, scores within {row['max_score_diff']:.1e}"
    for name in NORMALISERS:
        if name in row:
            text += f"; {name} {row[name]['median_ms']:.0f} ms" + (f" ({row[name]['ratio']:.1f})" if "ratio" in row[name] else "")
    return text + f"; invalid {row['invalid']}"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Milliseconds and ratio over the width, a line for each prompt length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, length in enumerate(sorted({row["prompt"] for row in rows})):
        of_length = [row for row in rows if row["prompt"] == length]
        both = [row for row in of_length if "ratio" in row]
        colour = f"C{number}"
        for name, chosen, style in (("transformers", both, "--s"), ("ours", of_length, "-o")):
            values = [row[name]["median_ms"] for row in chosen]
            left.plot([row["width"] for row in chosen], values, style, color=colour, label=f"{name}, prompt {length}")
        right.plot([row["width"] for row in both], [row["ratio"] for row in both], "-o", color=colour, label=f"prompt {length}")
    left.set(xlabel="beams", ylabel="milliseconds for 4 users (median)", yscale="log", ylim=(1, None))
    right.set(xlabel="beams", ylabel="times faster than transformers", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file)


def processor() -> str:
    """The model name of the CPU, with its number of cores."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {cores()} cores"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="width 50 and prompt 512 only, two repetitions: within 3 minutes")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of each row without --quick")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw times and ratios over the width (.png, .svg, .pdf)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, items and prompts")
    args = parser.parse_args()
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}; use 1 or more")
    if args.plot is not None:
        check_plot(args.plot)
    if jax.default_backend() != "cpu":
        raise UserError(f"jax runs on {jax.default_backend()} but torch on the CPU; set JAX_PLATFORMS=cpu to compare alike")
    torch.set_num_threads(cores())
    transformers_logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.seed)
    for length in (512,) if args.quick else PROMPTS:
        for width in (50,) if args.quick else (*WIDTHS, *OURS_ONLY):
            bench.measure(width, length, 2 if args.quick else args.repeats, width in WIDTHS)
    if args.plot is not None:
        plot(bench.rows, args.plot)
    compared = [row for row in bench.rows if "ratio" in row]
    (headline,) = (row for row in compared if row["width"] == 50 and row["prompt"] == 512)
    result = {
        "ratio_vs_transformers": headline["ratio"],
        "same_items": all(row["same_items"] for row in compared),
        "identical_ranks": min(row["identical_ranks"] for row in compared),
        "max_score_diff": max(row["max_score_diff"] for row in compared),
        "invalid": sum(row["invalid"] for row in bench.rows),
        "rows": bench.rows,
        "device": processor(),
        "versions": {name: version(name) for name in ("jax", "torch", "transformers", "numpy")},
    }
    print(json.dumps(result))


def check_plot(file: Path) -> None:
    """Before an hour of measuring, not after. Raises: UserError."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("--plot needs matplotlib; pip install matplotlib") from error
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {file}: the name must end in .png, .svg or .pdf")
    if not file.parent.is_dir():
        raise UserError(f"--plot {file}: there is no folder {file.parent}; make it first")


if __name__ == "__main__":
    run_main(main)
