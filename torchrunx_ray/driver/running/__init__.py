"""One run on its hosts, from the first worker to the last."""
