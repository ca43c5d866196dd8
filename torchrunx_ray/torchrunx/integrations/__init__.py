"""Names of torchrunx.integrations."""
