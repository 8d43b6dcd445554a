"""Blocks of item vectors side by side, and vectors from a file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sftrec_jax.errors import UserError

_MAGIC = b"\x93NUMPY"
_EQUAL = 1e-6


def combine(
    blocks: Sequence[tuple[str, np.ndarray, float]], item_ids: Sequence[str] | np.ndarray
) -> tuple[np.ndarray, dict[str, int]]:
    """Scales the rows of each block to the block's weight and puts the blocks side by side. Zero rows stay zero.

    Args:
        blocks: (name, float [n, E_b], weight above 0) each; the name stands in errors and in the report.
        item_ids: [n] ids of the source, for errors.

    Returns: float32 [n, sum of E_b]; how many rows of each block are zero, as {"text_items_without": 7}, and how many are
        zero in all, as `items_without`.
    Raises: UserError for NaN or infinite values, and for a block that does not tell items apart.
    """
    if not blocks:
        raise ValueError("no blocks to combine")
    parts: list[np.ndarray] = []
    report: dict[str, int] = {}
    for name, values, weight in blocks:
        if values.ndim != 2 or len(values) != len(item_ids):
            raise ValueError(f"{name}: vectors {list(values.shape)} for {len(item_ids)} items")
        directions = _directions(name, values, item_ids)
        report[f"{name}_items_without"] = int((~directions.any(axis=1)).sum())
        parts.append((weight * directions).astype(np.float32))
    together = np.concatenate(parts, axis=1)
    report["items_without"] = int((~together.any(axis=1)).sum())
    return together, report


def load_vectors(path: Path, n_catalogue: int) -> np.ndarray:
    """Reads `embedding.file`, a `.npy` file with one row an item of the catalogue.

    Args:
        n_catalogue: items of the catalogue as it was read, before any filter.

    Returns: float32 [n_catalogue, E]. Values are not checked here; see `combine`.
    Raises: UserError for a file that is missing, no `.npy`, pickled, not of floats, or of another shape.
    """
    save = "write it with numpy.save from a float array [items, dimensions]"
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
        if magic != _MAGIC:
            raise UserError(f"{path}: not a .npy file; {save}")
        values = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: cannot read item vectors ({error.strerror}); set embedding.file to a .npy file") from None
    except (ValueError, EOFError):
        raise UserError(f"{path}: cut short, or pickled Python objects (never read); {save}") from None
    if not np.issubdtype(values.dtype, np.floating):
        raise UserError(f"{path}: holds {values.dtype}, not floats; {save}")
    if values.ndim != 2 or values.shape[1] == 0:
        raise UserError(f"{path}: has shape {list(values.shape)}; {save}")
    if len(values) != n_catalogue:
        raise UserError(
            f"{path}: has {len(values)} rows but the catalogue {n_catalogue} items; write one row an item, in its order"
        )
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which `combine` reports with its item
        return values.astype(np.float32)


def _directions(name: str, values: np.ndarray, item_ids: Sequence[str] | np.ndarray) -> np.ndarray:
    """float64 [n, E], rows of length 1 or zeros."""
    broken = ~np.isfinite(values).all(axis=1)
    if broken.any():
        row = int(broken.argmax())
        value = values[row][~np.isfinite(values[row])][0]
        raise UserError(
            f"item vectors, {name}: item {str(item_ids[row])!r} (row {row}) has the value {value}"
            f" ({int(broken.sum())} such items); remove NaN and infinite values, zeros stand for no vector"
        )
    # Divided by the largest value first: squares of very small ones would be 0.
    largest = np.abs(values).max(axis=1, keepdims=True, initial=0.0).astype(np.float64)
    scaled = values / np.where(largest > 0, largest, 1.0)
    directions = scaled / np.where(largest > 0, np.linalg.norm(scaled, axis=1, keepdims=True), 1.0)
    present = directions[largest[:, 0] > 0]
    if not len(present):
        raise UserError(f"item vectors, {name}: every row is zero; choose another source in the section embedding")
    if len(present) > 1 and np.ptp(present, axis=0).max() < _EQUAL:
        raise UserError(
            f"item vectors, {name}: all {len(present)} rows have the same direction and cannot tell items apart; "
            "choose another source in the section embedding"
        )
    return directions
