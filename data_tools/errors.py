"""The one exception for mistakes a user can fix: the command line prints it and exits with 2."""


class UserError(Exception):
    """Wrong use or bad input. The message says what was given, what was expected and what to do."""
