// SwiGLU of a row, compiled for several instruction sets in swiglu.cpp. T is fp32, fp64 or bf16; what arrives from a
// product, In, is T or not yet rounded, Wide<T>. All is computed in Wide<T> and rounded once.
#pragma once

#include "machine.h"

namespace moe_engine {

// y = s silu(gate) up
template <typename In, typename T>
void swiglu_row(const In* gate, const In* up, Wide<T> s, T* y, int64_t count);

// The gradients of gate and up where that of s silu(gate) up is `grad`; y = s silu(gate) up, unless it is null. Returns
// the sum of grad silu(gate) up, the gradient of s.
template <typename In, typename T>
Wide<T> swiglu_backward_row(const In* grad, const T* gate, const T* up, Wide<T> s, T* grad_gate, T* grad_up, T* y,
                            int64_t count);

}  // namespace moe_engine
