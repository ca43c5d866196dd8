"""The user's terminal or notebook: the status line, and the last line of a run."""
