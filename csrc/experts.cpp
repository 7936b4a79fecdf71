// experts on CPU. See moe_engine/ops/experts. Tasks are (expert, block of its rows, block of columns); tokens are
// gathered by pointer, and what follows a product is done on its block while that is in the cache:
//
//   up          g, u = x w_gate_up^T          -> h = (g, u), a = s silu(g) u
//   down        o = a w_down^T                -> y[t] = sum of o over the token's rows
//   hidden      da = dy w_down                -> dh = dSwiGLU(s da), a, and the block's part of dweight
//   matrices    dw_down = dy^T a, dw_gate_up = dh^T x
//   tokens      dh w_gate_up                  -> dx[t], the sum over the token's rows
#include "grouped.h"
#include "permute.h"
#include "swiglu.h"

#include <ATen/ops/empty_like.h>

#include <numeric>

namespace moe_engine {
namespace {

using at::Tensor;
constexpr int64_t kHalf = kWide / 2;  // columns of the gate in a task of up; those of up follow

// What both directions read. `width` is D, `hidden` F.
template <typename T>
struct Layer {
  Rows<T> x;
  const Wide<T>* weight;
  const T *w_gate_up, *w_down;
  int64_t width, hidden;
  const Groups& groups;

  Wide<T> weight_of(int64_t row) const { return weight[x.assignment[row]]; }

  // h and a, or one of them; `words` are the rows of x in whole words
  void up(const Rows<T>& words, T* h, T* a) const {
    auto tasks = groups.blocks(hidden, kHalf);
    bool past = a && aligned(h, hidden);  // h is for backward, which comes later if a is asked for
    share<T>(tasks.size(), [&](int64_t i, Scratch<T>& s) {
      const Task& t = tasks[i];
      const T* w = w_gate_up + (2 * t.expert * hidden + t.column) * width;
      words.point(t.row, t.rows, s.rows);
      times(s.rows, t.rows, {w, width, true}, width, t.columns, s.c, s);
      times(s.rows, t.rows, {w + hidden * width, width, true}, width, t.columns, s.c + kHalf, s);
      for (int64_t r = t.row; r < t.row + t.rows; r++) {
        const Wide<T>*gate = s.c + (r - t.row) * kWide, *up = gate + kHalf;
        if (h) {
          T* row = h + 2 * r * hidden + t.column;
          round_rows(gate, kWide, row, hidden, 1, t.columns, past);
          round_rows(up, kWide, row + hidden, hidden, 1, t.columns, past);
        }
        if (a) swiglu_row(gate, up, weight_of(r), a + r * hidden + t.column, t.columns);
      }
      drain();
    });
  }

  // o
  void down(const Rows<T>& a, T* o) const {
    auto tasks = groups.blocks(width, kWide);
    share<T>(tasks.size(), [&](int64_t i, Scratch<T>& s) {
      const Task& t = tasks[i];
      a.point(t.row, t.rows, s.rows);
      const T* w = w_down + (t.expert * width + t.column) * hidden;
      times(s.rows, t.rows, {w, hidden, true}, hidden, t.columns, s.c, s);
      round_rows(s.c, kWide, o + t.row * width + t.column, width, t.rows, t.columns);
    });
  }

  // dh, a, and the part of each block of kWide columns in dweight
  void backward_hidden(const Rows<T>& grad, const T* h, T* dh, T* a, Wide<T>* dweight) const {
    auto tasks = groups.blocks(hidden, kWide);
    share<T>(tasks.size(), [&](int64_t i, Scratch<T>& s) {
      const Task& t = tasks[i];
      grad.point(t.row, t.rows, s.rows);
      times(s.rows, t.rows, {w_down + t.expert * width * hidden + t.column, hidden, false}, width, t.columns, s.c, s);
      for (int64_t r = t.row; r < t.row + t.rows; r++) {
        int64_t gate = 2 * r * hidden + t.column, up = gate + hidden;
        dweight[r * blocks_of(hidden, kWide) + t.column / kWide] =
            swiglu_backward_row(s.c + (r - t.row) * kWide, h + gate, h + up, weight_of(r), dh + gate, dh + up,
                                a + r * hidden + t.column, t.columns);
      }
    });
  }

  // The rows of which dx is the sum
  void backward_tokens(const T* dh, T* dx) const {
    auto tasks = groups.blocks(width, kWide);
    share<T>(tasks.size(), [&](int64_t i, Scratch<T>& s) {
      const Task& t = tasks[i];
      Rows<T>{dh, 2 * hidden}.point(t.row, t.rows, s.rows);
      const T* w = w_gate_up + 2 * t.expert * hidden * width + t.column;
      times(s.rows, t.rows, {w, width, false}, 2 * hidden, t.columns, s.c, s);
      round_rows(s.c, kWide, dx + t.row * width + t.column, width, t.rows, t.columns);
    });
  }

