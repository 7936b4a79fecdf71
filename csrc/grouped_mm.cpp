// grouped_mm on CPU. See moe_engine/ops/grouped_mm.
//
// In general each expert is one at::mm. For bf16 where oneDNN has kernels for small matrices (AVX512-BF16, AMX), what
// limits at::mm is the copying around them, so we call the kernels ourselves. The threads take tasks (expert, block of
// the weight) in order; a weight is read once, activations are packed once.
//
//   forward  y.T = w x.T     w is read where it lies, x.T is packed, y.T is turned on the way out
//   dx       dx = dy w       dy is read where it lies, the task packs its columns of w
//   dw       dw = dy.T x     both are packed
//
// An expert's rows are cut into blocks padded to a few fixed sizes: oneDNN compiles a kernel for each new size, and
// experts have a different number of rows at each step. A panel, the kernel's right operand, is packed in words: two
// numbers that are neighbours in the summed dim.
#include "simd.h"

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

namespace moe_engine {
namespace {

using at::Tensor;
constexpr int64_t kPanel = 64;    // columns of a panel
constexpr int64_t kDepth = 1024;  // summed elements of one kernel call
constexpr int64_t kTall = 128;    // rows of one kernel call
constexpr int64_t kWide = 256;    // columns of a task of dx
constexpr int64_t kFlat = 64;     // rows of a task of dw
constexpr int64_t kSpan = 2048;   // columns that a task of dw holds in fp32
constexpr int64_t kChunk = 256;   // rows of an expert that dw sums in one kernel call

typedef uint32_t Vector __attribute__((vector_size(64)));
typedef uint32_t Loose __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint32_t Word __attribute__((aligned(2), may_alias));

// Exchange the off-diagonal step x step blocks of a 16 x 16 matrix of 2 step x 2 step blocks.
template <int step>
INLINE void exchange(Vector* v) {
  Vector low, high;
  for (int j = 0; j < 16; j++) {
    low[j] = j & step ? 16 + j - step : j;
    high[j] = j & step ? 16 + j : j + step;
  }
  for (int i = 0; i < 16; i++) {
    if (i & step) continue;
    Vector a = v[i], b = v[i + step];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + step] = __builtin_shuffle(a, b, high);
  }
}

// to[c][r] = from[r][c]
MULTIVERSION void transpose(const Word* from, int64_t ld_from, Word* to, int64_t ld_to, int64_t rows, int64_t columns) {
  int64_t full_rows = rows / 16 * 16, full_columns = columns / 16 * 16;
  for (int64_t r = 0; r < full_rows; r += 16) {
    for (int64_t c = 0; c < full_columns; c += 16) {
      Vector v[16];
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

// to[c] = the pair first[c], second[c]
MULTIVERSION void pair_up(const Bits* first, const Bits* second, Word* to, int64_t count) {
  for (int64_t c = 0; c < count; c++) to[c] = first[c] | static_cast<uint32_t>(second[c]) << 16;
}

// to[r/2][c] = the pair from[r][c], from[r+1][c]; rows from `rows` to `padded`, even, are 0
void pack_rows(const Bits* from, int64_t ld_from, Word* to, int64_t ld_to, int64_t rows, int64_t padded,
               int64_t columns) {
  for (int64_t r = 0; r < padded; r += 2, to += ld_to, from += 2 * ld_from) {
    if (r + 1 < rows) {
      pair_up(from, from + ld_from, to, columns);
    } else if (r < rows) {
      for (int64_t c = 0; c < columns; c++) to[c] = from[c];
    } else {
      std::memset(to, 0, columns * sizeof(uint32_t));
    }
  }
}

MULTIVERSION void store(const float* from, Bits* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) narrow(from[i], to[i]);
}

// Ask for a block of memory that the kernel reads in an order that the processor does not foresee.
void prefetch(const Bits* from, int64_t ld, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; c < columns; c += 32) __builtin_prefetch(from + r * ld + c, 0, 2);
  }
}

// c[m][n] (+)= a[m][k] @ panel[k/2][n]
void multiply(int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, const uint32_t* panel, int64_t ld_panel,
              float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ld_panel, ldc, add, static_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(panel), c, true);
}

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }
int64_t round_up(int64_t size, int64_t multiple) { return blocks_of(size, multiple) * multiple; }

