"""The version, in one place: the package, its metadata and `zs3fast --version` read it here."""

__version__ = "0.2.0"
