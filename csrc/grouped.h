// What grouped_mm and experts share: where the experts' rows lie, how threads divide the work, and the products of a
// task. A weight is read where it lies, once for each kRows rows of its expert, and never copied whole; each
// output has one writer, and the order of its sum does not depend on the number of threads.
//
//   times          c = rows w or rows w^T    w is packed panel by panel, each of which a core keeps while it meets all
//                                            rows
//   gradient       dw = left^T right         both are packed; dw is written once, past the caches
#pragma once

#include "tiles.h"

#include <ATen/ops/constant_pad_nd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

namespace moe_engine {

constexpr int64_t kRows = 192;    // most rows of a task
constexpr int64_t kEven = 12;     // the size of an expert's blocks of rows is a multiple of it, as the tiles divide it
constexpr int64_t kWide = 512;    // columns of a task of times
constexpr int64_t kFlat = 192;    // rows of dw of a task of gradient
constexpr int64_t kDeep = 128;    // words along its rows that gradient sums at once
constexpr int64_t kStrip = 512;   // columns of dw that are summed at once over more rows than a panel holds

inline int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }
inline int64_t round_up(int64_t size, int64_t multiple) { return blocks_of(size, multiple) * multiple; }

// Consecutive rows of an expert, and columns of what is computed for them.
struct Task {
  int64_t expert, row, rows, column, columns;
};

// Where each expert's rows lie.
struct Groups {
  std::vector<int64_t> start{0}, by_size;  // by_size: the experts, those with the most rows first

  explicit Groups(at::ArrayRef<int32_t> counts) {
    for (int64_t count : counts) {
      TORCH_CHECK_VALUE(count >= 0, "found a negative count of rows, expected 0 or more");
      start.push_back(start.back() + count);
    }
    for (int64_t e = 0; e < experts(); e++) by_size.push_back(e);
    std::stable_sort(by_size.begin(), by_size.end(), [&](int64_t a, int64_t b) { return size(a) > size(b); });
  }
  // counts: int32 in order of the experts, which have some of `rows` rows
  Groups(const at::Tensor& counts, int64_t rows)
      : Groups(at::ArrayRef<int32_t>(data<int32_t>(counts.contiguous()), counts.numel())) {
    TORCH_CHECK_VALUE(total() <= rows, "found counts that sum to ", total(), ", expected at most ", rows,
                      ", the number of rows");
  }
  int64_t experts() const { return start.size() - 1; }
  int64_t total() const { return start.back(); }
  int64_t size(int64_t e) const { return start[e + 1] - start[e]; }

  // Rows that no expert has are 0.
  void clear_rest(const at::Tensor& rows) const {
    if (total() < rows.size(0)) rows.slice(0, total()).zero_();
  }

  // Blocks of rows, of nearly one size in an expert, and columns; those that read the same weights follow each other.
  std::vector<Task> blocks(int64_t width, int64_t wide) const {
    std::vector<Task> tasks;
    for (int64_t e : by_size) {
      int64_t count = size(e), parts = blocks_of(count, kRows);
      int64_t tall = count ? round_up(blocks_of(count, parts), kEven) : 0;
      for (int64_t column = 0; column < width; column += wide) {
        for (int64_t row = start[e]; row < start[e + 1]; row += tall)
          tasks.push_back({e, row, std::min(tall, start[e + 1] - row), column, std::min(wide, width - column)});
      }
    }
    return tasks;
  }

  // All rows of each expert, one without rows too, and blocks of columns.
  std::vector<Task> strips(int64_t width, int64_t wide) const {
    std::vector<Task> tasks;
    for (int64_t e : by_size) {
      for (int64_t column = 0; column < width; column += wide)
        tasks.push_back({e, start[e], size(e), column, std::min(wide, width - column)});
    }
    return tasks;
  }
};

// Rows `width` long; row r is that of its token if they are gathered.
template <typename T>
struct Rows {
  const T* base;
  int64_t width;
  const int32_t* assignment = nullptr;
  int64_t k = 1;

  const T* operator[](int64_t r) const { return base + (assignment ? assignment[r] / k : r) * width; }
  void point(int64_t first, int64_t count, const T** to) const {
    for (int64_t r = 0; r < count; r++) to[r] = (*this)[first + r];
  }
};

// What a thread works in.
template <typename T>
struct Scratch {
  alignas(64) Wide<T> c[kRows * kWide];
  alignas(64) Word<T> panel[kDeep * kPanel], left[kDeep * kFlat];
  const T *rows[std::max(kRows, kPair<T> * kDeep)], *more[kPair<T> * kDeep];
};

