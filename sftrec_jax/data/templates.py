"""Prompts as Jinja templates, rendered in a sandbox; the tokens of an item stand in them as `{{ item }}`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError, meta, nodes

from sftrec_jax.data.json_files import encodable
from sftrec_jax.data.sandbox import LARGEST, Sandbox
from sftrec_jax.errors import UserError
from sftrec_jax.items.encode import one_line

_OPEN, _CLOSE = "\ue000", "\ue001"
"""Around the number of an item while a template is rendered: characters for private use, which texts lose."""
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_LOST = str.maketrans("", "", _OPEN + _CLOSE)
UNSEEN = "unseen"
"""Templates named TASK.unseen*.j2 are asked with in evaluation and never in training."""
Parts = list[str | int]
"""Words, and items (by index) whose tokens stand between them."""
BUILT_IN = Path(__file__).parent / "templates"
BLOCKS = ("head", "number", "entry", "tail")
"""Parts of a prompt that holds a history."""


def _parse(path: Path, environment: Sandbox) -> nodes.Template:
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise UserError(f"{path}: a template of {size:,} bytes; write a prompt of less than {LARGEST:,}")
        tree = environment.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: the template cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the template as UTF-8") from None
    except TemplateSyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.message}") from None
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise UserError(
            f"{path}, line {node.lineno}: a template stands by itself; write here what it would take from another file"
        )
    return tree


def field_name(column: str) -> str:
    """A column's name as a template writes it: what is no letter, digit or underscore becomes an underscore."""
    name = re.sub(r"\W", "_", column)
    return f"_{name}" if name[:1].isdigit() else name


class _Part:
    """A template, or one block of it, with the fields that it names."""

    def __init__(self, where: str, tree: nodes.Template, environment: Sandbox, fields: tuple[str, ...], hint: str):
        self.where = where
        try:
            self.names = meta.find_undeclared_variables(tree)
            self._template, self._sandbox = environment.from_string(tree), environment
        except TemplateSyntaxError as error:
            raise UserError(f"{where}, line {error.lineno}: {error.message}") from None
        except (SyntaxError, RecursionError, MemoryError) as error:  # Python's own compiler
            raise UserError(f"{where}: {type(error).__name__}: {error}; write fewer blocks within one another") from None
        unknown = sorted(self.names - set(fields))
        if unknown:
            known = f"has {', '.join(fields)}" if fields else "has none"
            raise UserError(f"{where}: there is no field {unknown[0]!r}; it {known}{hint}")

    def render(self, values: Mapping[str, Any]) -> Parts:
        """Words and items in turn.

        Raises: UserError for what the sandbox refuses, and for a filter that fails.
        """
        self._sandbox.begin()
        try:
            text = self._template.render(values)
        except Exception as error:  # a filter may raise anything
            raise UserError(f"{self.where}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from None
        if not encodable(text):
            raise UserError(f"{self.where}: writes half of a surrogate pair, which is no text; take \\ud800 and the like out")
        parts = _MARK.split(text)
        if any(mark in part for part in parts for mark in (_OPEN, _CLOSE)):
            raise UserError(f"{self.where}: a filter cut an item's tokens; write {{{{ item }}}} without filters")
        return [int(part) if place % 2 else part for place, part in enumerate(parts)]


class PromptTemplate:
    """A template of one text. Raises UserError for a syntax error, and for fields that there are not."""

    def __init__(self, path: Path, fields: tuple[str, ...]):
        self.path = path
        environment = Sandbox()
        self._part = _Part(str(path), _parse(path, environment), environment, fields, "")

    @property
    def names(self) -> set[str]:
        """Fields that it uses."""
        return self._part.names

    def render(self, values: Mapping[str, Any]) -> Parts:
        """Words and items in turn."""
        return self._part.render(values)


class HistoryTemplate:
    """A prompt with a history, in blocks that are rendered apart: so a history reads the same whichever target follows.

    `head` stands before the history, `entry` is written for each item of it, behind `number` where there is one, and `tail`
    stands between history and target. A line break right behind the tag that opens a block is left out.

    Args:
        path: the template.
        fields: names that each block may use.
        hints: of a block what brings it more fields, for errors.

    Raises: UserError for a syntax error, text outside of blocks, an unknown block, a field that there is not, no `entry`.
    """

    def __init__(self, path: Path, fields: Mapping[str, tuple[str, ...]], hints: Mapping[str, str]):
        self.path = path
        environment = Sandbox()
        tree = _parse(path, environment)
        self._parts: dict[str, _Part] = {}
        for node in tree.body:
            if isinstance(node, nodes.Output) and all(_blank(child) for child in node.nodes):
                continue
            if not isinstance(node, nodes.Block):
                raise UserError(f"{path}, line {node.lineno}: stands outside of the blocks {', '.join(BLOCKS)}; put it in one")
            if node.name not in BLOCKS:
                raise UserError(f"{path}, line {node.lineno}: there is no block {node.name!r}; use {', '.join(BLOCKS)}")
            body = nodes.Template(_without_first_break(node.body), lineno=node.lineno)
            body.set_environment(environment)
            where = f"{path}, block {node.name}"
            self._parts[node.name] = _Part(where, body, environment, fields[node.name], hints.get(node.name, ""))
        if "entry" not in self._parts:
            raise UserError(f"{path}: has no block entry, which writes an item of the history; add {{% block entry %}}")

    def uses(self, block: str) -> set[str]:
        """Fields that a block names; none for a block that there is not."""
        return self._parts[block].names if block in self._parts else set()

    def render(self, block: str, values: Mapping[str, Any]) -> Parts:
        """Words and items in turn; [""] for a block that there is not."""
        return self._parts[block].render(values) if block in self._parts else [""]


def _blank(node: nodes.Node) -> bool:
    return isinstance(node, nodes.TemplateData) and not node.data.strip()


def _without_first_break(body: list[nodes.Node]) -> list[nodes.Node]:
    first = body[0] if body else None
    if isinstance(first, nodes.Output) and first.nodes and isinstance(first.nodes[0], nodes.TemplateData):
        first.nodes[0].data = first.nodes[0].data.removeprefix("\r").removeprefix("\n")
    return body


def plain(value: object) -> object:
    """A value for a template: texts on one line, numbers that are whole without a point, NaN and "" as None."""
    if isinstance(value, str):
        return one_line(value).translate(_LOST) or None
    if isinstance(value, float):
        return None if value != value else int(value) if value.is_integer() else value
    return value


def item_mark(item: int) -> str:
    """What stands for an item's tokens among the values of a template."""
    return f"{_OPEN}{item}{_CLOSE}"


def find_templates(task: str, folder: str | None, fields: tuple[str, ...]) -> tuple[list[PromptTemplate], list[PromptTemplate]]:
    """Those to train with and those for evaluation alone: `TASK.j2` and `TASK.*.j2` of `folder`, else the built-in one.

    Raises: UserError where all of a task are unseen.
    """
    own = [] if folder is None else sorted([*Path(folder).glob(f"{task}.j2"), *Path(folder).glob(f"{task}.*.j2")])
    unseen = [path for path in own if path.name.startswith(f"{task}.{UNSEEN}")]
    trained = [path for path in own if path not in unseen] or ([] if own else [BUILT_IN / f"{task}.j2"])
    if not trained:
        raise UserError(f"{folder}: {task} has unseen templates only; add {task}.j2 to train with")
    return [PromptTemplate(path, fields) for path in trained], [PromptTemplate(path, fields) for path in unseen]
