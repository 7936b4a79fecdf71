// grouped_mm on CPU. See moe_engine/ops/grouped_mm, and csrc/grouped.h for the products of a task.
//
//   forward  y = x w^T       tasks (expert, block of its rows, block of columns): dot
//   dx       dx = dy w       the same: times_panels
//   dw       dw = dy^T x     tasks (expert, block of rows of dw): gradient
#include "grouped.h"

namespace moe_engine {
namespace {

using at::Tensor;

Tensor grouped_mm(const Tensor& x_, const Tensor& w_, const Tensor& counts) {
  Tensor x = x_.contiguous(), w = w_.contiguous(), y = empty({x.size(0), w.size(1)}, x.options());
  int64_t n = w.size(1), k = w.size(2);
  Groups groups(counts, x.size(0));
  y.slice(0, groups.total()).zero_();
  by_dtype(x.scalar_type(), "grouped_mm", [&](auto zero) {
    using T = decltype(zero);
    auto tasks = groups.blocks(n, kNarrow);
    share<T>(tasks.size(), [&](int64_t i, Scratch<T>& s) {
      const Task& t = tasks[i];
      Rows<T>{data<T>(x), k}.point(t.row, t.rows, s.rows);
      dot(s.rows, t.rows, data<T>(w) + (t.expert * n + t.column) * k, k, t.columns, k, s.c[0], kNarrow);
      round_rows(s.c[0], kNarrow, output<T>(y) + t.row * n + t.column, n, t.rows, t.columns);
    });
  });
  return y;
}

Tensor grouped_mm_dx(const Tensor& grad_, const Tensor& w_, const Tensor& counts) {
  Tensor grad = whole_words(grad_), w = w_.contiguous(), dx = empty({grad.size(0), w.size(2)}, grad.options());
  int64_t n = w.size(1), k = w.size(2);
  Groups groups(counts, grad.size(0));
  dx.slice(0, groups.total()).zero_();
  by_dtype(grad.scalar_type(), "grouped_mm_dx", [&](auto zero) {
    using T = decltype(zero);
    auto tasks = groups.blocks(k, kWide);
    share<T>(tasks.size(), [&](int64_t i, Scratch<T>& s) {
      const Task& t = tasks[i];
      Rows<T>{data<T>(grad), grad.size(1)}.point(t.row, t.rows, s.rows);
      times_panels(s.rows, t, data<T>(w) + t.expert * n * k, n, k, s);
      round_rows(s.c[0], kWide, output<T>(dx) + t.row * k + t.column, k, t.rows, t.columns);
    });
  });
  return dx;
}

Tensor grouped_mm_dw(const Tensor& grad_, const Tensor& x_, const Tensor& counts) {
  Tensor grad = grad_.contiguous(), x = x_.contiguous();
  int64_t n = grad.size(1), k = x.size(1);
  Tensor dw = empty({counts.numel(), n, k}, x.options());
  Groups groups(counts, x.size(0));
  by_dtype(x.scalar_type(), "grouped_mm_dw", [&](auto zero) {
    using T = decltype(zero);
    auto tasks = groups.strips(n, kFlat);
    share<T>(tasks.size(), [&](int64_t i, Scratch<T>& s) {
      const Task& t = tasks[i];
      gradient(Rows<T>{data<T>(grad), n}, Rows<T>{data<T>(x), k}, t, s, output<T>(dw) + t.expert * n * k);
    });
  });
  return dw;
}

// The functions of csrc/tiles.h in the version of one instruction set, for tests/ops/test_tiles.py: a processor uses
// only the best of the versions in the library.
//
// a[m, k] b[n, k]^T four times: by dot, by outer, and each rounded to the dtype of a. Sizes are those of one task:
// m <= kRows, n <= kPanel, k <= kDepth. Nothing if the processor does not have the version.
std::vector<Tensor> tile_products(std::string_view name, const Tensor& a_, const Tensor& b_) {
  Tensor a = whole_words(a_), b = b_.contiguous(), across = b.t().contiguous();
  int64_t m = a.size(0), n = b.size(0), k = b.size(1), tall = round_up(m, 4);
  TORCH_CHECK_VALUE(m <= kRows && n <= kPanel && k <= kDepth, "found ", a.sizes(), " and ", b.sizes());
  std::vector<Tensor> found;
  by_dtype(a.scalar_type(), "tile_products", [&](auto zero) {
    using T = decltype(zero);
    const Versions<T>* version = find_version<T>(name);
    if (!version) return;
    auto wide = a.options().dtype(std::is_same_v<T, double> ? at::kDouble : at::kFloat);
    Tensor sums = empty({tall, kPanel}, wide), panels = empty({tall, kPanel}, wide);
    Tensor rounded = empty({m, n}, a.options()), streamed = empty({tall, kPanel}, a.options());
    std::unique_ptr<Scratch<T>> s(new Scratch<T>);
    Rows<T>{data<T>(a), a.size(1)}.point(0, m, s->rows);
    Rows<T>{data<T>(across), n}.point(0, k, s->more);
    version->dot(s->rows, m, data<T>(b), k, n, k, output<Wide<T>>(sums), kPanel);
    version->round_rows(data<Wide<T>>(sums), kPanel, output<T>(rounded), n, m, n);
    version->pack(s->more, 0, k, n, kPanel, s->panel);
    Left<T> left{s->rows, 0, kPair<T>};
    Next<T> next{data<T>(b), 0};
    int64_t deep = blocks_of(k, kPair<T>), half = deep / 2;
    version->outer(left, m, s->panel, half, next, {output<Wide<T>>(panels), kPanel, false});
    left.offset = half * kPair<T>;
    const Word<T>* rest = s->panel + half * kPanel;
    Sums<T> to{output<Wide<T>>(panels), kPanel, true, output<T>(streamed), kPanel};
    version->outer(left, m, rest, deep - half, next, to);
    drain();
    to.out = nullptr;
    version->outer(left, m, rest, deep - half, next, to);
    auto part = [&](const Tensor& t) { return t.slice(0, 0, m).slice(1, 0, n); };
    found = {part(sums), part(panels), rounded, part(streamed)};
  });
  return found;
}

}  // namespace
}  // namespace moe_engine

TORCH_LIBRARY_FRAGMENT(moe_engine, m) { m.def("tile_products(str version, Tensor a, Tensor b) -> Tensor[]"); }

TORCH_LIBRARY_IMPL(moe_engine, CPU, m) {
  m.impl("grouped_mm", moe_engine::grouped_mm);
  m.impl("grouped_mm_dx", moe_engine::grouped_mm_dx);
  m.impl("grouped_mm_dw", moe_engine::grouped_mm_dw);
  m.impl("tile_products", moe_engine::tile_products);
}
