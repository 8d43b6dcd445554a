"""From item vectors to codes: residual and product quantisation, and what to do when two items get the same code."""
