"""Supervised fine-tuning of causal language models for generative recommendation, in JAX."""

__version__ = "0.1.0"
