"""Runs in one Ray actor per driver, on the driver's node; grants the hosts their leases while the driver lives."""
