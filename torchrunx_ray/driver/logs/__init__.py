"""What becomes of the output of workers and templates, in the driver."""
