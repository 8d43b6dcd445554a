"""The one exception that a user's mistake raises: a single line that says what, where and what to do."""

LONGEST = 2_000
"""Characters of a line that are shown; of a longer one its two ends."""


def printable(text: str) -> str:
    """A line for the terminal, without what moves the cursor, hides or turns letters, and without the middle of a long line.

    Control characters, line breaks and marks of direction are written as escapes: messages quote files that may mean harm.
    """
    text = _cut(text)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return _cut(text)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 5 :]}"


class UserError(Exception):
    """Bad input, bad configuration or a missing resource. The command line prints it as one line, exit code 2."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class LeakError(UserError):
    """Findings of the leak linter that nobody accepted, one a line; the program leaves with exit code 3."""

    def __init__(self, message: str):
        Exception.__init__(self, "\n".join(printable(line) for line in message.split("\n")))
