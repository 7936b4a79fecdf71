// sort_by_expert, permute and unpermute on CPU. See moe_engine/ops/permute. Each output row has one writer, which adds
// in the order of the slots.
#include "permute.h"

#include "simd.h"

#include <algorithm>
#include <vector>

namespace moe_engine {
namespace {

using at::Tensor;

// sum (+)= row
template <typename T, typename W>
INLINE void accumulate(const T* __restrict row, W* __restrict sum, int64_t count, bool first) {
  if (first) {
    for (int64_t i = 0; i < count; i++) sum[i] = widen(row[i]);
  } else {
    for (int64_t i = 0; i < count; i++) sum[i] += widen(row[i]);
  }
}

template <typename T, typename W>
INLINE void round_to(const W* __restrict sum, T* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; i++) narrow(sum[i], to[i]);
}

MULTIVERSION void add(const float* row, float* sum, int64_t n, bool first) { accumulate(row, sum, n, first); }
MULTIVERSION void add(const Bits* row, float* sum, int64_t n, bool first) { accumulate(row, sum, n, first); }
void add(const double* row, double* sum, int64_t n, bool first) { accumulate(row, sum, n, first); }

MULTIVERSION void finish(const float* sum, Bits* to, int64_t n) { round_to(sum, to, n); }
void finish(const float* sum, float* to, int64_t n) { round_to(sum, to, n); }
void finish(const double* sum, double* to, int64_t n) { round_to(sum, to, n); }

int64_t grain(int64_t per_item) { return 1 + 16384 / (per_item + 1); }

std::tuple<Tensor, Tensor, Tensor> sort_by_expert(const Tensor& index_, int64_t experts) {
  Tensor index = index_.contiguous(), counts = at::empty({experts}, index.options());
  Tensor assignment_of_row = at::empty({index.numel()}, index.options());
  Tensor row_of = at::empty(index.sizes(), index.options());
  int64_t total = index.numel();
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
    output<int32_t>(assignment_of_row)[row] = i;
  }
  return {counts, assignment_of_row, row_of};
}

Tensor permute(const Tensor& x_, const Tensor& assignment_of_row_, const Tensor& row_of) {
  Tensor x = x_.contiguous(), assignment_of_row = assignment_of_row_.contiguous();
  int64_t rows = assignment_of_row.size(0), bytes = x.size(1) * x.element_size(), k = row_of.size(1);
  Tensor out = empty({rows, x.size(1)}, x.options());
  const int32_t* assignment = data<int32_t>(assignment_of_row);
  at::parallel_for(0, rows, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      std::memcpy(output<char>(out) + r * bytes, data<char>(x) + assignment[r] / k * bytes, bytes);
  });
  return out;
}

}  // namespace

at::Tensor unpermute(const Tensor& rows_, const Tensor&, const Tensor& row_of_) {
  Tensor rows = rows_.contiguous(), row_of = row_of_.contiguous();
  int64_t tokens = row_of.size(0), k = row_of.size(1), width = rows.size(1);
  Tensor y = empty({tokens, width}, rows.options());
  by_dtype(rows.scalar_type(), "unpermute", [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, tokens, grain(k * width), [&](int64_t begin, int64_t end) {
      std::vector<Wide<T>> sum(width);
      for (int64_t t = begin; t < end; t++) {
        for (int64_t i = t * k; i < (t + 1) * k; i++) {
          add(data<T>(rows) + data<int32_t>(row_of)[i] * width, sum.data(), width, i == t * k);
        }
        finish(sum.data(), output<T>(y) + t * width, width);
      }
    });
  });
  return y;
}

}  // namespace moe_engine

TORCH_LIBRARY_IMPL(moe_engine, CPU, m) {
  m.impl("sort_by_expert", moe_engine::sort_by_expert);
  m.impl("permute", moe_engine::permute);
  m.impl("unpermute", moe_engine::unpermute);
}
