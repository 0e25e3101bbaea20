"""The one exception for what the user can mend; the command line prints its message and exits with code 2."""


class InputError(ValueError):
    """Bad input. The message names the thing and the remedy."""
