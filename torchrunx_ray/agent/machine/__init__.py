"""The agent's questions to its machine: memory, network, processes."""
