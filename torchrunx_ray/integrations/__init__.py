"""Integrations with other libraries and command lines; import each module by itself."""
