"""An order of interactions at one time that no file decides: hashes of users and items."""

import hashlib

import numpy as np


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
