"""The errors of the package: one base to catch them all by, and what each is besides.

A caller's mistake stays a ValueError or TypeError and a missing file a FileNotFoundError, as everywhere in Python;
the classes here say more where there is more to say.
"""

from __future__ import annotations


class Zs3fastError(Exception):
    """Base of the errors that zs3fast itself defines."""


class FileFormatError(Zs3fastError, ValueError):
    """A file that is damaged, or not of the kind that was asked for; the message names it."""


class ImageError(FileFormatError):
    """An image or a mask that cannot be read."""


class CheckpointError(FileFormatError):
    """A weight file that cannot be read, or whose tensors are not what the model needs."""


class FileLimitError(FileFormatError):
    """A file that would unpack to more memory than a file may; the message says how to lift the limit."""
