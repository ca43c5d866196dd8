"""Pickling of the script's classes and functions by value, with the parts that cloudpickle would lose."""
