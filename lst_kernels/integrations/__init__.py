"""The kernels inside other projects' models.

Every instance of transformers' BLT, for as long as the block lasts:

    >>> from lst_kernels.integrations import apply_lst_kernels_to_blt
    >>> with apply_lst_kernels_to_blt():
    ...     pass
"""

from lst_kernels.integrations.blt import Applied, apply_lst_kernels_to_blt

__all__ = ["Applied", "apply_lst_kernels_to_blt"]
