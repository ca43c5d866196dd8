"""Planning, queueing and reservation of a launch's hosts."""
