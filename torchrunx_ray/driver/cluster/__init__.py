"""The driver's membership in a Ray cluster, and its questions to Ray."""
