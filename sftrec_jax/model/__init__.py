"""The Flax causal language model: architecture, adapters, weights in and out, sharding."""
