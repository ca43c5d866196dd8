"""Output on the user's terminal or notebook: the status line, and a run's last line."""
