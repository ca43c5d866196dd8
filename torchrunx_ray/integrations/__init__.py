"""What other libraries and command lines need to work with a launch; each module is imported on its own."""
