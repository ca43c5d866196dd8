"""The command `torchrunx-ray`, in the user's process."""