// Run task(i, scratch) for each i < count; a thread takes another one when it is done. Half of the threads take the
// first ones, the others the last: experts with many rows wait for arithmetic, those with few for memory, and so they
// run at the same time.
template <typename T, typename Function>
void share(int64_t count, const Function& task) {
  std::atomic<int64_t> taken{0}, ends[2] = {};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t thread, int64_t) {
    std::unique_ptr<Scratch<T>> scratch(new Scratch<T>);
    while (taken++ < count) {
      int64_t i = ends[thread % 2]++;
      task(thread % 2 ? count - 1 - i : i, *scratch);
    }
  });
}

// Contiguous rows for times: none may end in half a word of bf16, the other half of which would be the next row.
inline at::Tensor whole_words(const at::Tensor& rows) {
  bool odd = rows.scalar_type() == at::kBFloat16 && rows.size(1) % 2;
  return odd ? at::constant_pad_nd(rows, {0, 1}) : rows.contiguous();
}

// The right operand of times: w[k][n], or w[n][k] if that is `across`, rows `ld` apart.
template <typename T>
struct Factor {
  const T* base;
  int64_t ld;
  bool across;

  const T* at(int64_t k, int64_t n) const { return across ? base + n * ld + k : base + k * ld + n; }
  void pack(int64_t k, int64_t depth, int64_t n, int64_t columns, Scratch<T>& s) const {
    if (across) return pack_across(at(k, n), ld, columns, depth, s.panel);
    Rows<T>{at(k, n), ld}.point(0, depth, s.more);
    moe_engine::pack(s.more, 0, depth, columns, kPanel, s.panel);
  }
  Next<T> next(int64_t k, int64_t n) const {
    return across ? Next<T>::across(at(k, n), ld) : Next<T>::down(at(k, n), ld);
  }
};

// c[rows][kWide] = rows, `depth` long, times `columns` columns of w. Panels follow each other as they lie in memory.
template <typename T>
void times(const T* const* rows, int64_t count, const Factor<T>& w, int64_t depth, int64_t columns, Wide<T>* c,
           Scratch<T>& s) {
  constexpr int64_t most = kPair<T> * kDepth;
  int64_t chunks = blocks_of(depth, most), panels = blocks_of(columns, kPanel);
  auto k_of = [&](int64_t i) { return most * (w.across ? i % chunks : i / panels); };
  auto p_of = [&](int64_t i) { return kPanel * (w.across ? i / chunks : i % panels); };
  for (int64_t i = 0; i < chunks * panels; i++) {
    int64_t k = k_of(i), p = p_of(i), deep = std::min(most, depth - k);
    w.pack(k, deep, p, std::min(kPanel, columns - p), s);
    outer<T>({rows, k, kPair<T>}, count, s.panel, blocks_of(deep, kPair<T>), w.next(k_of(i + 1), p_of(i + 1)),
             {c + p, kWide, k > 0});
  }
}

// dw[left's columns of the task][right's width] = left^T right over the task's rows
template <typename T>
void gradient(const Rows<T>& left, const Rows<T>& right, const Task& t, Scratch<T>& s, T* dw) {
  constexpr int64_t most = kPair<T> * kDeep;
  bool once = t.rows <= most;  // otherwise sums wait for the next chunk of rows
  int64_t width = right.width, strip = once ? width : kStrip;
  T* out = dw + t.column * width;
  bool past = aligned(dw, width);
  const T* columns[kFlat];
  for (int64_t i = 0; i < kFlat; i++) columns[i] = reinterpret_cast<const T*>(s.left + i);
  if (t.rows == 0) std::memset(out, 0, t.columns * width * sizeof(T));
  for (int64_t s0 = 0; s0 < width; s0 += strip) {
    for (int64_t r = 0; r < t.rows; r += most) {
      int64_t deep = std::min(most, t.rows - r);
      bool last = r + deep == t.rows;
      left.point(t.row + r, deep, s.rows);
      right.point(t.row + r, deep, s.more);
      pack(s.rows, t.column, deep, t.columns, kFlat, s.left);
      for (int64_t p = s0; p < std::min(s0 + strip, width); p += kPanel) {
        int64_t wide = std::min(kPanel, width - p);
        bool direct = last && past && wide == kPanel;
        Wide<T>* sums = s.c + (once ? 0 : p - s0);
        pack(s.more, p, deep, wide, kPanel, s.panel);
        outer<T>({columns, 0, kPair<T> * kFlat}, t.columns, s.panel, blocks_of(deep, kPair<T>), {},
                 {sums, kStrip, r > 0, direct ? out + p : nullptr, width});
        if (last && !direct) round_rows(sums, kStrip, out + p, width, t.columns, wide);
      }
    }
  }
  drain();
}

}  // namespace moe_engine
