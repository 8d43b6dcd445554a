"""A run from log to export: its folder, its opened parts, and one function a stage."""
