"""The version of this package, also where it was not installed but shipped as a folder."""

__version__ = "0.1.0"
