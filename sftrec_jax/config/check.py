"""Values that a configuration cannot have."""

from sftrec_jax.errors import UserError


def require(condition: bool, message: str) -> None:
    """UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)
