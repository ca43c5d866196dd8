"""The names of torchrunx.integrations."""
