"""Runs where the user is: placement, runs, results."""
