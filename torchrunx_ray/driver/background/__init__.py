"""The background thread of all runs, and the log lines of the thread itself."""
