// swiglu on CPU. See moe_engine/ops/swiglu.
#include "simd.h"

namespace moe_engine {
namespace {

using at::Tensor;

template <typename T>
INLINE void activate(const T* __restrict gate, const T* __restrict up, T* __restrict y, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    Wide<T> g = widen(gate[i]);
    narrow(g / (1 + fast_exp(-g)) * widen(up[i]), y[i]);
  }
}

template <typename T>
INLINE void differentiate(const T* __restrict grad, const T* __restrict gate, const T* __restrict up,
                          T* __restrict grad_gate, T* __restrict grad_up, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    Wide<T> d = widen(grad[i]), g = widen(gate[i]), sigmoid = 1 / (1 + fast_exp(-g));
    narrow(d * widen(up[i]) * sigmoid * (1 + g * (1 - sigmoid)), grad_gate[i]);
    narrow(d * g * sigmoid, grad_up[i]);
  }
}

MULTIVERSION void forward_row(const float* gate_up, float* y, int64_t width) {
  activate(gate_up, gate_up + width, y, width);
}
MULTIVERSION void forward_row(const Bits* gate_up, Bits* y, int64_t width) {
  activate(gate_up, gate_up + width, y, width);
}
void forward_row(const double* gate_up, double* y, int64_t width) { activate(gate_up, gate_up + width, y, width); }

MULTIVERSION void backward_row(const float* grad, const float* gate_up, float* out, int64_t width) {
  differentiate(grad, gate_up, gate_up + width, out, out + width, width);
}
MULTIVERSION void backward_row(const Bits* grad, const Bits* gate_up, Bits* out, int64_t width) {
  differentiate(grad, gate_up, gate_up + width, out, out + width, width);
}
void backward_row(const double* grad, const double* gate_up, double* out, int64_t width) {
  differentiate(grad, gate_up, gate_up + width, out, out + width, width);
}

Tensor swiglu(const Tensor& gate_up_) {
  Tensor gate_up = gate_up_.contiguous();
  int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  Tensor y = empty({rows, width}, gate_up.options());
  by_dtype(gate_up.scalar_type(), "swiglu", [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, rows, 1 + 8192 / (width + 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        forward_row(data<T>(gate_up) + 2 * r * width, output<T>(y) + r * width, width);
    });
  });
  return y;
}

Tensor swiglu_backward(const Tensor& grad_, const Tensor& gate_up_) {
  Tensor grad = grad_.contiguous(), gate_up = gate_up_.contiguous();
  int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  Tensor out = empty(gate_up.sizes(), gate_up.options());
  by_dtype(gate_up.scalar_type(), "swiglu_backward", [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, rows, 1 + 4096 / (width + 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        backward_row(data<T>(grad) + r * width, data<T>(gate_up) + 2 * r * width, output<T>(out) + 2 * r * width,
                     width);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace moe_engine

TORCH_LIBRARY_IMPL(moe_engine, CPU, m) {
  m.impl("swiglu", moe_engine::swiglu);
  m.impl("swiglu_backward", moe_engine::swiglu_backward);
}
