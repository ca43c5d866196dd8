"""Execution of a run on its hosts, from the start of its workers to their end."""
