"""Hosts for a launch: their plan, the queue for them, and their reservation."""
