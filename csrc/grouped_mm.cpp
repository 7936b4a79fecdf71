// grouped_mm on CPU. See moe_engine/ops/grouped_mm.
//
// Where oneDNN has small-matrix kernels (AVX-512, for bf16 with AVX512-BF16), the work is cut into tasks (expert, block of
// output columns or rows), which the threads take in order. A task packs its part of the weight, or of the rows whose
// products it sums, once; then the kernel runs over blocks of rows. Blocks are padded to a few fixed sizes, because oneDNN
// compiles a kernel for each new size and experts have a different number of rows at each step.
// Elsewhere each expert is one at::mm.
//
// A panel is packed in 32-bit words along the summed dim: one fp32, or two bf16 that are neighbours in it.
#include "simd.h"

#include <ATen/native/CPUBlas.h>

#include <atomic>
#include <type_traits>
#include <vector>

namespace moe_engine {
namespace {

using at::Tensor;
constexpr int64_t kPanel = 64;    // columns of a packed panel
constexpr int64_t kRows = 128;    // rows of one kernel call
constexpr int64_t kGroup = 512;   // rows that share a packed panel
constexpr int64_t kDepth = 1024;  // summed elements in a packed panel
constexpr int64_t kTall = 256;    // rows of a task of dw

typedef uint32_t Vec __attribute__((vector_size(64)));
typedef uint32_t Loose __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint32_t Word __attribute__((aligned(2), may_alias));

template <int step>
INLINE void exchange(Vec* v) {
  Vec low, high;
  for (int j = 0; j < 16; j++) {
    low[j] = j & step ? 16 + j - step : j;
    high[j] = j & step ? 16 + j : j + step;
  }
  for (int i = 0; i < 16; i++) {
    if (i & step) continue;
    Vec a = v[i], b = v[i + step];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + step] = __builtin_shuffle(a, b, high);
  }
}

// to[c][r] = from[r][c]
MULTIVERSION void transpose(const Word* from, int64_t ld_from, Word* to, int64_t ld_to, int64_t rows, int64_t columns) {
  int64_t full_rows = rows / 16 * 16, full_columns = columns / 16 * 16;
  for (int64_t r = 0; r < full_rows; r += 16) {
    for (int64_t c = 0; c < full_columns; c += 16) {
      Vec v[16];
      for (int i = 0; i < 16; i++) v[i] = *reinterpret_cast<const Loose*>(from + (r + i) * ld_from + c);
      exchange<8>(v);
      exchange<4>(v);
      exchange<2>(v);
      exchange<1>(v);
      for (int i = 0; i < 16; i++) *reinterpret_cast<Loose*>(to + (c + i) * ld_to + r) = v[i];
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = r < full_rows ? full_columns : 0; c < columns; c++) to[c * ld_to + r] = from[r * ld_from + c];
  }
}

// to[r/2][c] = the pair from[r][c], from[r+1][c]; rows up to padded are 0
MULTIVERSION void pack_rows(
    const uint16_t* from, int64_t ld_from, Word* to, int64_t ld_to, int64_t rows, int64_t padded, int64_t columns) {
  for (int64_t r = 0; r < padded; r += 2, to += ld_to, from += 2 * ld_from) {
    if (r + 1 < rows) {
      for (int64_t c = 0; c < columns; c++) to[c] = from[c] | static_cast<uint32_t>(from[c + ld_from]) << 16;
    } else if (r < rows) {
      for (int64_t c = 0; c < columns; c++) to[c] = from[c];
    } else {
      std::memset(to, 0, columns * 4);
    }
  }
}

void pack_rows(
    const float* from, int64_t ld_from, Word* to, int64_t ld_to, int64_t rows, int64_t padded, int64_t columns) {
  for (int64_t r = 0; r < rows; r++) std::memcpy(to + r * ld_to, from + r * ld_from, columns * 4);
  for (int64_t r = rows; r < padded; r++) std::memset(to + r * ld_to, 0, columns * 4);
}

MULTIVERSION void store(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = narrow(from[i]);
}

void store(const float* from, float* to, int64_t count) { std::memcpy(to, from, count * 4); }

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

void multiply(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldc, bool add, const void* a, const Word* b, float* c,
              const float*) {
  at::native::cpublas::brgemm(m, n, k, lda, kPanel, ldc, add, static_cast<const float*>(a),
                              reinterpret_cast<const float*>(b), c, false);
}

void multiply(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldc, bool add, const void* a, const Word* b, float* c,
              const uint16_t*) {
  at::native::cpublas::brgemm(m, n, k, lda, kPanel, ldc, add, static_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c, true);
}

// The rows of each expert, and what the tasks need to know of the operands.
struct Groups {
  std::vector<int64_t> start;
  explicit Groups(const Tensor& counts, int64_t rows) : start(1, 0) {
    Tensor contiguous = counts.contiguous();
    for (int64_t e = 0; e < counts.numel(); e++) start.push_back(start.back() + contiguous.const_data_ptr<int32_t>()[e]);
    TORCH_CHECK_VALUE(start.back() <= rows, "found counts that sum to ", start.back(), ", expected at most ", rows,
                      ", the number of rows");
  }
  int64_t experts() const { return start.size() - 1; }
  int64_t rows(int64_t e) const { return start[e + 1] - start[e]; }
};

// Scratch of one thread.
template <typename T>
struct Scratch {
  std::vector<uint32_t> a, b;
  std::vector<float> c;
};

// out[rows of e][columns c0 ..] = a[rows of e] @ b, where b = w[e].T (`across`) or w[e].
template <typename T>
struct Rows {
  const T *a, *w;
  T* out;
  int64_t total, depth, width;
  bool across;
  const Groups& groups;
  static constexpr int64_t per_word = 4 / sizeof(T);

