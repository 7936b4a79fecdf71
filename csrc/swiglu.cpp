// swiglu on CPU. See moe_engine/ops/swiglu, and csrc/swiglu.h for the rows, which experts use too.
#include "swiglu.h"

#include <ATen/ops/empty_like.h>

namespace moe_engine {
namespace {

using at::Tensor;

template <typename V>
INLINE V exp_of(V x) {
  if constexpr (std::is_same_v<Lane<V>, double>) {
    V y;
    for (size_t i = 0; i < sizeof(V) / sizeof(double); i++) y[i] = std::exp(x[i]);
    return y;
  } else {
    return fast_exp<V, Integers<V>>(x);
  }
}

template <typename V>
INLINE Lane<V> sum_of(V v) {
  Lane<V> total = 0;
  for (size_t i = 0; i < sizeof(V) / sizeof(total); i++) total += v[i];
  return total;
}

// Columns in whole vectors: two of them, as that fills one of bf16.
template <typename T, typename M>
constexpr int64_t kBlock = 2 * M::bytes / sizeof(Wide<T>);

template <typename M, typename In, typename T>
INLINE void forward_block(const In* gate, const In* up, Wide<T> s, T* y) {
  using V = Vector<T, M>;
  constexpr int64_t lanes = kBlock<T, M> / 2;
  V out[2];
  UNROLL for (int i = 0; i < 2; i++) {
    V g = load_wide<V>(gate + i * lanes), u = load_wide<V>(up + i * lanes);
    out[i] = s * g / (1 + exp_of(-g)) * u;
  }
  write_rounded<T, M, false>(out[0], out[1], y);
}

template <typename M, typename In, typename T>
INLINE Vector<T, M> backward_block(const In* grad, const T* gate, const T* up, Wide<T> s, T* grad_gate, T* grad_up,
                                   T* y) {
  using V = Vector<T, M>;
  constexpr int64_t lanes = kBlock<T, M> / 2;
  V dg[2], du[2], out[2], sum = {};
  UNROLL for (int i = 0; i < 2; i++) {
    V d = load_wide<V>(grad + i * lanes), g = load_wide<V>(gate + i * lanes), u = load_wide<V>(up + i * lanes);
    V sigmoid = 1 / (1 + exp_of(-g)), silu = g * sigmoid;
    dg[i] = s * d * u * (sigmoid + silu * (1 - sigmoid));
    du[i] = s * d * silu;
    out[i] = s * silu * u;
    sum += d * silu * u;
  }
  write_rounded<T, M, false>(dg[0], dg[1], grad_gate);
  write_rounded<T, M, false>(du[0], du[1], grad_up);
  if (y) write_rounded<T, M, false>(out[0], out[1], y);
  return sum;
}

// Columns after the last whole block, padded with zeros.
template <typename E, int64_t size>
struct End {
  E values[size] = {};

