"""Error for a value that would not arrive as the same value."""


class UnfitError(TypeError):
    """A value cannot be pickled faithfully. The message says what to do instead."""
