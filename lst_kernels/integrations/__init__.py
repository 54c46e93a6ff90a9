"""The kernels inside other projects' models.

    >>> from lst_kernels.integrations import apply_lst_kernels_to_blt
    >>> with apply_lst_kernels_to_blt():           # transformers' BLT, every instance
    ...     pass
"""

from lst_kernels.integrations.blt import Applied, apply_lst_kernels_to_blt

__all__ = ["Applied", "apply_lst_kernels_to_blt"]
