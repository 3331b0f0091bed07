"""Images on their way to the models: loaders, transforms and the scripts that make shards."""

from utils.errors import UserError


class DataError(UserError):
    """Images, labels or shards that are not what was expected; the text says which and what to do."""
