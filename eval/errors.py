"""The one exception that the command line turns into a line on stderr."""


class EvalError(Exception):
    """Something the user can put right. The message is one line: what was found, what is accepted, what to do."""
