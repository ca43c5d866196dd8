"""The names of torchrunx.utils."""
