"""Prompts as Jinja templates, rendered in a sandbox; the tokens of an item stand in them as `{{ item }}`."""

from collections.abc import Mapping
from pathlib import Path

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sftrec_jax.errors import UserError

ITEM = "\ue000"
"""Stands for the item's tokens while a template is rendered: a character for private use, which texts lose."""
BUILT_IN = Path(__file__).parent / "templates"


class PromptTemplate:
    """One template. Raises UserError for a syntax error, and for fields that there are not."""

    def __init__(self, path: Path, fields: tuple[str, ...]):
        self.path, self.fields = path, fields
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: the template cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: byte {error.start} is not UTF-8; save the template as UTF-8") from None
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
        try:
            unknown = sorted(meta.find_undeclared_variables(environment.parse(text)) - set(fields))
            self._template = environment.from_string(text)
        except TemplateSyntaxError as error:
            raise UserError(f"{path}, line {error.lineno}: {error.message}") from None
        if unknown:
            raise UserError(f"{path}: there is no field {unknown[0]!r}; a template of this task has {', '.join(fields)}")

    def pieces(self, values: Mapping[str, str]) -> list[str]:
        """Texts between which the item's tokens stand: one more than `{{ item }}` occurs.

        Raises: UserError for what the sandbox refuses, and for a filter that fails.
        """
        clean = {name: value.replace(ITEM, "") for name, value in values.items()} | {"item": ITEM}
        try:
            return self._template.render(clean).split(ITEM)
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"{self.path}: {type(error).__name__}: {str(error).splitlines()[0]}") from None


def find_template(task: str, folder: str | None, fields: tuple[str, ...]) -> PromptTemplate:
    """`TASK.j2` in `folder`, else the built-in one."""
    own = None if folder is None else Path(folder) / f"{task}.j2"
    return PromptTemplate(own if own is not None and own.exists() else BUILT_IN / f"{task}.j2", fields)
