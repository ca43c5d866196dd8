"""Names of torchrunx.utils."""
