"""The Jinja that prompts are written in: no way out of it, and bounds to the time and the memory that a template takes.

Jinja's sandbox keeps a template from Python's objects, not from `{% for %}` in `{% for %}` or `'x'|center(10 ** 9)`. So this one
has the filters and methods whose results are about as long as what they are given, and a budget for each rendering.
"""

from collections.abc import Callable, Iterable, Sized
from itertools import islice
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

LARGEST = 1_000_000
"""Most characters of a text, elements of a list; numbers are multiplied below it."""
WORK = 2_000_000
"""Of one rendering: characters and elements that filters, sums and loops go through, and `PASS` for each of these."""
PASS = 10
FILTERS_OF_TEXT = frozenset(
    "capitalize e escape float int lower replace string striptags title trim truncate upper urlencode wordcount".split()
)
"""What they are given is a text or a number."""
FILTERS_OF_LISTS = frozenset(
    "abs count d default dictsort first items join last length list map max min reject rejectattr reverse round select "
    "selectattr sort sum tojson unique".split()
)
METHODS = {
    str: frozenset(
        "capitalize casefold count endswith find index isalnum isalpha isdigit islower isnumeric isspace istitle isupper lower "
        "lstrip removeprefix removesuffix rfind rindex rstrip split splitlines startswith strip swapcase title upper".split()
    ),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"get", "items", "keys", "values"}),
}
"""By type, what a template may call of it."""
_COUNTED, _CALLED, _JOINED, _FLAT = "loop passes", "a call", "~", "a list"
"""Filters that the sandbox puts in; a template cannot write these names."""


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for one template."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=self._written)
        self.globals = {name: self.globals[name] for name in ("range", "namespace")}
        self.filters = {name: self._filter(FILTERS[name], name) for name in FILTERS_OF_TEXT | FILTERS_OF_LISTS}
        self.filters |= {"list": self._listed, _JOINED: self._joined, _FLAT: _flat}
        self.filters |= {_COUNTED: self._passes, _CALLED: self._called}
        self.begin()

    def begin(self) -> None:
        """A rendering begins."""
        self._work, self._text = WORK, LARGEST

    def parse(self, source: str, name: str | None = None, filename: str | None = None) -> nodes.Template:
        """Raises: TemplateSyntaxError, also for what is too deep or too large for the parser."""
        try:
            tree = super().parse(source, name, filename)
            for node in tree.find_all(nodes.For):
                if node.recursive:
                    raise TemplateSyntaxError("recursive loops are not allowed in prompts", node.lineno)
            return _Watched(self).visit(tree)
        except (RecursionError, MemoryError):
            raise TemplateSyntaxError("too many brackets, operators or blocks in one another", 1) from None
        except ValueError as error:
            raise TemplateSyntaxError(str(error), 1) from None

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = all(isinstance(value, int | float) for value in (left, right))
        if operator == "+" and not numbers:
            size = sum(len(value) for value in (left, right) if isinstance(value, Sized))
            self.spend(PASS + size, size)
        elif operator == "**" or not numbers or (operator == "*" and max(abs(left), abs(right)) >= LARGEST):
            raise SecurityError(f"{operator} of these values is not allowed; a template multiplies numbers below {LARGEST:,}")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of texts, numbers and lists the methods in `METHODS`; of loops and namespaces what Jinja allows."""
        for kind in (str, list, tuple, dict):
            if isinstance(obj, kind):
                return attr in METHODS[kind]
        return not isinstance(obj, int | float | bytes | range) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """`'...'.format` is no method that templates have."""
        return None

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # Jinja's own signature
        __self.spend(PASS + sum(len(value) for value in args if isinstance(value, str)))
        return super().call(__context, __obj, *args, **kwargs)

    def spend(self, work: int, size: int = 0) -> None:
        """Raises SecurityError where the budget of this rendering is used up, or something is larger than `LARGEST`."""
        self._work -= work
        if self._work < 0:
            raise SecurityError("loops and filters go through too much; write a shorter template")
        if size > LARGEST:
            raise SecurityError(f"something has more than {LARGEST:,} characters or elements; write a shorter template")

    def _written(self, value: Any) -> Any:
        if value is None:
            return ""
        if isinstance(value, list | tuple | dict):
            raise SecurityError(f"a {type(value).__name__} cannot be written; write what is in it with a loop or `| join(', ')`")
        if isinstance(value, str):
            self._text -= len(value)
            self.spend(len(value), LARGEST - self._text)
        return value

    def _filter(self, made: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A filter of Jinja's within bounds; what tells Jinja to pass it the context or environment is kept."""
        passed = int(hasattr(made, "jinja_pass_arg"))

        def bounded(*args: Any, **kwargs: Any) -> Any:
            given: Any = args[passed]
            if name in FILTERS_OF_TEXT and isinstance(given, list | tuple | dict):
                raise SecurityError(f"{name} of a {type(given).__name__}; it takes a text")
            if any(isinstance(value, int) and abs(value) >= LARGEST for value in (*args[passed + 1 :], *kwargs.values())):
                raise SecurityError(f"{name}: a number of {LARGEST:,} or more")
            size = len(given) if isinstance(given, Sized) else 0
            self.spend(PASS + size, size)
            if name == "replace":
                old, new = (str(value) for value in (*args[passed + 1 :], "", "")[:2])
                count = str(given).count(old)
                self.spend(count * len(new), count * len(new))
            if name == "join":
                args = (*args[:passed], values := self._listed(args[passed]), *args[passed + 1 :])
                between = str(kwargs.get("d", args[passed + 1] if len(args) > passed + 1 else ""))
                size = len(values) * len(between)
                self.spend(size, size)
                if kwargs.get("attribute") is None and len(args) < passed + 3:
                    size += sum(len(str(value)) for value in _flat(values))
                    self.spend(size, size)
            out = made(*args, **kwargs)
            if isinstance(out, str):
                self.spend(len(out), len(out))
            return out

        if passed:
            bounded.jinja_pass_arg = made.jinja_pass_arg  # type: ignore[attr-defined]
        return bounded

    def _listed(self, value: Iterable[Any]) -> list[Any]:
        out = list(islice(value, LARGEST + 1))
        self.spend(PASS + len(out), len(out))
        return out

    @pass_context  # of which it needs nothing, but which keeps the optimiser from calling it once for all
    def _called(self, _context: Any, value: str, length: int) -> str:
        """What a macro begins with; `length` as in `_passes`."""
        self._text -= length
        self.spend(PASS + length, LARGEST - self._text)
        return value

    @pass_context  # likewise
    def _passes(self, _context: Any, value: Iterable[Any], length: int) -> Any:
        """What a loop goes through, paid for before it begins; `length` characters of plain text are in its body."""
        given: Any = value if isinstance(value, Sized) else self._listed(value)
        self._text -= len(given) * length
        self.spend(len(given) * (PASS + length), LARGEST - self._text)
        return given

    def _joined(self, values: list[Any]) -> str:
        texts = [str(value) for value in _flat(values)]
        size = sum(map(len, texts))
        self.spend(PASS + size, size)
        return "".join(texts)


