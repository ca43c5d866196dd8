"""Code that runs in the user's process: placement, runs, results."""