template <typename T>
std::unique_ptr<T[]> buffer(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

// Consecutive rows of one expert, padded to a fixed size; `offset` counts the padded rows before them.
struct Block {
  int64_t row, rows, padded, offset;
};

// Where each expert's rows lie, and their blocks of at most `largest` rows, padded to a multiple of `multiple`.
struct Groups {
  std::vector<int64_t> start{0}, first_block{0};
  std::vector<Block> blocks;
  int64_t padded = 0;

  Groups(const Tensor& counts_, int64_t rows, int64_t largest, int64_t multiple) {
    Tensor counts = counts_.contiguous();
    for (int64_t e = 0; e < counts.numel(); e++) {
      TORCH_CHECK_VALUE(data<int32_t>(counts)[e] >= 0, "found a negative count of rows, expected 0 or more");
      start.push_back(start.back() + data<int32_t>(counts)[e]);
      for (int64_t row = start[e]; row < start[e + 1]; row += largest) {
        int64_t size = std::min(largest, start[e + 1] - row);
        blocks.push_back({row, size, round_up(size, multiple), padded});
        padded += round_up(size, multiple);
      }
      first_block.push_back(blocks.size());
    }
    TORCH_CHECK_VALUE(start.back() <= rows, "found counts that sum to ", start.back(), ", expected at most ", rows,
                      ", the number of rows");
  }
  int64_t experts() const { return first_block.size() - 1; }
  int64_t rows(int64_t e) const { return start[e + 1] - start[e]; }
};

// Run task(i) for each i < count; a thread takes the next one when it is done.
template <typename Task>
void share(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < count;) task(i);
    at::native::cpublas::brgemm_release(true);
  });
}

void forward(const Bits* x, const Bits* w, Bits* y, int64_t n, int64_t k, const Groups& groups) {
  int64_t depth = k / 2, tasks = blocks_of(n, kTall);
  auto packed = buffer<uint32_t>(groups.padded * depth);
  share(groups.blocks.size(), [&](int64_t i) {
    const Block& b = groups.blocks[i];
    transpose(reinterpret_cast<const Word*>(x + b.row * k), depth, packed.get() + b.offset * depth, b.padded, b.rows,
              depth);
  });
  share(groups.experts() * tasks, [&](int64_t task) {
    int64_t e = task / tasks, n0 = task % tasks * kTall, tall = std::min(kTall, n - n0);
    if (groups.rows(e) == 0) return;
    const Bits* rows = w + (e * n + n0) * k;
    prefetch(rows, k, tall, k);
    alignas(64) float c[kTall * kPanel], turned[kTall * kPanel];
    for (int64_t i = groups.first_block[e]; i < groups.first_block[e + 1]; i++) {
      const Block& b = groups.blocks[i];
      for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
        multiply(tall, b.padded, std::min(kDepth, k - k0), rows + k0, k,
                 packed.get() + b.offset * depth + k0 / 2 * b.padded, b.padded, c, b.padded, k0 > 0);
      }
      transpose(reinterpret_cast<Word*>(c), b.padded, reinterpret_cast<Word*>(turned), kTall, tall, b.padded);
      for (int64_t r = 0; r < b.rows; r++) store(turned + r * kTall, y + (b.row + r) * n + n0, tall);
    }
  });
}

// The rows of a block for the kernel to read: in place, or, where the padding would pass the end of the tensor, a copy.
std::pair<const Bits*, int64_t> left_operand(const Bits* rows, int64_t ld, const Block& b, int64_t depth, int64_t total,
                                             std::unique_ptr<Bits[]>& copy) {
  if (b.row + b.padded <= total) return {rows, ld};
  copy.reset(new Bits[b.padded * depth]());
  for (int64_t r = 0; r < b.rows; r++) std::memcpy(copy.get() + r * depth, rows + r * ld, depth * sizeof(Bits));
  return {copy.get(), depth};
}

