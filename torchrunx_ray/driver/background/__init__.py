"""The thread in which every run lives, and the lines that it logs itself."""
