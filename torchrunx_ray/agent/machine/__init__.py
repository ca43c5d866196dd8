"""The agent's questions to its machine: GPUs, memory, network, processes."""
