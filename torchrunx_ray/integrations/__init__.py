"""Help for other libraries and command lines; each module is imported on its own."""
