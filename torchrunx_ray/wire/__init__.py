"""Messages and values that pass between driver, agent and worker; imports neither ray nor torch."""
