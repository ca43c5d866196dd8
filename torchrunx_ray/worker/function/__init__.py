"""The user's function in its worker: its group, its streams, its outcome."""
