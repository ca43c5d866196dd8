"""Agents on the hosts: kept warm between runs, and asked for events during a run."""
