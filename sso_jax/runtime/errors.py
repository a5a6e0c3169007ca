"""Errors that the commands report in one line: invalid input, and a run that cannot continue."""


class InputError(ValueError):
    """Invalid input. The message names the file, line or field, the value and the remedy.

    Raised before anything is done with the input; the command exits with status 2.
    """


class RunError(Exception):
    """A run with valid input cannot continue. The message names the cause and the remedy.

    Finished work is kept; the command exits with status 1.
    """
