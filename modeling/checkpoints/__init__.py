"""Checkpoints: where they are, how they are read and fitted into a model, and how they are written."""

from utils.errors import UserError


class WeightsError(UserError):
    """Weights that cannot be found, read or fitted into the model; the text says which, why and what to do."""
