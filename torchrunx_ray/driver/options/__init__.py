"""Options of a launch, their checks, and their syntax on a command line."""
