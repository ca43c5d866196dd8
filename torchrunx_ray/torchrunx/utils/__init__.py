"""As torchrunx names it."""
