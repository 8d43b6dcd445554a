"""The one exception that a user's mistake raises: a single line that says what, where and what to do."""


class UserError(Exception):
    """Bad input, bad configuration or a missing resource. The command line prints it as one line, exit code 2."""


class LeakError(UserError):
    """Findings of the leak linter that nobody accepted, one a line; the program leaves with exit code 3."""
