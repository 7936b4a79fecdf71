// router_logits on CPU. See moe_engine/ops/router_logits. The forward multiplies x and w as they are, which is exact
// for bf16 too, and sums in fp32. The gradient that arrives is fp32, so backward widens the other operand.
//
//   forward  logits = x w^T      tasks: blocks of tokens and of experts
//   dx       dlogits w           the same: tokens and columns
//   dw       dlogits^T x         tasks: blocks of experts
#include "grouped.h"

namespace moe_engine {
namespace {

using at::Tensor;
constexpr int64_t kTokens = 48;   // of a task of the forward
constexpr int64_t kExperts = 24;  // of a task of dw

template <typename T>
constexpr at::ScalarType kWideType = std::is_same_v<T, double> ? at::kDouble : at::kFloat;

Tensor router_logits(const Tensor& x_, const Tensor& w_) {
  // jitter makes x fp32 where w is bf16
  auto type = x_.scalar_type() == w_.scalar_type() ? x_.scalar_type() : at::kFloat;
  Tensor x = whole_words(x_.to(type)), w = w_.to(type).contiguous(), logits;
  int64_t tokens = x.size(0), experts = w.size(0), width = w.size(1);
  by_dtype(x.scalar_type(), "router_logits", [&](auto zero) {
    using T = decltype(zero);
    logits = empty({tokens, experts}, x.options().dtype(kWideType<T>));
    int64_t columns = blocks_of(experts, kWide);
    share<T>(blocks_of(tokens, kTokens) * columns, [&](int64_t i, Scratch<T>& s) {
      int64_t row = i / columns * kTokens, rows = std::min(kTokens, tokens - row);
      int64_t column = i % columns * kWide, wide = std::min(kWide, experts - column);
      Rows<T>{data<T>(x), x.size(1)}.point(row, rows, s.rows);
      times(s.rows, rows, {data<T>(w) + column * width, width, true}, width, wide, s.c, s);
      round_rows(s.c, kWide, output<Wide<T>>(logits) + row * experts + column, experts, rows, wide);
    });
  });
  return logits;
}

std::tuple<Tensor, Tensor> router_logits_backward(const Tensor& grad_, const Tensor& x_, const Tensor& w_, bool need_x,
                                                  bool need_w) {
  Tensor grad = grad_.contiguous(), dx = at::empty({0}, x_.options()), dw = at::empty({0}, w_.options());
  int64_t tokens = grad.size(0), experts = grad.size(1), width = x_.size(1);
  by_dtype(x_.scalar_type(), "router_logits_backward", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    int32_t all = tokens;
    Groups groups{at::ArrayRef<int32_t>(all)};
    auto first = groups.strips(need_w ? experts : 0, kExperts), second = groups.blocks(need_x ? width : 0, kWide);
    Tensor x = need_w ? x_.to(kWideType<T>).contiguous() : x_, w = need_x ? w_.to(kWideType<T>).contiguous() : w_;
    Tensor wide_dw = empty({need_w ? experts : 0, width}, x.options());
    if (need_x) dx = empty({tokens, width}, x_.options());
    int64_t firsts = first.size();
    share<W>(firsts + second.size(), [&](int64_t i, Scratch<W>& s) {
      const Task& t = i < firsts ? first[i] : second[i - firsts];
      Rows<W> rows{data<W>(grad), experts};
      if (i < firsts) return gradient(rows, Rows<W>{data<W>(x), width}, t, s, output<W>(wide_dw));
      rows.point(t.row, t.rows, s.rows);
      times(s.rows, t.rows, {data<W>(w) + t.column, width, false}, experts, t.columns, s.c, s);
      round_rows(s.c, kWide, output<T>(dx) + t.row * width + t.column, width, t.rows, t.columns);
    });
    if (need_w) dw = wide_dw.to(w_.scalar_type());
  });
  return {dx, dw};
}

}  // namespace
}  // namespace moe_engine

TORCH_LIBRARY_IMPL(moe_engine, CPU, m) {
  m.impl("router_logits", moe_engine::router_logits);
  m.impl("router_logits_backward", moe_engine::router_logits_backward);
}
