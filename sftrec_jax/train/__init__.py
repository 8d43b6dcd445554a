"""Training: loss on target tokens, optimizer over the adapters, one jitted step, the loop, checkpoints, metrics."""