void backward_x(const Bits* grad, const Bits* w, Bits* dx, int64_t total, int64_t n, int64_t k, const Groups& groups) {
  int64_t tasks = blocks_of(k, kWide);
  share(groups.experts() * tasks, [&](int64_t task) {
    int64_t e = task / tasks, k0 = task % tasks * kWide, wide = std::min(kWide, k - k0), first = groups.start[e];
    if (groups.rows(e) == 0) return;
    auto panel = buffer<uint32_t>(kDepth / 2 * kWide);
    auto c = buffer<float>(round_up(groups.rows(e), 16) * kWide);
    std::unique_ptr<Bits[]> copy;
    for (int64_t n0 = 0; n0 < n; n0 += kDepth) {
      int64_t depth = std::min(kDepth, n - n0);
      for (int64_t d = 0; d < depth; d += kPanel) {
        const Bits* rows = w + (e * n + n0 + d) * k + k0;
        int64_t some = std::min(kPanel, depth - d);
        prefetch(rows, k, some, wide);
        for (int64_t p = 0; p < wide; p += kPanel) {
          pack_rows(rows + p, k, panel.get() + (p * depth + d * kPanel) / 2, kPanel, some, some,
                    std::min(kPanel, wide - p));
        }
      }
      for (int64_t i = groups.first_block[e]; i < groups.first_block[e + 1]; i++) {
        const Block& b = groups.blocks[i];
        auto [a, lda] = left_operand(grad + b.row * n + n0, n, b, depth, total, copy);
        prefetch(a, lda, b.padded, depth);
        for (int64_t p = 0; p < wide; p += kPanel) {
          multiply(b.padded, std::min(kPanel, wide - p), depth, a, lda, panel.get() + p * depth / 2, kPanel,
                   c.get() + (b.row - first) * kWide + p, kWide, n0 > 0);
        }
      }
    }
    for (int64_t r = 0; r < groups.rows(e); r++) store(c.get() + r * kWide, dx + (first + r) * k + k0, wide);
  });
}

void backward_w(const Bits* grad, const Bits* x, Bits* dw, int64_t n, int64_t k, const Groups& groups) {
  int64_t tasks = blocks_of(n, kFlat), ld_x = round_up(k, kPanel), span = std::min(kSpan, ld_x);
  auto grads = buffer<uint32_t>(groups.padded / 2 * n), xs = buffer<uint32_t>(groups.padded / 2 * ld_x);
  share(groups.blocks.size(), [&](int64_t i) {
    const Block& b = groups.blocks[i];
    int64_t depth = b.padded / 2;
    auto pairs = buffer<uint32_t>(depth * n);
    pack_rows(grad + b.row * n, n, pairs.get(), n, b.rows, b.padded, n);
    transpose(pairs.get(), n, grads.get() + b.offset / 2 * n, depth, depth, n);
    for (int64_t k0 = 0; k0 < k; k0 += kPanel) {
      pack_rows(x + b.row * k + k0, k, xs.get() + b.offset / 2 * ld_x + k0 * depth, kPanel, b.rows, b.padded,
                std::min(kPanel, k - k0));
    }
  });
  share(groups.experts() * tasks, [&](int64_t task) {
    int64_t e = task / tasks, n0 = task % tasks * kFlat, flat = std::min(kFlat, n - n0);
    Bits* out = dw + (e * n + n0) * k;
    if (groups.rows(e) == 0) {
      std::memset(out, 0, flat * k * sizeof(Bits));
      return;
    }
    auto c = buffer<float>(flat * span);
    for (int64_t s0 = 0; s0 < k; s0 += span) {
      int64_t s1 = std::min(k, s0 + span);
      for (int64_t k0 = s0; k0 < s1; k0 += kPanel) {
        for (int64_t i = groups.first_block[e]; i < groups.first_block[e + 1]; i++) {
          const Block& b = groups.blocks[i];
          multiply(flat, std::min(kPanel, s1 - k0), b.padded, grads.get() + (b.offset * n + n0 * b.padded) / 2,
                   b.padded, xs.get() + (b.offset * ld_x + k0 * b.padded) / 2, kPanel, c.get() + k0 - s0, span,
                   i > groups.first_block[e]);
        }
      }
      for (int64_t r = 0; r < flat; r++) store(c.get() + r * span, out + r * k + s0, s1 - s0);
    }
  });
}

