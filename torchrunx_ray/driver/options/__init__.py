"""Options of a launch, their checks, and their form on a command line."""
