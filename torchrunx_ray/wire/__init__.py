"""Everything that crosses between driver, agent and worker; imports neither ray nor torch."""
