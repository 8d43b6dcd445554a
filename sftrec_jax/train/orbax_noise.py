"""What Orbax and TensorStore print beside the exceptions that they raise: after a failed save each abandoned write.

The failure itself is told in a line by `checkpoint.py`. Orbax 0.12 waits for its writes in an event loop, which it closes at the
first that fails; those still under way then have nobody to report to.
"""

import logging
import sys
from types import TracebackType


def silence() -> None:
    """From now on; doing it twice changes nothing."""
    for name, keep in (("absl", _not_of_orbax), ("asyncio", _retrieved)):
        logger = logging.getLogger(name)
        if keep not in logger.filters:
            logger.addFilter(keep)
    if sys.excepthook is not _hook:
        _others.append(sys.excepthook)
        sys.excepthook = _hook


_others = []


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _retrieved(record: logging.LogRecord) -> bool:
    return "never retrieved" not in record.getMessage()


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, RuntimeError) and "Event loop is closed" in str(error):
        return
    _others[-1](kind, error, trace)