  int64_t blocks() const { return (width + kPanel - 1) / kPanel; }

  void run(int64_t task, Scratch<T>& scratch) const {
    int64_t e = task / blocks(), c0 = task % blocks() * kPanel, columns = std::min(kPanel, width - c0);
    scratch.b.resize(kDepth / per_word * kPanel);
    scratch.c.resize(kGroup * kPanel);
    for (int64_t r0 = groups.start[e]; r0 < groups.start[e + 1]; r0 += kGroup) {
      int64_t rows = std::min(kGroup, groups.start[e + 1] - r0);
      for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
        int64_t k = std::min(kDepth, depth - k0);
        pack(e, c0, columns, k0, k, scratch.b.data());
        for (int64_t r = 0; r < rows; r += kRows) {
          int64_t padded = round_up(std::min(kRows, rows - r), 16);
          const T* block = a + (r0 + r) * depth + k0;
          int64_t ld = depth;
          if (r0 + r + padded > total) {
            scratch.a.assign(padded * k / per_word, 0);
            T* copy = reinterpret_cast<T*>(scratch.a.data());
            for (int64_t i = 0; i < rows - r; i++) std::memcpy(copy + i * k, block + i * depth, k * sizeof(T));
            block = copy;
            ld = k;
          }
          multiply(padded, columns, k, ld, kPanel, k0 > 0, block, scratch.b.data(), scratch.c.data() + r * kPanel, (T*)0);
        }
      }
      for (int64_t r = 0; r < rows; r++) store(scratch.c.data() + r * kPanel, out + (r0 + r) * width + c0, columns);
    }
  }

  void pack(int64_t e, int64_t c0, int64_t columns, int64_t k0, int64_t k, uint32_t* to) const {
    const T* from = w + e * depth * width;
    if (across) {
      transpose(reinterpret_cast<const Word*>(from + c0 * depth + k0), depth / per_word, to, kPanel, columns, k / per_word);
    } else {
      pack_rows(from + k0 * width + c0, width, to, kPanel, k, k, columns);
    }
  }
};

// dw[e][n0 ..][k] = sum over the rows r of e of grad[r][n0 ..] * x[r][k]
template <typename T>
struct Weight {
  const T *grad, *x;
  T* dw;
  int64_t n, k;
  const Groups& groups;
  static constexpr int64_t per_word = 4 / sizeof(T);

  int64_t blocks() const { return (n + kTall - 1) / kTall * ((k + kGroup - 1) / kGroup); }

