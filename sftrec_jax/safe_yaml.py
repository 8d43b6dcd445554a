"""YAML whose size, depth and values are held in bounds; no tag makes anything but plain values."""

from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

DEEPEST = 50
"""Lists and mappings within one another."""
MOST = 100_000
"""Values of a document, those that an alias (`*name`) repeats counted each time: a few lines of aliases can stand for 10^9."""

BITS = 128
"""Of a whole number."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which counts."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._total = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise ComposerError(None, None, f"*{event.anchor} stands within itself", event.start_mark)
            self._count(self._sizes[id(node)], event)
            return node
        self._depth += 1
        if self._depth > DEEPEST:
            raise ComposerError(None, None, f"more than {DEEPEST} lists and mappings in one another", event.start_mark)
        before = self._total
        self._count(1, event)
        node = super().compose_node(parent, index)
        self._sizes[id(node)] = self._total - before
        self._depth -= 1
        return node

    def _count(self, values: int, event: Any) -> None:
        self._total += values
        if self._total > MOST:
            raise ComposerError(None, None, f"more than {MOST:,} values, aliases written out", event.start_mark)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if type(value) is int and value.bit_length() > BITS:
                raise ValueError(f"a number of more than {BITS} bits")
            return value
        except (ValueError, KeyError, AttributeError, TypeError) as error:  # such as the 99th of a month, or `!!int x`
            raise ConstructorError(None, None, f"not a value of its kind ({error})", node.start_mark) from None


def load_yaml(text: str) -> Any:
    """Plain values of one document. Raises yaml.YAMLError for everything else."""
    try:
        return yaml.load(text, _Loader)  # a safe loader
    except RecursionError:  # the scanner's, before values are counted
        raise yaml.YAMLError("lists and mappings are too deep in one another") from None
