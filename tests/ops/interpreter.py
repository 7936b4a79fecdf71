"""What Triton's interpreter gets wrong about bf16, put right for the tests.

It keeps bf16 numbers as their 16 bits in uint16 and then multiplies, adds and compares the bits, and cuts fp32 off
where a GPU rounds to nearest even. `install` replaces three of its functions, before any kernel runs.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

ARITHMETIC = {np.add, np.subtract, np.multiply, np.divide, np.minimum, np.maximum}
COMPARISON = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def widen(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def install() -> None:
    convert, dot, binary = interpreter._convert_float, InterpreterBuilder.create_dot, InterpreterBuilder.binary_op

    def convert_float(x, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return narrow(x).reshape(x.shape)
        if (source, target) == (tl.bfloat16, tl.float32):
            return widen(x).reshape(x.shape).view(np.uint32)
        return convert(x, source, target, rounding)

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(widen(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    def binary_op(self, left, right, op):
        if left.dtype.scalar != tl.bfloat16 or op not in ARITHMETIC | COMPARISON:
            return binary(self, left, right, op)
        result = op(widen(left.data), widen(right.data))
        return TensorHandle(narrow(result), tl.bfloat16) if op in ARITHMETIC else TensorHandle(result, tl.int1)

    interpreter._convert_float = convert_float
    InterpreterBuilder.create_dot, InterpreterBuilder.binary_op = create_dot, binary_op
