"""Refusal to send a value that would arrive as something else."""


class UnfitError(TypeError):
    """A value is not made to travel. The message says what to do instead."""
