"""What a user is told in one line: wrong input, and a run that cannot go on."""


class InputError(ValueError):
    """Input that cannot be used: names the file, line or field, the value and the remedy. Nothing was done; exit status
    2.
    """


class RunError(Exception):
    """A run that cannot go on though its input could be used: names what happened and the remedy. What was done is
    kept; exit status 1.
    """
