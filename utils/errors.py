"""Errors that a user can cause and fix."""


class UserError(ValueError):
    """A mistake that the user can fix; its text says what was expected, what came and what to do."""
