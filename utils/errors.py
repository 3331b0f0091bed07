"""Errors that a user can cause and fix."""


class UserError(ValueError):
    """A mistake that the user can mend; its text says what was expected, what came and what to do."""
