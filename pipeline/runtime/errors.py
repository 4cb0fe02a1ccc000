"""What a user can mend, told apart from bugs."""


class UserError(Exception):
    """Something the user can mend. The text says what is, what was asked, what to do."""
