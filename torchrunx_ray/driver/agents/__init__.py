"""Agents on the hosts. The driver keeps them warm between runs, and polls their events during a run."""
