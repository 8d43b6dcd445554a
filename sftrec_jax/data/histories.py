"""From checked interactions to histories: filters, and an order that no file decides."""

import hashlib

import numpy as np
import polars as pl


def k_core(log: pl.DataFrame, user_core: int, item_core: int) -> tuple[pl.DataFrame, int]:
    """Drops rows of users and items (columns `user`, `item`) with fewer rows than asked for, until none has.

    Gives the rows left and the number of rounds that dropped some.
    """
    rounds = 0
    while True:
        kept = log.filter((pl.len().over("user") >= user_core) & (pl.len().over("item") >= item_core))
        if kept.height == log.height:
            return log, rounds
        log, rounds = kept, rounds + 1


def drop_duplicates(log: pl.DataFrame) -> pl.DataFrame:
    """Keeps one of the rows that agree in user, item and time."""
    return log.unique(subset=["user", "item", "time", "fraction"], keep="any")


def time_order(log: pl.DataFrame, user_hashes: np.ndarray, item_hashes: np.ndarray) -> pl.DataFrame:
    """Sorts by user, then time; equal times by a hash of user and item, never by file order or item.

    `log` has indices `user` and `item`, which point into the hashes (uint64 [U], [n_items]), and `time`, `fraction`.
    """
    ties = pair_hash(user_hashes[log["user"].to_numpy()], item_hashes[log["item"].to_numpy()])
    # the item comes last only to settle a collision of two 64-bit hashes
    return log.with_columns(pl.Series("tie", ties)).sort("user", "time", "fraction", "tie", "item")


def tied_share(log: pl.DataFrame) -> float:
    """Share of the interactions that have the time of another one of the same user."""
    return float(log.select((pl.len().over("user", "time", "fraction") > 1).mean()).item() or 0.0)


def tied_in_file_order(log: pl.DataFrame) -> tuple[float | None, int]:
    """Of neighbours in a history with equal times, the share whose rows (column `row`) rise, and their number.

    One half where the order of the file says nothing; None without such neighbours.
    """
    same = pl.all_horizontal(pl.col(c) == pl.col(c).shift() for c in ("user", "time", "fraction"))
    rises = log.select(same=same, rises=pl.col("row") > pl.col("row").shift()).filter(pl.col("same"))["rises"]
    return (int(rises.sum()) / rises.len(), rises.len()) if rises.len() else (None, 0)


def text_hashes(texts: list[str], seed: int, kind: str) -> np.ndarray:
    """uint64 [len(texts)]: BLAKE2b of (seed, kind, text); the same on every machine and in every version."""
    key = f"{seed}:{kind}".encode()
    digests = (hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=key).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def pair_hash(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Mixes two uint64 arrays [N] to one; the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    return _mix(_mix(users) + items)


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
