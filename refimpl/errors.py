"""The errors that a person is meant to read: one line that says what is wrong and what to do."""


class UsageError(Exception):
    """Wrong input: an unknown recipe, a file too short, a folder in use. Scripts print it and exit with 2."""


class TrainingStopped(Exception):
    """A run that cannot go on: a loss that became NaN, a loss scale that collapsed. Scripts print it and exit with 1."""
