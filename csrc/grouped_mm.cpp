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

}  // namespace
}  // namespace moe_engine

TORCH_LIBRARY_IMPL(moe_engine, CPU, m) {
  m.impl("grouped_mm", moe_engine::grouped_mm);
  m.impl("grouped_mm_dx", moe_engine::grouped_mm_dx);
  m.impl("grouped_mm_dw", moe_engine::grouped_mm_dw);
}
