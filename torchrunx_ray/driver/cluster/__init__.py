"""The driver's membership in a Ray cluster, and what it asks of Ray."""
