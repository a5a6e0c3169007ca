"""The one error that is the user's to mend: a script prints it as one line and exits with status 2."""


class InputError(ValueError):
    """A value, file or field that cannot be used; the message names it, what is wrong with it, and the remedy."""
