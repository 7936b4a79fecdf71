// grouped_mm on CPU. See moe_engine/ops/grouped_mm, and csrc/grouped.h for the products of a task.
//
//   forward  y = x w^T       tasks (expert, block of its rows, block of columns): times
//   dx       dx = dy w       the same
//   dw       dw = dy^T x     tasks (expert, block of rows of dw): gradient
#include "grouped.h"

namespace moe_engine {
namespace {

using at::Tensor;

Tensor grouped_mm(const Tensor& x_, const Tensor& w_, const Tensor& counts) {
  Tensor x = whole_words(x_), w = w_.contiguous(), y = empty({x.size(0), w.size(1)}, x.options());
  int64_t n = w.size(1), k = w.size(2);
  Groups groups(counts, x.size(0));
  groups.clear_rest(y);
  by_dtype(x.scalar_type(), "grouped_mm", [&](auto zero) {
    using T = decltype(zero);
    auto tasks = groups.blocks(n, kWide);
    share<T>(tasks.size(), [&](int64_t i, Scratch<T>& s) {
      const Task& t = tasks[i];
      Rows<T>{data<T>(x), x.size(1)}.point(t.row, t.rows, s.rows);
      times(s.rows, t.rows, {data<T>(w) + (t.expert * n + t.column) * k, k, true}, k, t.columns, s.c, s);
      round_rows(s.c, kWide, output<T>(y) + t.row * n + t.column, n, t.rows, t.columns);
    });
  });
  return y;
}

Tensor grouped_mm_dx(const Tensor& grad_, const Tensor& w_, const Tensor& counts) {
  Tensor grad = whole_words(grad_), w = w_.contiguous(), dx = empty({grad.size(0), w.size(2)}, grad.options());
  int64_t n = w.size(1), k = w.size(2);
  Groups groups(counts, grad.size(0));
  groups.clear_rest(dx);
  by_dtype(grad.scalar_type(), "grouped_mm_dx", [&](auto zero) {
    using T = decltype(zero);
    auto tasks = groups.blocks(k, kWide);
    share<T>(tasks.size(), [&](int64_t i, Scratch<T>& s) {
      const Task& t = tasks[i];
      Rows<T>{data<T>(grad), grad.size(1)}.point(t.row, t.rows, s.rows);
      times(s.rows, t.rows, {data<T>(w) + t.expert * n * k + t.column, k, false}, n, t.columns, s.c, s);
      round_rows(s.c, kWide, output<T>(dx) + t.row * k + t.column, k, t.rows, t.columns);
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
// a[m, k] b[n, k]^T: from a panel packed along k, from one packed along n, the first rounded to the dtype of a, and the
// second rounded past the caches. Sizes are those of one task: m <= kRows, n <= kPanel, k <= kDeep. Nothing if the
// processor does not have the version.
std::vector<Tensor> tile_products(std::string_view name, const Tensor& a_, const Tensor& b_) {
  Tensor a = whole_words(a_), b = b_.contiguous(), across = b.t().contiguous();
  int64_t m = a.size(0), n = b.size(0), k = b.size(1);
  TORCH_CHECK_VALUE(m <= kRows && n <= kPanel && k <= kDeep, "found ", a.sizes(), " and ", b.sizes());
  std::vector<Tensor> found;
  by_dtype(a.scalar_type(), "tile_products", [&](auto zero) {
    using T = decltype(zero);
    const Tiles<T>* tiles = find_tiles<T>(name);
    if (!tiles) return;
    auto wide = a.options().dtype(std::is_same_v<T, double> ? at::kDouble : at::kFloat);
    Tensor sums = empty({m, kPanel}, wide), again = empty({m, kPanel}, wide);
    Tensor rounded = empty({m, n}, a.options()), streamed = empty({m, kPanel}, a.options());
    std::unique_ptr<Scratch<T>> s(new Scratch<T>);
    Rows<T>{data<T>(a), a.size(1)}.point(0, m, s->rows);
    Rows<T>{data<T>(across), n}.point(0, k, s->more);
    int64_t deep = blocks_of(k, kPair<T>), half = deep / 2;
    Left<T> left{s->rows, 0, kPair<T>}, second{s->rows, half * kPair<T>, kPair<T>};
    const Word<T>* rest = s->panel + half * kPanel;

    tiles->pack_across(data<T>(b), k, n, k, s->panel);
    tiles->outer(left, m, s->panel, deep, Next<T>::across(data<T>(b), k), {output<Wide<T>>(sums), kPanel, false});
    tiles->round_rows(data<Wide<T>>(sums), kPanel, output<T>(rounded), n, m, n, aligned(output<T>(rounded), n));

    Sums<T> to{output<Wide<T>>(again), kPanel, false};
    tiles->pack(s->more, 0, k, n, kPanel, s->panel);
    tiles->outer(left, m, s->panel, half, Next<T>::down(data<T>(across), n), to);
    tiles->outer(second, m, rest, deep - half, {}, {to.wide, kPanel, true, output<T>(streamed), kPanel});
    drain();
    to.add = true;
    tiles->outer(second, m, rest, deep - half, {}, to);
    auto part = [&](const Tensor& t) { return t.slice(1, 0, n); };
    found = {part(sums), part(again), rounded, part(streamed)};
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
