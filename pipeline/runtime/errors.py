"""The exception for errors that a user can correct; every other exception is a bug."""


class UserError(Exception):
    """An error that the user can correct. Its text says what is, what was asked, and what to do."""
