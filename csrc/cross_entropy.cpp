// cross_entropy_stats and cross_entropy_grad on CPU. See moe_engine/ops/cross_entropy.
#include "simd.h"

#include <limits>

namespace moe_engine {
namespace {

using at::Tensor;

template <typename T, typename W>
INLINE void reduce(const T* __restrict row, int64_t count, W* largest, W* total) {
  W most = -std::numeric_limits<W>::infinity(), sum = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; i++) most = widen(row[i]) > most ? widen(row[i]) : most;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; i++) sum += fast_exp(widen(row[i]) - most);
  *largest = most;
  *total = sum;
}

template <typename T, typename W>
INLINE void scaled_softmax(const T* __restrict row, W lse, W grad, T* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; i++) narrow(grad * fast_exp(widen(row[i]) - lse), out[i]);
}

MULTIVERSION void reduce_row(const float* row, int64_t n, float* largest, float* total) {
  reduce(row, n, largest, total);
}
MULTIVERSION void reduce_row(const Bits* row, int64_t n, float* largest, float* total) {
  reduce(row, n, largest, total);
}
void reduce_row(const double* row, int64_t n, double* largest, double* total) { reduce(row, n, largest, total); }

MULTIVERSION void softmax_row(const float* row, float lse, float grad, float* out, int64_t n) {
  scaled_softmax(row, lse, grad, out, n);
}
MULTIVERSION void softmax_row(const Bits* row, float lse, float grad, Bits* out, int64_t n) {
  scaled_softmax(row, lse, grad, out, n);
}
void softmax_row(const double* row, double lse, double grad, double* out, int64_t n) {
  scaled_softmax(row, lse, grad, out, n);
}

constexpr int64_t kIgnored = -100;

int64_t grain(int64_t vocabulary) { return 1 + 16384 / (vocabulary + 1); }

std::tuple<Tensor, Tensor, Tensor> cross_entropy_stats(const Tensor& logits_, const Tensor& label_, int64_t first_id) {
  Tensor logits = logits_.contiguous(), label = label_.contiguous();
  int64_t tokens = logits.size(0), vocabulary = logits.size(1);
  auto options = logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  Tensor largest = at::empty({tokens}, options), total = at::empty({tokens}, options),
         target = at::empty({tokens}, options);
  by_dtype(logits.scalar_type(), "cross_entropy_stats", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    at::parallel_for(0, tokens, grain(vocabulary), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const T* row = data<T>(logits) + t * vocabulary;
        reduce_row(row, vocabulary, output<W>(largest) + t, output<W>(total) + t);
        int64_t id = data<int64_t>(label)[t], column = id - first_id;
        bool here = id != kIgnored && column >= 0 && column < vocabulary;
        output<W>(target)[t] = here ? widen(row[column]) : 0;
      }
    });
  });
  return {largest, total, target};
}

Tensor cross_entropy_grad(const Tensor& logits_, const Tensor& label_, int64_t first_id, const Tensor& lse_,
                          const Tensor& grad_) {
  Tensor logits = logits_.contiguous(), label = label_.contiguous();
  int64_t tokens = logits.size(0), vocabulary = logits.size(1);
  auto dtype = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor lse = lse_.to(dtype).contiguous(), grad = grad_.to(dtype).contiguous(),
         out = empty(logits.sizes(), logits.options());
  by_dtype(logits.scalar_type(), "cross_entropy_grad", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    at::parallel_for(0, tokens, grain(vocabulary), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const T* row = data<T>(logits) + t * vocabulary;
        T* to = output<T>(out) + t * vocabulary;
        int64_t id = data<int64_t>(label)[t], column = id - first_id;
        if (id == kIgnored) {
          std::memset(to, 0, vocabulary * sizeof(T));
          continue;
        }
        W scale = data<W>(grad)[t], shift = data<W>(lse)[t];
        softmax_row(row, shift, scale, to, vocabulary);
        if (column >= 0 && column < vocabulary) narrow(scale * (fast_exp(widen(row[column]) - shift) - 1), to[column]);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace moe_engine

TORCH_LIBRARY_IMPL(moe_engine, CPU, m) {
  m.impl("cross_entropy_stats", moe_engine::cross_entropy_stats);
  m.impl("cross_entropy_grad", moe_engine::cross_entropy_grad);
}
