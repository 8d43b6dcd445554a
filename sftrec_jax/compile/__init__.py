"""Compiling training and search for accelerators that are not there, and what the programs would take on them."""
