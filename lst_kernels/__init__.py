"""Kernels for models that group tokens into variable-length patches."""

from lst_kernels.layout import PatchLayout
from lst_kernels.ranges import KeyRanges

__all__ = ["KeyRanges", "PatchLayout"]