def _flat(values: Any) -> Any:
    """Raises SecurityError for lists in lists: a few lines could make them as deep as 2^99 elements."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, list | tuple | dict):
            raise SecurityError("a list within a list; templates make lists of texts and numbers")
    return values


class _Watched(NodeTransformer):
    """Puts counting filters around what loops go through, `~`, and lists as they are written down, and into macros."""

    def __init__(self, environment: Sandbox):
        self.environment = environment

    def _through(self, node: Any, name: str, *values: Any) -> nodes.Filter:
        made = nodes.Filter(node, name, [nodes.Const(value) for value in values], [], None, None, lineno=node.lineno)
        made.set_environment(self.environment)
        return made

    def visit_For(self, node: nodes.For) -> nodes.For:
        length = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = self._through(node.iter, _COUNTED, length)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        length = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        called = nodes.Output([self._through(nodes.Const("", lineno=node.lineno), _CALLED, length)], lineno=node.lineno)
        called.set_environment(self.environment)
        node.body.insert(0, called)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self._through(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def visit_List(self, node: nodes.List) -> nodes.Filter:
        self.generic_visit(node)
        return self._through(node, _FLAT)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        self.generic_visit(node)
        return self._through(node, _FLAT)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return node if node.ctx == "store" else self._through(node, _FLAT)
