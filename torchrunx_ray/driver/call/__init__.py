"""The function with its arguments, and the environment that it needs, on their way into the cluster."""