  void backward_matrices(const Rows<T>& grad, const T* dh, const T* a, T* dw_gate_up, T* dw_down) const {
    auto first = groups.strips(width, kFlat), second = groups.strips(2 * hidden, kFlat);
    int64_t firsts = first.size();
    share<T>(firsts + second.size(), [&](int64_t i, Scratch<T>& s) {
      const Task& t = i < firsts ? first[i] : second[i - firsts];
      if (i < firsts)
        gradient(grad, Rows<T>{a, hidden}, t, s, dw_down + t.expert * width * hidden);
      else
        gradient(Rows<T>{dh, 2 * hidden}, x, t, s, dw_gate_up + 2 * t.expert * hidden * width);
    });
  }
};

std::tuple<Tensor, Tensor> experts(const Tensor& x_, const Tensor& weight_, const Tensor& gate_up_, const Tensor& down_,
                                   const Tensor& counts, const Tensor& assignment_, const Tensor& row_of, bool keep_h) {
  Tensor x = whole_words(x_), weight = weight_.contiguous(), gate_up = gate_up_.contiguous();
  Tensor down = down_.contiguous(), assignment = assignment_.contiguous(), y;
  int64_t rows = assignment.size(0), width = down.size(1), hidden = down.size(2);
  Groups groups(counts, rows);
  Tensor h = empty({keep_h ? rows : 0, 2 * hidden}, x.options());
  if (keep_h) groups.clear_rest(h);
  by_dtype(x.scalar_type(), "experts", [&](auto zero) {
    using T = decltype(zero);
    Rows<T> words{data<T>(x), x.size(1), data<int32_t>(assignment), row_of.size(1)};
    Layer<T> layer{words, data<Wide<T>>(weight), data<T>(gate_up), data<T>(down), width, hidden, groups};
    Tensor a = empty({groups.total(), hidden}, x.options()), o = empty({rows, width}, x.options());
    layer.up(words, keep_h ? output<T>(h) : nullptr, output<T>(a));
    a = whole_words(a);
    layer.down({data<T>(a), a.size(1)}, output<T>(o));
    groups.clear_rest(o);
    y = unpermute(o, assignment, row_of);
  });
  return {y, h};
}

// dweight[t][k] = the sum of the parts of its row
template <typename T>
Tensor weight_gradient(const Tensor& parts, const Tensor& row_of_, int64_t total) {
  Tensor row_of = row_of_.contiguous(), out = at::empty(row_of.sizes(), parts.options());
  int64_t blocks = parts.size(1);
  for (int64_t i = 0; i < row_of.numel(); i++) {
    int64_t row = data<int32_t>(row_of)[i];
    const Wide<T>* part = data<Wide<T>>(parts) + row * blocks;
    output<Wide<T>>(out)[i] = row < total ? std::accumulate(part, part + blocks, Wide<T>(0)) : 0;
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> experts_backward(const Tensor& grad_, const Tensor& x_,
                                                            const Tensor& weight_, const Tensor& gate_up_,
                                                            const Tensor& down_, const Tensor& counts,
                                                            const Tensor& assignment_, const Tensor& row_of,
                                                            const Tensor& h_, bool need_x, bool need_matrices) {
  Tensor x = x_.contiguous(), weight = weight_.contiguous(), gate_up = gate_up_.contiguous();
  Tensor down = down_.contiguous(), assignment = assignment_.contiguous(), h = h_.contiguous();
  Tensor grad = whole_words(grad_);
  int64_t rows = assignment.size(0), width = x.size(1), hidden = down.size(2), k = row_of.size(1);
  Groups groups(counts, rows);
  Tensor dx = at::empty({0}, x.options()), dw_gate_up = at::empty_like(dx), dw_down = at::empty_like(dx), dweight;
  by_dtype(x.scalar_type(), "experts_backward", [&](auto zero) {
    using T = decltype(zero);
    const int32_t* order = data<int32_t>(assignment);
    Layer<T> layer{{data<T>(x), width, order, k}, data<Wide<T>>(weight), data<T>(gate_up), data<T>(down), width,
                   hidden, groups};
    Rows<T> grads{data<T>(grad), grad.size(1), order, k};
    if (h.size(0) == 0) {
      h = empty({rows, 2 * hidden}, x.options());
      Tensor words = whole_words(x);
      layer.up({data<T>(words), words.size(1), order, k}, output<T>(h), nullptr);
    }
    Tensor dh = empty({rows, 2 * hidden}, x.options()), a = empty({rows, hidden}, x.options());
    Tensor parts = empty({rows, blocks_of(hidden, kWide)}, weight.options());
    layer.backward_hidden(grads, data<T>(h), output<T>(dh), output<T>(a), output<Wide<T>>(parts));
    dweight = weight_gradient<T>(parts, row_of, groups.total());
    if (need_matrices) {
      dw_gate_up = empty(gate_up.sizes(), x.options());
      dw_down = empty(down.sizes(), x.options());
      layer.backward_matrices(grads, data<T>(dh), data<T>(a), output<T>(dw_gate_up), output<T>(dw_down));
    }
    a.reset();
    if (need_x) {
      Tensor rows_of_dx = empty({rows, width}, x.options());
      layer.backward_tokens(data<T>(dh), output<T>(rows_of_dx));
      groups.clear_rest(rows_of_dx);
      dx = unpermute(rows_of_dx, assignment, row_of);
    }
  });
  return {dx, dweight, dw_gate_up, dw_down};
}

}  // namespace
}  // namespace moe_engine

TORCH_LIBRARY_IMPL(moe_engine, CPU, m) {
  m.impl("experts", moe_engine::experts);
  m.impl("experts_backward", moe_engine::experts_backward);
}
