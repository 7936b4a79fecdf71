// The products of tiles.h. A tile is as many sums as fit in the registers of the instruction set:
//
//   dot     lanes run along k; as many sums as a vector has lanes are folded into one vector at the end
//   outer   lanes run along the columns of the panel; a word of a is spread over a vector and meets the panel's row
#include "tiles.h"

#include <algorithm>

// Vectors wider than the baseline's are arguments of inlined functions only.
#pragma GCC diagnostic ignored "-Wpsabi"
#define UNROLL _Pragma("GCC unroll 32")

namespace moe_engine {
namespace {

constexpr int64_t kSpan = 2048;  // bytes along k of the rows that dot keeps in the first-level cache
constexpr int64_t kNear = 8;     // rows of b that stay there
constexpr int kTall = 6;         // rows of a tile of outer

// What a version of the code may use: the size of a vector, and the instruction for bf16.
template <int size, bool has_bf16>
struct Machine {
  static constexpr int bytes = size, vectors = size == 64 ? 4 : 2;
  static constexpr bool bf16 = has_bf16;
};

template <typename E, int bytes>
struct Vectors {
  typedef E Type __attribute__((vector_size(bytes)));
};
template <typename T, typename M>
using Vector = typename Vectors<Wide<T>, M::bytes>::Type;
template <typename V>
using Lane = std::remove_reference_t<decltype(std::declval<V&>()[0])>;
template <typename V>
using Lanes = std::conditional_t<sizeof(Lane<V>) == 4, uint32_t, uint64_t>;
template <typename V>
using Integers = typename Vectors<Lanes<V>, sizeof(V)>::Type;

template <typename V>
INLINE V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename V>
INLINE V spread(const void* word) {
  Lanes<V> bits;
  std::memcpy(&bits, word, sizeof bits);
  return (V)(Integers<V>{} + bits);
}

template <typename T, typename M, typename V>
INLINE V multiply_add(V a, V b, V c) {
  if constexpr (!std::is_same_v<T, Bits>) {
    return c + a * b;
  } else if constexpr (M::bf16) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  } else {
    using I = Integers<V>;
    c += (V)((I)a << 16) * (V)((I)b << 16);
    return c + (V)((I)a & 0xffff0000u) * (V)((I)b & 0xffff0000u);
  }
}

// A vector whose lane j is a sum of two lanes of a where j has no bit `step`, of b where it has.
template <int step, typename V>
INLINE V merge(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(Lane<V>);
  Integers<V> first, second;
  for (int j = 0; j < lanes; j++) {
    first[j] = (j & step ? lanes : 0) + (j & ~step);
    second[j] = first[j] + step;
  }
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
}

// Lane i of v[0] becomes the sum of the lanes of v[i].
template <int half, typename V>
INLINE void fold(V* v) {
  UNROLL for (int i = 0; i < half; i++) v[i] = merge<half>(v[i], v[i + half]);
  if constexpr (half > 1) fold<half / 2>(v);
}

template <typename T, typename M>
struct DotTile {
  using V = Vector<T, M>;
  static constexpr int lanes = M::bytes / sizeof(Wide<T>), rows = lanes >= 8 ? 4 : 2, columns = lanes / rows;
  static constexpr int span = M::bytes / sizeof(T);

  static INLINE void run(const T* const* a, const T* const* b, const T* next, int64_t k, Wide<T>* c, int64_t ldc,
                         bool add) {
    const T *left[rows], *right[columns];
    UNROLL for (int i = 0; i < rows; i++) left[i] = a[i];
    UNROLL for (int j = 0; j < columns; j++) right[j] = b[j];
    V sums[lanes] = {};
    for (int64_t at = 0; at + span <= k; at += span) {
      __builtin_prefetch(next + at, 0, 2);
      step(left, right, at, sums);
    }
    if (int64_t rest = k % span; rest) {
      T ends[lanes / rows + rows][span] = {};
      UNROLL for (int i = 0; i < rows + columns; i++) {
        const T*& row = i < rows ? left[i] : right[i - rows];
        std::memcpy(ends[i], row + k - rest, rest * sizeof(T));
        row = ends[i];
      }
      step(left, right, 0, sums);
    }
    fold<lanes / 2>(sums);
    UNROLL for (int i = 0; i < rows; i++) {
      UNROLL for (int j = 0; j < columns; j++) {
        c[i * ldc + j] = sums[0][i * columns + j] + (add ? c[i * ldc + j] : 0);
      }
    }
  }

