"""Which kernels serve an op: loads the C++ extension, and forces the reference for debugging.

Loading `moe_engine._C` registers its kernels with PyTorch's dispatcher under the CPU key, where they take precedence
over the reference, which is registered for every device.
"""

import importlib.util
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def _load_extension() -> bool:
    """Load the C++ kernels; False if they were not built, with a warning if they were but do not load."""
    spec = importlib.util.find_spec("moe_engine._C")
    if spec is None or spec.origin is None:
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        warnings.warn(
            f"the C++ kernels do not load with torch {torch.__version__} ({error}); the slower reference kernels are "
            "used. Build them again: python setup.py build_ext --inplace",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


compiled: bool = _load_extension()
"""True if the C++ kernels serve CPU tensors."""


class _Reference(TorchDispatchMode):
    """Sends the ops of moe_engine to the kernel registered for every device, which is the reference."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moe_engine":
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def use(backend: str) -> AbstractContextManager:
    """Within `with use("reference"):` this thread's ops run their plain torch definition. A backward pass that should
    use it too has to run inside the block."""
    if backend != "reference":
        raise ValueError(f'found backend {backend!r}, expected "reference": outside the block the dispatcher chooses')
    return _Reference()
