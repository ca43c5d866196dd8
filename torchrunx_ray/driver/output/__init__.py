"""Output of workers and templates, on its way through the driver."""
