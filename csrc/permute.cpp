// sort_by_expert, permute and unpermute on CPU. See moe_engine/ops/permute. Each output row has one writer, which adds
// in the order of the slots.
#include "simd.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <vector>

namespace moe_engine {
namespace {

using at::Tensor;

// sum (+)= scale * row
template <typename T, typename W>
INLINE void accumulate(const T* __restrict row, W scale, W* __restrict sum, int64_t count, bool first) {
  if (first) {
    for (int64_t i = 0; i < count; i++) sum[i] = scale * widen(row[i]);
  } else {
    for (int64_t i = 0; i < count; i++) sum[i] += scale * widen(row[i]);
  }
}

// to = scale * row; returns row . other
template <typename T, typename W>
INLINE W scale_and_dot(const T* __restrict row, W scale, T* __restrict to, const T* __restrict other, int64_t count) {
  W dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < count; i++) {
    W value = widen(row[i]);
    dot += value * widen(other[i]);
    narrow(scale * value, to[i]);
  }
  return dot;
}

template <typename T, typename W>
INLINE void round_to(const W* __restrict sum, T* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; i++) narrow(sum[i], to[i]);
}

MULTIVERSION void add(const float* row, float w, float* sum, int64_t n, bool first) {
  accumulate(row, w, sum, n, first);
}
MULTIVERSION void add(const Bits* row, float w, float* sum, int64_t n, bool first) {
  accumulate(row, w, sum, n, first);
}
void add(const double* row, double w, double* sum, int64_t n, bool first) { accumulate(row, w, sum, n, first); }

MULTIVERSION void finish(const float* sum, Bits* to, int64_t n) { round_to(sum, to, n); }
void finish(const float* sum, float* to, int64_t n) { round_to(sum, to, n); }
void finish(const double* sum, double* to, int64_t n) { round_to(sum, to, n); }

MULTIVERSION float spread(const float* row, float w, float* to, const float* other, int64_t n) {
  return scale_and_dot(row, w, to, other, n);
}
MULTIVERSION float spread(const Bits* row, float w, Bits* to, const Bits* other, int64_t n) {
  return scale_and_dot(row, w, to, other, n);
}
double spread(const double* row, double w, double* to, const double* other, int64_t n) {
  return scale_and_dot(row, w, to, other, n);
}

int64_t grain(int64_t per_item) { return 1 + 16384 / (per_item + 1); }

std::tuple<Tensor, Tensor, Tensor> sort_by_expert(const Tensor& index_, int64_t experts) {
  Tensor index = index_.contiguous(), counts = at::empty({experts}, index.options());
  Tensor token_of_row = at::empty({index.numel()}, index.options()), row_of = at::empty(index.sizes(), index.options());
  int64_t total = index.numel(), k = index.size(1);
  const int32_t* expert = data<int32_t>(index);
  std::vector<int32_t> next(experts + 2, 0);
  for (int64_t i = 0; i < total; i++) {
    TORCH_CHECK_VALUE(expert[i] >= 0 && expert[i] <= experts, "found expert ", expert[i], ", expected 0 to ", experts);
    next[expert[i] + 1]++;
  }
  for (int64_t e = 0; e < experts; e++) {
    output<int32_t>(counts)[e] = next[e + 1];
    next[e + 1] += next[e];
  }
  for (int64_t i = 0; i < total; i++) {
    int32_t row = next[expert[i]]++;
    output<int32_t>(row_of)[i] = row;
    output<int32_t>(token_of_row)[row] = i / k;
  }
  return {counts, token_of_row, row_of};
}

Tensor permute(const Tensor& x_, const Tensor& token_of_row_, const Tensor&) {
  Tensor x = x_.contiguous(), token_of_row = token_of_row_.contiguous();
  int64_t rows = token_of_row.size(0), bytes = x.size(1) * x.element_size();
  Tensor out = empty({rows, x.size(1)}, x.options());
  const int32_t* token = data<int32_t>(token_of_row);
  at::parallel_for(0, rows, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      std::memcpy(output<char>(out) + r * bytes, data<char>(x) + token[r] * bytes, bytes);
  });
  return out;
}

// y[t] = sum_k weight[t][k] * rows[row_of[t][k]]; an undefined weight is 1, a weight of 0 skips its row
Tensor gather_sum(const Tensor& rows_, const Tensor& weight, const Tensor& row_of_) {
  Tensor rows = rows_.contiguous(), row_of = row_of_.contiguous();
  int64_t tokens = row_of.size(0), k = row_of.size(1), width = rows.size(1);
  Tensor y = empty({tokens, width}, rows.options());
  by_dtype(rows.scalar_type(), "unpermute", [&](auto zero) {
    using T = decltype(zero);
    const Wide<T>* scale = weight.defined() ? data<Wide<T>>(weight) : nullptr;
    at::parallel_for(0, tokens, grain(k * width), [&](int64_t begin, int64_t end) {
      std::vector<Wide<T>> sum(width);
      for (int64_t t = begin; t < end; t++) {
        bool first = true;
        for (int64_t i = t * k; i < (t + 1) * k; i++) {
          Wide<T> w = scale ? scale[i] : 1;
          if (w == 0) continue;
          add(data<T>(rows) + data<int32_t>(row_of)[i] * width, w, sum.data(), width, first);
          first = false;
        }
        if (first) std::fill(sum.begin(), sum.end(), 0);
        finish(sum.data(), output<T>(y) + t * width, width);
      }
    });
  });
  return y;
}

Tensor permute_backward(const Tensor& grad_rows, const Tensor& row_of) {
  return gather_sum(grad_rows, Tensor(), row_of);
}

at::ScalarType wide(const Tensor& tensor) { return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor unpermute(const Tensor& rows, const Tensor& weight, const Tensor& row_of) {
  return gather_sum(rows, weight.to(wide(rows)).contiguous(), row_of);
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad_, const Tensor& rows_, const Tensor& weight_,
                                              const Tensor& row_of_) {
  Tensor grad = grad_.contiguous(), rows = rows_.contiguous(), row_of = row_of_.contiguous();
  Tensor weight = weight_.to(wide(rows)).contiguous();
  int64_t tokens = row_of.size(0), k = row_of.size(1), width = rows.size(1);
  Tensor grad_rows = empty(rows.sizes(), rows.options()), grad_weight = at::empty_like(weight);
  by_dtype(rows.scalar_type(), "unpermute_backward", [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, tokens, grain(2 * k * width), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * k; i < end * k; i++) {
        Wide<T> w = data<Wide<T>>(weight)[i];
        int64_t at = data<int32_t>(row_of)[i] * width;
        T* to = output<T>(grad_rows) + at;
        Wide<T>* dot = output<Wide<T>>(grad_weight) + i;
        *dot = 0;
        if (w == 0)
          std::memset(to, 0, width * sizeof(T));
        else
          *dot = spread(data<T>(grad) + i / k * width, w, to, data<T>(rows) + at, width);
      }
    });
  });
  return {grad_rows, grad_weight.to(weight_.scalar_type())};
}

}  // namespace
}  // namespace moe_engine

TORCH_LIBRARY_IMPL(moe_engine, CPU, m) {
  m.impl("sort_by_expert", moe_engine::sort_by_expert);
  m.impl("permute", moe_engine::permute);
  m.impl("permute_backward", moe_engine::permute_backward);
  m.impl("unpermute", moe_engine::unpermute);
  m.impl("unpermute_backward", moe_engine::unpermute_backward);
}
