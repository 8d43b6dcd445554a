"""Where text for people goes: standard error, through rich."""

from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True)
