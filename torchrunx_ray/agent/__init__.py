"""Runs once per host, inside the Ray actor; never imports torch."""
