"""RecBole's atomic files: tab-separated, no quoting, header fields of the form `name:type`.

Source: the "Atomic Files" page of RecBole's documentation.
"""

from collections.abc import Sequence

from sftrec_jax.errors import UserError

_TYPES = ("token", "token_seq", "float", "float_seq")


def strip_types(where: str, header: Sequence[str]) -> dict[str, str]:
    """Maps each header field to its bare name; UserError when a field carries no type."""
    names = {}
    for field in header:
        name, colon, kind = field.rpartition(":")
        if not colon or kind not in _TYPES:
            raise UserError(f"{where}: header field {field!r} has no type; write name:type with type one of {', '.join(_TYPES)}")
        names[field] = name
    if len(set(names.values())) < len(names):
        raise UserError(f"{where}: a column name stands twice in the header; rename one")
    return names
