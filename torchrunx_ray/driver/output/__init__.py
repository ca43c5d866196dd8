"""Output of workers and templates, and its path through the driver."""
