"""Packing of a function, its arguments and its environment for the cluster."""