// Whether oneDNN has a kernel that multiplies bf16 pairs on this machine: it refuses when one is asked for.
bool kernels_exist() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (!__builtin_cpu_supports("avx512bf16")) return false;
  try {
    alignas(64) Bits a[16 * 32] = {};
    alignas(64) uint32_t panel[16 * 16] = {};
    alignas(64) float c[16 * 16];
    multiply(16, 16, 32, a, 32, panel, 16, c, 16, false);
    at::native::cpublas::brgemm_release(true);
    return true;
  } catch (const std::exception&) {
    return false;
  }
#else
  return false;
#endif
}

bool use_kernels(const Tensor& a, int64_t n, int64_t k) {
  static const bool exist = kernels_exist();
  return exist && a.scalar_type() == at::kBFloat16 && n % 2 == 0 && k % 2 == 0 && n > 0 && k > 0;
}

Tensor grouped_mm(const Tensor& x_, const Tensor& w_, const Tensor& counts) {
  Tensor x = x_.contiguous(), w = w_.contiguous(), y = empty({x.size(0), w.size(1)}, x.options());
  Groups groups(counts, x.size(0), kPanel, 16);
  y.slice(0, groups.start.back()).zero_();
  if (use_kernels(x, w.size(1), w.size(2))) {
    forward(data<Bits>(x), data<Bits>(w), output<Bits>(y), w.size(1), w.size(2), groups);
    return y;
  }
  for (int64_t e = 0; e < groups.experts(); e++) {
    Tensor out = y.narrow(0, groups.start[e], groups.rows(e));
    if (groups.rows(e)) at::mm_out(out, x.narrow(0, groups.start[e], groups.rows(e)), w.select(0, e).t());
  }
  return y;
}

Tensor grouped_mm_dx(const Tensor& grad_, const Tensor& w_, const Tensor& counts) {
  Tensor grad = grad_.contiguous(), w = w_.contiguous(), dx = empty({grad.size(0), w.size(2)}, grad.options());
  Groups groups(counts, grad.size(0), kTall, 16);
  dx.slice(0, groups.start.back()).zero_();
  if (use_kernels(grad, w.size(1), w.size(2))) {
    backward_x(data<Bits>(grad), data<Bits>(w), output<Bits>(dx), grad.size(0), w.size(1), w.size(2), groups);
    return dx;
  }
  for (int64_t e = 0; e < groups.experts(); e++) {
    Tensor out = dx.narrow(0, groups.start[e], groups.rows(e));
    if (groups.rows(e)) at::mm_out(out, grad.narrow(0, groups.start[e], groups.rows(e)), w.select(0, e));
  }
  return dx;
}

Tensor grouped_mm_dw(const Tensor& grad_, const Tensor& x_, const Tensor& counts) {
  Tensor grad = grad_.contiguous(), x = x_.contiguous();
  Tensor dw = empty({counts.numel(), grad.size(1), x.size(1)}, x.options());
  Groups groups(counts, x.size(0), kChunk, 32);
  if (use_kernels(x, grad.size(1), x.size(1))) {
    backward_w(data<Bits>(grad), data<Bits>(x), output<Bits>(dw), grad.size(1), x.size(1), groups);
    return dw;
  }
  for (int64_t e = 0; e < groups.experts(); e++) {
    Tensor out = dw.select(0, e), rows = grad.narrow(0, groups.start[e], groups.rows(e));
    if (groups.rows(e))
      at::mm_out(out, rows.t(), x.narrow(0, groups.start[e], groups.rows(e)));
    else
      out.zero_();
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
