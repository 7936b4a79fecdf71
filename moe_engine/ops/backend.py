"""Which kernels serve an op: loads the C++ extension, and forces the reference for debugging.

Loading `moe_engine._C` registers its kernels with PyTorch's dispatcher under the CPU key, where they take precedence
over the reference, which is registered for every device.
"""

import importlib
import importlib.util
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
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


def on_cuda(folder: str, **ops: Any) -> None:
    """Let each op run the function of its name in the folder's triton.py when a CUDA tensor arrives; fp64, which serves
    debugging, stays with the reference. triton.py is imported then, not before: without a GPU Triton is not touched."""
    for name, op in ops.items():

        def launch(*args: Any, name: str = name) -> Any:
            """The function of that name in triton.py, or in reference.py if any tensor is fp64, on the device of the
            first tensor."""
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            module = "reference" if any(x.dtype == torch.float64 for x in tensors) else "triton"
            with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
                return getattr(importlib.import_module(f"{folder}.{module}"), name)(*args)

        op.register_kernel("cuda", launch)


_KEYS = {"reference": torch._C.DispatchKey.CompositeExplicitAutograd, "triton": torch._C.DispatchKey.CUDA}


class _Forced(TorchDispatchMode):
    """Sends the ops of moe_engine to the kernel registered under one dispatch key, whatever the device."""

    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moe_engine":
            return func._op_dk(_KEYS[self.backend], *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def use(backend: str) -> AbstractContextManager:
    """Within `with use("reference"):` this thread's ops run their plain torch definition; within `use("triton")` the
    CUDA kernels, which on CPU tensors needs Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported). A
    backward pass that should use it too has to run inside the block."""
    if backend not in _KEYS:
        raise ValueError(f"found backend {backend!r}, expected one of {sorted(_KEYS)}; outside, the dispatcher chooses")
    return _Forced(backend)
