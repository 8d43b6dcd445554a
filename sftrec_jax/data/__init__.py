"""Interaction logs and catalogues: readers, filters, time order and splits."""
