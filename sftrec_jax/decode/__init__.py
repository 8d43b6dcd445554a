"""Constrained decoding: the catalogue index, the jitted beam search over it, and batches of users on the host."""