  static INLINE void step(const T* const* left, const T* const* right, int64_t at, V* sums) {
    V b[columns];
    UNROLL for (int j = 0; j < columns; j++) b[j] = load<V>(right[j] + at);
    UNROLL for (int i = 0; i < rows; i++) {
      V a = load<V>(left[i] + at);
      UNROLL for (int j = 0; j < columns; j++)
        sums[i * columns + j] = multiply_add<T, M>(a, b[j], sums[i * columns + j]);
    }
  }
};

// Rows past the last one are read as the last one; what they give lies past m and n.
// While a few rows of b meet all rows of a, the next few are asked for from memory, one by each tile.
template <typename T, typename M>
INLINE void dot_block(const T* const* a, int64_t m, const T* b, int64_t ld, int64_t n, int64_t k, Wide<T>* c,
                      int64_t ldc) {
  using Tile = DotTile<T, M>;
  constexpr int64_t span = kSpan / sizeof(T);
  for (int64_t k0 = 0; k0 < k; k0 += span) {
    for (int64_t j0 = 0; j0 < n; j0 += kNear) {
      const T *near[kNear], *next = b + (j0 + kNear) * ld + k0;
      for (int64_t j = 0; j < kNear; j++) near[j] = b + std::min(j0 + j, n - 1) * ld + k0;
      int64_t columns = std::min(kNear, n - j0), ahead = kNear;
      for (int64_t i = 0; i < m; i += Tile::rows) {
        const T* left[Tile::rows];
        for (int r = 0; r < Tile::rows; r++) left[r] = a[std::min(i + r, m - 1)] + k0;
        for (int64_t j = 0; j < columns; j += Tile::columns) {
          Tile::run(left, near + j, next, std::min(span, k - k0), c + i * ldc + j0 + j, ldc, k0 > 0);
          next = --ahead > 0 ? next + ld : near[0];
        }
      }
    }
  }
}

template <int rows, typename T, typename M>
INLINE void outer_tile(const T* const* a, int64_t offset, int64_t step, const Word<T>* panel, int64_t depth, const T* next,
                       int64_t stride, Wide<T>* c, int64_t ldc, bool add) {
  using V = Vector<T, M>;
  constexpr int lanes = M::bytes / sizeof(Wide<T>);
  const T* left[rows];
  V sums[rows][M::vectors];
  UNROLL for (int i = 0; i < rows; i++) {
    left[i] = a[i] + offset;
    UNROLL for (int j = 0; j < M::vectors; j++) sums[i][j] = add ? load<V>(c + i * ldc + j * lanes) : V{};
  }
  for (int64_t k = 0; k < depth; k++) {
    __builtin_prefetch(next + k * stride, 0, 2);
    __builtin_prefetch(reinterpret_cast<const char*>(next + k * stride) + 64, 0, 2);
    V b[M::vectors];
    UNROLL for (int j = 0; j < M::vectors; j++) b[j] = load<V>(panel + k * kPanel + j * lanes);
    UNROLL for (int i = 0; i < rows; i++) {
      V word = spread<V>(left[i] + k * step);
      UNROLL for (int j = 0; j < M::vectors; j++) sums[i][j] = multiply_add<T, M>(word, b[j], sums[i][j]);
    }
  }
  UNROLL for (int i = 0; i < rows; i++) {
    UNROLL for (int j = 0; j < M::vectors; j++) std::memcpy(c + i * ldc + j * lanes, &sums[i][j], sizeof(V));
  }
}

template <typename T, typename M>
INLINE void outer_block(const T* const* a, int64_t offset, int64_t step, int64_t m, const Word<T>* panel, int64_t depth,
                        const T* next, int64_t stride, Wide<T>* c, int64_t ldc, bool add) {
  constexpr int64_t wide = M::vectors * M::bytes / sizeof(Wide<T>);
  for (int64_t i = 0; i < m; i += kTall) {
    const T* half = next + (i / kTall % 2) * (kPair<T> > 1 ? stride : kPanel / 2);
    for (int64_t j = 0; j < kPanel; j += wide) {
      const Word<T>* b = panel + j;
      Wide<T>* out = c + i * ldc + j;
      switch (m - i) {
#define TILE(rows) outer_tile<rows, T, M>(a + i, offset, step, b, depth, half, kPair<T> * stride, out, ldc, add)
        case 1: TILE(1); break;
        case 2: TILE(2); break;
        case 3: TILE(3); break;
        case 4: TILE(4); break;
        case 5: TILE(5); break;
        default: TILE(kTall);
#undef TILE
      }
    }
  }
}

template <typename T>
struct Versions {
  decltype(&dot<T>) dot;
  decltype(&outer<T>) outer;
};

// A version of both products: `target` is the attribute that allows its instructions.
#define VERSION(name, target, ...)                                                                                   \
  template <typename T>                                                                                              \
  target void dot_##name(const T* const* a, int64_t m, const T* b, int64_t ld, int64_t n, int64_t k, Wide<T>* c,     \
                         int64_t ldc) {                                                                              \
    dot_block<T, Machine<__VA_ARGS__>>(a, m, b, ld, n, k, c, ldc);                                                   \
  }                                                                                                                  \
  template <typename T>                                                                                              \
  target void outer_##name(const T* const* a, int64_t offset, int64_t step, int64_t m, const Word<T>* panel,         \
                           int64_t depth, const T* next, int64_t stride, Wide<T>* c, int64_t ldc, bool add) {        \
    outer_block<T, Machine<__VA_ARGS__>>(a, offset, step, m, panel, depth, next, stride, c, ldc, add);               \
  }

