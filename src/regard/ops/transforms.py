"""What a function must know of the transforms that torch runs it under: torch.compile, torch.func, dual numbers."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def asks_values() -> bool:
    """Whether Python may look into a tensor here: neither while torch.compile traces nor inside torch.func."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func runs this (vmap, grad, jvp ..), or a forward-mode derivative is asked along one of them."""
    if torch.compiler.is_compiling():
        return False
    return not asks_values() or any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )
