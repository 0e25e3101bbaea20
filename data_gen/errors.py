"""What ends a run that no input of the user's caused; finished shards are kept, and a new start goes on."""


class DiskFullError(Exception):
    """No space is left; the message names the folder."""
