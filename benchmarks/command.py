"""What every benchmark does with an error of its user."""

import sys
from collections.abc import Callable

from sftrec_jax.errors import UserError


def run_main(main: Callable[[], None]) -> None:
    """Runs `main`; a UserError is one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
