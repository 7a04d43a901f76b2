"""Memory of large new tensors, asked for in large pages."""

import ctypes
import sys

from torch import Tensor

# bytes from which a tensor's memory is asked for in large pages, and bytes of one
LARGE, PAGE = 1 << 25, 1 << 21
MADV_HUGEPAGE = 14


def in_large_pages(*new: Tensor) -> None:
    """Asks Linux for pages of 2 MiB under large new tensors: their first touch costs a fifth, and is most of a copy."""
    if sys.platform != "linux":
        return
    for t in new:
        if t.device.type == "cpu" and t.nbytes >= LARGE:
            start = -t.data_ptr() % PAGE
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(t.data_ptr() + start),
                ctypes.c_size_t((t.nbytes - start) // PAGE * PAGE),
                MADV_HUGEPAGE,
            )
