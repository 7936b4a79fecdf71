"""Definition of grouped_mm in plain torch. Copies counts to the host, once per call."""

import torch
from torch import Tensor


def grouped_mm(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """y[rows of e] = x[rows of e] @ w[e].T; rows past sum(counts) are 0."""
    return _by_expert(x, w.transpose(1, 2), counts)


def grouped_mm_dx(grad: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """dx[rows of e] = grad[rows of e] @ w[e]; rows past sum(counts) are 0."""
    return _by_expert(grad, w, counts)


def grouped_mm_dw(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """dw[e] = grad[rows of e].T @ x[rows of e], [E, N, K]; 0 for an expert without rows."""
    sizes = counts.tolist()
    blocks = zip(grad[: sum(sizes)].split(sizes), x[: sum(sizes)].split(sizes), strict=True)
    return torch.stack([g_e.T @ x_e for g_e, x_e in blocks])


def _by_expert(a: Tensor, b_EKN: Tensor, counts: Tensor) -> Tensor:
    sizes, out = counts.tolist(), a.new_zeros(a.shape[0], b_EKN.shape[2])
    start = 0
    for b, size in zip(b_EKN.unbind(0), sizes, strict=True):
        out[start : start + size] = a[start : start + size] @ b
        start += size
    return out