  INLINE End(const E* from, int64_t count) { std::memcpy(values, from, count * sizeof(E)); }
  INLINE End() {}
  INLINE void to(E* row, int64_t count) const { std::memcpy(row, values, count * sizeof(E)); }
};

template <typename M, typename In, typename T>
INLINE void forward(const In* gate, const In* up, Wide<T> s, T* y, int64_t count) {
  constexpr int64_t block = kBlock<T, M>;
  int64_t c = 0, rest = count % block;
  for (; c + block <= count; c += block) forward_block<M>(gate + c, up + c, s, y + c);
  if (rest) {
    End<In, block> g(gate + c, rest), u(up + c, rest);
    End<T, block> out;
    forward_block<M>(g.values, u.values, s, out.values);
    out.to(y + c, rest);
  }
}

template <typename M, typename In, typename T>
INLINE Wide<T> backward(const In* grad, const T* gate, const T* up, Wide<T> s, T* grad_gate, T* grad_up, T* y,
                        int64_t count) {
  constexpr int64_t block = kBlock<T, M>;
  int64_t c = 0, rest = count % block;
  Vector<T, M> sum = {};
  for (; c + block <= count; c += block)
    sum += backward_block<M>(grad + c, gate + c, up + c, s, grad_gate + c, grad_up + c, y ? y + c : y);
  if (rest) {
    End<In, block> d(grad + c, rest);
    End<T, block> g(gate + c, rest), u(up + c, rest), dg, du, out;
    sum += backward_block<M>(d.values, g.values, u.values, s, dg.values, du.values, out.values);
    dg.to(grad_gate + c, rest);
    du.to(grad_up + c, rest);
    if (y) out.to(y + c, rest);
  }
  return sum_of(sum);
}

template <typename In, typename T>
struct RowFunctions {
  decltype(&swiglu_row<In, T>) forward;
  decltype(&swiglu_backward_row<In, T>) backward;
};

#define VERSION(name, allow, ...)                                                                                   \
  template <typename In, typename T>                                                                                \
  struct name {                                                                                                     \
    using M = Machine<__VA_ARGS__>;                                                                                 \
    allow static void forward_of(const In* gate, const In* up, Wide<T> s, T* y, int64_t count) {                    \
      forward<M>(gate, up, s, y, count);                                                                            \
    }                                                                                                               \
    allow static Wide<T> backward_of(const In* grad, const T* gate, const T* up, Wide<T> s, T* grad_gate,           \
                                     T* grad_up, T* y, int64_t count) {                                             \
      return backward<M>(grad, gate, up, s, grad_gate, grad_up, y, count);                                          \
    }                                                                                                               \
    static constexpr RowFunctions<In, T> all{forward_of, backward_of};                                              \
  };
MACHINES(VERSION)
#undef VERSION

template <typename In, typename T>
const RowFunctions<In, T>* find_rows(std::string_view machine) {
  if (!supports(machine)) return nullptr;
#define VERSION(name, ...) \
  if (machine == #name) return &name<In, T>::all;
  MACHINES(VERSION)
#undef VERSION
  return nullptr;
}

template <typename In, typename T>
const RowFunctions<In, T>& chosen() {
  static const RowFunctions<In, T>& functions = *find_rows<In, T>(best());
  return functions;
}

}  // namespace

template <typename In, typename T>
void swiglu_row(const In* gate, const In* up, Wide<T> s, T* y, int64_t count) {
  chosen<In, T>().forward(gate, up, s, y, count);
}

template <typename In, typename T>
Wide<T> swiglu_backward_row(const In* grad, const T* gate, const T* up, Wide<T> s, T* grad_gate, T* grad_up, T* y,
                            int64_t count) {
  return chosen<In, T>().backward(grad, gate, up, s, grad_gate, grad_up, y, count);
}

#define INSTANTIATE(In, T)                                               \
  template void swiglu_row(const In*, const In*, Wide<T>, T*, int64_t); \
  template Wide<T> swiglu_backward_row(const In*, const T*, const T*, Wide<T>, T*, T*, T*, int64_t);

INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(Bits, Bits)
INSTANTIATE(float, Bits)

namespace {

Tensor swiglu(const Tensor& gate_up_) {
  Tensor gate_up = gate_up_.contiguous();
  int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  Tensor y = empty({rows, width}, gate_up.options());
  by_dtype(gate_up.scalar_type(), "swiglu", [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, rows, 1 + 8192 / (width + 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const T* row = data<T>(gate_up) + 2 * r * width;
        swiglu_row<T, T>(row, row + width, 1, output<T>(y) + r * width, width);
      }
    });
  });
  return y;
}

Tensor swiglu_backward(const Tensor& grad_, const Tensor& gate_up_) {
  Tensor grad = grad_.contiguous(), gate_up = gate_up_.contiguous();
  int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  Tensor out = empty(gate_up.sizes(), gate_up.options());
  by_dtype(gate_up.scalar_type(), "swiglu_backward", [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, rows, 1 + 4096 / (width + 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const T* row = data<T>(gate_up) + 2 * r * width;
        T *to = output<T>(out) + 2 * r * width, *no_y = nullptr;
        swiglu_backward_row<T, T>(data<T>(grad) + r * width, row, row + width, 1, to, to + width, no_y, width);
      }
    });
  });
  return out;
}

// The rows of swiglu.h in the version of one instruction set, for tests/ops/test_tiles.py: y, the gradients of gate and
// up, and that of s for each row. grad is what arrives from a product, in fp32 for bf16; nothing if the processor
// does not have the version.
std::vector<Tensor> swiglu_rows(std::string_view name, const Tensor& gate_up, const Tensor& grad, double s) {
  int64_t rows = grad.size(0), width = grad.size(1);
  std::vector<Tensor> found;
  by_dtype(gate_up.scalar_type(), "swiglu_rows", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const RowFunctions<W, T>* functions = find_rows<W, T>(name);
    if (!functions) return;
    Tensor x = gate_up.to(grad.scalar_type()), y = at::empty({rows, width}, gate_up.options());
    Tensor again = at::empty_like(y), dx = at::empty_like(gate_up), ds = at::empty({rows}, grad.options());
    for (int64_t r = 0; r < rows; r++) {
      const T* row = data<T>(gate_up) + 2 * r * width;
      T* to = output<T>(dx) + 2 * r * width;
      const W* wide = data<W>(x) + 2 * r * width;
      functions->forward(wide, wide + width, s, output<T>(y) + r * width, width);
      output<W>(ds)[r] = functions->backward(data<W>(grad) + r * width, row, row + width, s, to, to + width,
                                             output<T>(again) + r * width, width);
    }
    found = {y, again, dx, ds};
  });
  return found;
}

}  // namespace
}  // namespace moe_engine

TORCH_LIBRARY_FRAGMENT(moe_engine, m) {
  m.def("swiglu_rows(str version, Tensor gate_up, Tensor grad, float s) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(moe_engine, CPU, m) {
  m.impl("swiglu", moe_engine::swiglu);
  m.impl("swiglu_backward", moe_engine::swiglu_backward);
  m.impl("swiglu_rows", moe_engine::swiglu_rows);
}