VERSION(baseline, , 16, false)
#if defined(__x86_64__)
VERSION(avx2, __attribute__((target("avx2,fma"))), 32, false)
VERSION(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), 64, false)
VERSION(bf16, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), 64, true)
#endif

template <typename T>
Versions<T> choose() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Versions<T>{dot_bf16<T>, outer_bf16<T>}
                                                : Versions<T>{dot_avx512<T>, outer_avx512<T>};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {dot_avx2<T>, outer_avx2<T>};
#endif
  return {dot_baseline<T>, outer_baseline<T>};
}

template <typename T>
const Versions<T>& version() {
  static const Versions<T> chosen = choose<T>();
  return chosen;
}

INLINE void pack_word(const Bits* const* from, int64_t offset, bool alone, int64_t columns, uint32_t* to) {
  const Bits *first = from[0] + offset, *second = from[alone ? 0 : 1] + offset;
  for (int64_t c = 0; c < columns; c++) to[c] = first[c] | (alone ? 0 : static_cast<uint32_t>(second[c]) << 16);
}
template <typename T>
INLINE void pack_word(const T* const* from, int64_t offset, bool, int64_t columns, T* to) {
  for (int64_t c = 0; c < columns; c++) to[c] = from[0][offset + c];
}

template <typename T>
INLINE void pack_rows(const T* const* from, int64_t offset, int64_t rows, int64_t columns, int64_t padded,
                      Word<T>* to) {
  for (int64_t r = 0; r < rows; r += kPair<T>, to += padded) {
    if (r + kPair<T> <= rows && columns == kPanel) {
      pack_word(from + r, offset, false, kPanel, to);
    } else {
      pack_word(from + r, offset, r + 1 == rows, columns, to);
      for (int64_t c = columns; c < padded; c++) to[c] = 0;
    }
  }
}
MULTIVERSION void pack_block(const float* const* from, int64_t offset, int64_t rows, int64_t columns, int64_t padded,
                             float* to) {
  pack_rows(from, offset, rows, columns, padded, to);
}
MULTIVERSION void pack_block(const Bits* const* from, int64_t offset, int64_t rows, int64_t columns, int64_t padded,
                             uint32_t* to) {
  pack_rows(from, offset, rows, columns, padded, to);
}
void pack_block(const double* const* from, int64_t offset, int64_t rows, int64_t columns, int64_t padded, double* to) {
  pack_rows(from, offset, rows, columns, padded, to);
}

MULTIVERSION void narrow_row(const float* from, Bits* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) narrow(from[i], to[i]);
}
template <typename T>
void narrow_row(const T* from, T* to, int64_t count) {
  std::memcpy(to, from, count * sizeof(T));
}

}  // namespace

template <typename T>
void dot(const T* const* a, int64_t m, const T* b, int64_t ld, int64_t n, int64_t k, Wide<T>* c, int64_t ldc) {
  version<T>().dot(a, m, b, ld, n, k, c, ldc);
}

template <typename T>
void outer(const T* const* a, int64_t offset, int64_t step, int64_t m, const Word<T>* panel, int64_t depth, const T* next,
           int64_t stride, Wide<T>* c, int64_t ldc, bool add) {
  version<T>().outer(a, offset, step, m, panel, depth, next, stride, c, ldc, add);
}

template <typename T>
void pack(const T* const* from, int64_t offset, int64_t rows, int64_t columns, int64_t padded, Word<T>* to) {
  pack_block(from, offset, rows, columns, padded, to);
}

template <typename T>
void round_row(const Wide<T>* from, T* to, int64_t count) {
  narrow_row(from, to, count);
}

#define INSTANTIATE(T)                                                                                                \
  template void dot(const T* const*, int64_t, const T*, int64_t, int64_t, int64_t, Wide<T>*, int64_t);                \
  template void outer(const T* const*, int64_t, int64_t, int64_t, const Word<T>*, int64_t, const T*, int64_t, Wide<T>*, int64_t, bool);  \
  template void pack(const T* const*, int64_t, int64_t, int64_t, int64_t, Word<T>*);                                  \
  template void round_row(const Wide<T>*, T*, int64_t);

INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(Bits)

}  // namespace moe_engine
