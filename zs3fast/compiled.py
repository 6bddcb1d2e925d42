"""CompiledModel's former address; it lives in `zs3fast.inference.compiled`."""

from zs3fast.inference.compiled import CompiledModel

__all__ = ["CompiledModel"]
