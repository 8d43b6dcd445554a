"""Ranking metrics over the full catalogue, and baselines that a model has to beat."""
