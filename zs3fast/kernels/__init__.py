"""Triton kernels, one file an op.

In a wheel they lie beside this file. A checkout and an editable install keep them in the top-level kernels/ folder,
which is no package of its own: the bare name `kernels` belongs to somebody else.
"""

from __future__ import annotations

from pathlib import Path

_here = Path(__file__).resolve().parent
if not any(path.name != "__init__.py" for path in _here.glob("*.py")):
    __path__ = [str(_here.parents[1] / "kernels")]