  void run(int64_t task, Scratch<T>& scratch) const {
    int64_t e = task / blocks(), across = (k + kGroup - 1) / kGroup;
    int64_t n0 = task % blocks() / across * kTall, k0 = task % across * kGroup;
    int64_t tall = std::min(kTall, n - n0), wide = std::min(kGroup, k - k0);
    T* out = dw + (e * n + n0) * k + k0;
    if (groups.rows(e) == 0) {
      for (int64_t i = 0; i < tall; i++) std::memset(out + i * k, 0, wide * sizeof(T));
      return;
    }
    scratch.a.resize(2 * kTall * kTall / per_word);
    scratch.b.resize(kDepth / per_word * kPanel);
    scratch.c.resize(kTall * kGroup);
    uint32_t* pairs = scratch.a.data() + kTall * kTall / per_word;
    for (int64_t r0 = groups.start[e]; r0 < groups.start[e + 1]; r0 += kTall) {
      int64_t rows = std::min(kTall, groups.start[e + 1] - r0), padded = round_up(rows, 16 * per_word);
      pack_rows(grad + r0 * n + n0, n, pairs, tall, rows, padded, tall);
      transpose(pairs, tall, scratch.a.data(), padded / per_word, padded / per_word, tall);
      for (int64_t c = 0; c < wide; c += kPanel) {
        int64_t columns = std::min(kPanel, wide - c);
        pack_rows(x + r0 * k + k0 + c, k, scratch.b.data(), kPanel, rows, padded, columns);
        multiply(tall, columns, padded, padded, kGroup, r0 > groups.start[e], scratch.a.data(), scratch.b.data(),
                 scratch.c.data() + c, (T*)0);
      }
    }
    for (int64_t i = 0; i < tall; i++) store(scratch.c.data() + i * kGroup, out + i * k, wide);
  }
};

template <typename T, typename Work>
void share(const Work& work, int64_t experts) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    Scratch<T> scratch;
    for (int64_t task; (task = next++) < experts * work.blocks();) work.run(task, scratch);
    at::native::cpublas::brgemm_release(sizeof(T) == 2);
  });
}

Tensor rows_times_weight(const Tensor& a_, const Tensor& w_, const Tensor& counts, bool across) {
  Tensor a = a_.contiguous(), w = w_.contiguous();
  Groups groups(counts, a.size(0));
  int64_t width = across ? w.size(1) : w.size(2);
  Tensor out = empty({a.size(0), width}, a.options());
  out.slice(0, groups.start.back()).zero_();
  if (a.scalar_type() == at::kBFloat16) {
    using T = uint16_t;
    Rows<T> work{(const T*)a.const_data_ptr(), (const T*)w.const_data_ptr(), (T*)out.data_ptr(), a.size(0), a.size(1), width, across, groups};
    share<T>(work, groups.experts());
  } else {
    using T = float;
    Rows<T> work{(const T*)a.const_data_ptr(), (const T*)w.const_data_ptr(), (T*)out.data_ptr(), a.size(0), a.size(1), width, across, groups};
    share<T>(work, groups.experts());
  }
  return out;
}

Tensor grouped_mm(const Tensor& x, const Tensor& w, const Tensor& counts) { return rows_times_weight(x, w, counts, true); }

Tensor grouped_mm_dx(const Tensor& grad, const Tensor& w, const Tensor& counts) {
  return rows_times_weight(grad, w, counts, false);
}

Tensor grouped_mm_dw(const Tensor& grad_, const Tensor& x_, const Tensor& counts) {
  Tensor grad = grad_.contiguous(), x = x_.contiguous();
  Groups groups(counts, x.size(0));
  Tensor dw = empty({counts.numel(), grad.size(1), x.size(1)}, x.options());
  if (x.scalar_type() == at::kBFloat16) {
    using T = uint16_t;
    Weight<T> work{(const T*)grad.const_data_ptr(), (const T*)x.const_data_ptr(), (T*)dw.data_ptr(), grad.size(1), x.size(1), groups};
    share<T>(work, groups.experts());
  } else {
    using T = float;
    Weight<T> work{(const T*)grad.const_data_ptr(), (const T*)x.const_data_ptr(), (T*)dw.data_ptr(), grad.size(1), x.size(1), groups};
    share<T>(work, groups.experts());
  }
  return dw;
}

}  // namespace
}  // namespace moe_engine

TORCH_LIBRARY_IMPL(moe_engine, CPU, m) {
  m.impl("grouped_mm", moe_engine::grouped_mm);
  m.impl("grouped_mm_dx", moe_engine::grouped_mm_dx);
  m.impl("grouped_mm_dw", moe_engine::grouped_mm_dw);
}
