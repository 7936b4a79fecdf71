// The products of tiles.h. A tile is as many sums as fit in the registers of the instruction set:
//
//   dot     lanes run along k; as many sums as a vector has lanes are folded into one vector at the end
//   outer   lanes run along the columns of the panel; a word of a is spread over a vector and meets the panel's row
#include "tiles.h"

#include <algorithm>

#define UNROLL _Pragma("GCC unroll 32")

namespace moe_engine {
namespace {

constexpr int64_t kSpan = 3072;  // most bytes along k of the rows that dot keeps in the first-level cache
constexpr int64_t kNear = 8;     // rows of b that stay there
constexpr int64_t kAsk = 3;      // rows that a tile of dot asks for from memory while it computes
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

// Write a vector; `stream` past the caches, to an address that is a multiple of its size.
template <bool stream, typename V>
INLINE void write(V v, void* to) {
#if defined(__x86_64__)
  if constexpr (stream) {
    asm volatile("vmovntps %1, %0" : "=m"(*static_cast<V*>(to)) : "v"(v));
    return;
  }
#endif
  std::memcpy(to, &v, sizeof v);
}

// to[.] = the lanes of two vectors, rounded to nearest, ties to even; NaN stays NaN.
template <typename T, typename M, bool stream, typename V>
INLINE void write_rounded(V low, V high, T* to) {
  if constexpr (!std::is_same_v<T, Bits>) {
    write<stream>(low, to);
    write<stream>(high, to + sizeof low / sizeof(T));
  } else if constexpr (M::bf16) {
    V both;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(low), "v"(high));
    write<stream>(both, to);
  } else {
    using Half = typename Vectors<Bits, sizeof(V) / 2>::Type;
    UNROLL for (int i = 0; i < 2; i++) {
      V value = i ? high : low;
      Integers<V> bits = (Integers<V>)value;
      bits = value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
      write<false>(__builtin_convertvector(bits, Half), to + i * sizeof(Half) / sizeof(T));
    }
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

  static INLINE void run(const T* const* a, const T* const* b, const T* const* ask, int64_t k, Wide<T>* c, int64_t ldc,
                         bool add) {
    const T *left[rows], *right[columns];
    UNROLL for (int i = 0; i < rows; i++) left[i] = a[i];
    UNROLL for (int j = 0; j < columns; j++) right[j] = b[j];
    V sums[lanes] = {};
    for (int64_t at = 0; at + span <= k; at += span) {
      UNROLL for (int i = 0; i < kAsk; i++) __builtin_prefetch(ask[i] + at, 0, 3);
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
    constexpr size_t line = columns * sizeof(Wide<T>);
    alignas(V) Wide<T> tile[rows][columns];
    if (add) {
      UNROLL for (int i = 0; i < rows; i++) std::memcpy(tile[i], c + i * ldc, line);
      sums[0] += load<V>(tile);
    }
    std::memcpy(tile, sums, sizeof tile);
    UNROLL for (int i = 0; i < rows; i++) std::memcpy(c + i * ldc, tile[i], line);
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
// While a few rows of b meet all rows of a, their tiles ask for the next few, and for the next rows of a.
template <typename T, typename M>
INLINE void dot_block(const T* const* a, int64_t m, const T* b, int64_t ld, int64_t n, int64_t k, Wide<T>* c,
                      int64_t ldc) {
  using Tile = DotTile<T, M>;
  constexpr int64_t line = 64 / sizeof(T), most = kSpan / sizeof(T);
  int64_t spans = std::max<int64_t>(1, (k + most - 1) / most), even = (k + spans - 1) / spans;
  int64_t span = (even + line - 1) / line * line;
  int64_t tiles = (m + Tile::rows - 1) / Tile::rows * (kNear / Tile::columns), share = (kNear + tiles - 1) / tiles;
  for (int64_t k0 = 0; k0 < k; k0 += span) {
    for (int64_t j0 = 0; j0 < n; j0 += kNear) {
      const T *near[kNear], *left[2 * Tile::rows];
      for (int64_t j = 0; j < kNear; j++) near[j] = b + std::min(j0 + j, n - 1) * ld + k0;
      int64_t columns = std::min(kNear, n - j0), asked = kNear;
      for (int64_t i = 0; i < m; i += Tile::rows) {
        for (int r = 0; r < 2 * Tile::rows; r++) left[r] = a[std::min(i + r, m - 1)] + k0;
        for (int64_t j = 0; j < columns; j += Tile::columns) {
          const T *ask[kAsk], *const* below = left + Tile::rows;
          for (int64_t r = 0; r < kAsk; r++) {
            bool ahead = r < share && asked < 2 * kNear;
            ask[r] = ahead ? b + (j0 + asked++) * ld + k0 : below[(j / Tile::columns * kAsk + r) % Tile::rows];
          }
          Tile::run(left, near + j, ask, std::min(span, k - k0), c + i * ldc + j0 + j, ldc, k0 > 0);
        }
      }
    }
  }
}

// Ask for two lines from memory.
INLINE void ask(const void* at) {
  __builtin_prefetch(at, 0, 2);
  __builtin_prefetch(static_cast<const char*>(at) + 64, 0, 2);
}

template <int rows, typename T, typename M>
INLINE void outer_tile(const Left<T>& a, int64_t row, const Word<T>* panel, int64_t depth, const T* next,
                       const T* other, int64_t ld_next, const Sums<T>& c, int64_t column) {
  using V = Vector<T, M>;
  constexpr int lanes = M::bytes / sizeof(Wide<T>);
  Wide<T>* wide = c.wide + row * c.ld + column;
  const T* left[rows];
  V sums[rows][M::vectors];
  UNROLL for (int i = 0; i < rows; i++) {
    left[i] = a.rows[row + i] + a.offset;
    UNROLL for (int j = 0; j < M::vectors; j++) sums[i][j] = c.add ? load<V>(wide + i * c.ld + j * lanes) : V{};
  }
  for (int64_t k = 0; k < depth; k++) {
    ask(next + k * kPair<T> * ld_next);
    if (other) ask(other + k * kPair<T> * ld_next);
    V b[M::vectors];
    UNROLL for (int j = 0; j < M::vectors; j++) b[j] = load<V>(panel + k * kPanel + column + j * lanes);
    UNROLL for (int i = 0; i < rows; i++) {
      V word = spread<V>(left[i] + k * a.step);
      UNROLL for (int j = 0; j < M::vectors; j++) sums[i][j] = multiply_add<T, M>(word, b[j], sums[i][j]);
    }
  }
  UNROLL for (int i = 0; i < rows; i++) {
    UNROLL for (int j = 0; j < M::vectors; j += 2) {
      if (c.out) {
        T* out = c.out + (row + i) * c.ld_out + column + j * lanes;
        write_rounded<T, M, (M::bytes > 16)>(sums[i][j], sums[i][j + 1], out);
      } else {
        write_rounded<Wide<T>, M, false>(sums[i][j], sums[i][j + 1], wide + i * c.ld + j * lanes);
      }
    }
  }
}

template <typename T, typename M>
INLINE void outer_block(const Left<T>& a, int64_t m, const Word<T>* panel, int64_t depth, const Next<T>& next,
                        const Sums<T>& c) {
  constexpr int64_t wide = M::vectors * M::bytes / sizeof(Wide<T>);
  for (int64_t i = 0; i < m; i += kTall) {
    // the first tile asks for half of the next panel, the second, if there is one, for the rest
    int64_t rest = kPair<T> > 1 ? next.ld : kPanel / 2;
    const T *half = next.rows + (i / kTall % 2) * rest, *other = m <= kTall ? half + rest : nullptr;
    for (int64_t j = 0; j < kPanel; j += wide) {
      switch (m - i) {
        case 1: outer_tile<1, T, M>(a, i, panel, depth, half, other, next.ld, c, j); break;
        case 2: outer_tile<2, T, M>(a, i, panel, depth, half, other, next.ld, c, j); break;
        case 3: outer_tile<3, T, M>(a, i, panel, depth, half, other, next.ld, c, j); break;
        case 4: outer_tile<4, T, M>(a, i, panel, depth, half, other, next.ld, c, j); break;
        case 5: outer_tile<5, T, M>(a, i, panel, depth, half, other, next.ld, c, j); break;
        default: outer_tile<kTall, T, M>(a, i, panel, depth, half, other, next.ld, c, j);
      }
    }
  }
}

template <typename T, typename M>
INLINE void round_block(const Wide<T>* from, int64_t ld_from, T* to, int64_t ld_to, int64_t rows, int64_t columns) {
  using V = Vector<T, M>;
  constexpr int64_t lanes = M::bytes / sizeof(Wide<T>);
  for (int64_t r = 0; r < rows; r++, from += ld_from, to += ld_to) {
    int64_t c = 0;
    for (; c + 2 * lanes <= columns; c += 2 * lanes)
      write_rounded<T, M, false>(load<V>(from + c), load<V>(from + c + lanes), to + c);
    for (; c < columns; c++) narrow(from[c], to[c]);
  }
}

// The words of one or two rows; `alone` if the second is past the end.
INLINE void pack_word(const Bits* const* from, int64_t offset, bool alone, int64_t columns, uint32_t* to) {
  const Bits *first = from[0] + offset, *second = from[alone ? 0 : 1] + offset;
  for (int64_t c = 0; c < columns; c++) to[c] = first[c] | (alone ? 0 : static_cast<uint32_t>(second[c]) << 16);
}
template <typename T>
INLINE void pack_word(const T* const* from, int64_t offset, bool, int64_t columns, T* to) {
  std::memcpy(to, from[0] + offset, columns * sizeof(T));
}

template <typename T>
INLINE void pack_block(const T* const* from, int64_t offset, int64_t rows, int64_t columns, int64_t padded,
                       Word<T>* to) {
  for (int64_t r = 0; r < rows; r += kPair<T>, to += padded) {
    if (r + kPair<T> <= rows && columns == kPanel) {
      pack_word(from + r, offset, false, kPanel, to);
    } else {
      pack_word(from + r, offset, r + 1 == rows, columns, to);
    }
    for (int64_t c = columns; c < padded; c++) to[c] = 0;
  }
}

// A version of each function: `allow` is the attribute that lets it use its instructions.
#define VERSION(name, allow, ...)                                                                                     \
  template <typename T>                                                                                               \
  struct name {                                                                                                       \
    using M = Machine<__VA_ARGS__>;                                                                                   \
    allow static void dot(const T* const* a, int64_t m, const T* b, int64_t ld, int64_t n, int64_t k, Wide<T>* c,     \
                          int64_t ldc) {                                                                              \
      dot_block<T, M>(a, m, b, ld, n, k, c, ldc);                                                                     \
    }                                                                                                                 \
    allow static void outer(const Left<T>& a, int64_t m, const Word<T>* panel, int64_t depth, const Next<T>& next,    \
                            const Sums<T>& c) {                                                                       \
      outer_block<T, M>(a, m, panel, depth, next, c);                                                                 \
    }                                                                                                                 \
    allow static void pack(const T* const* from, int64_t offset, int64_t rows, int64_t columns, int64_t padded,       \
                           Word<T>* to) {                                                                             \
      pack_block(from, offset, rows, columns, padded, to);                                                            \
    }                                                                                                                 \
    allow static void round_rows(const Wide<T>* from, int64_t ld_from, T* to, int64_t ld_to, int64_t rows,            \
                                 int64_t columns) {                                                                   \
      round_block<T, M>(from, ld_from, to, ld_to, rows, columns);                                                     \
    }                                                                                                                 \
    static constexpr Versions<T> all{dot, outer, pack, round_rows};                                                   \
  };

VERSION(Baseline, , 16, false)
#if defined(__x86_64__)
VERSION(Avx2, __attribute__((target("avx2,fma"))), 32, false)
VERSION(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), 64, false)
VERSION(Avx512Bf16, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), 64, true)
#endif

template <typename T>
const Versions<T>& version() {
  static const Versions<T>& chosen = *[] {
    const Versions<T>* found = nullptr;
    for (const char* name : {"avx512_bf16", "avx512", "avx2", "baseline"}) {
      if (!found) found = find_version<T>(name);
    }
    return found;
  }();
  return chosen;
}

}  // namespace

template <typename T>
const Versions<T>* find_version(std::string_view name) {
#if defined(__x86_64__)
  bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl");
  if (name == "avx512_bf16" && avx512 && __builtin_cpu_supports("avx512bf16")) return &Avx512Bf16<T>::all;
  if (name == "avx512" && avx512) return &Avx512<T>::all;
  if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &Avx2<T>::all;
#endif
  return name == "baseline" ? &Baseline<T>::all : nullptr;
}

template <typename T>
void dot(const T* const* a, int64_t m, const T* b, int64_t ld, int64_t n, int64_t k, Wide<T>* c, int64_t ldc) {
  version<T>().dot(a, m, b, ld, n, k, c, ldc);
}

template <typename T>
void outer(const Left<T>& a, int64_t m, const Word<T>* panel, int64_t depth, const Next<T>& next, const Sums<T>& c) {
  version<T>().outer(a, m, panel, depth, next, c);
}

template <typename T>
void pack(const T* const* from, int64_t offset, int64_t rows, int64_t columns, int64_t padded, Word<T>* to) {
  version<T>().pack(from, offset, rows, columns, padded, to);
}

template <typename T>
void round_rows(const Wide<T>* from, int64_t ld_from, T* to, int64_t ld_to, int64_t rows, int64_t columns) {
  version<T>().round_rows(from, ld_from, to, ld_to, rows, columns);
}

void drain() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

#define INSTANTIATE(T)                                                                                             \
  template const Versions<T>* find_version(std::string_view);                                                      \
  template void dot(const T* const*, int64_t, const T*, int64_t, int64_t, int64_t, Wide<T>*, int64_t);             \
  template void outer(const Left<T>&, int64_t, const Word<T>*, int64_t, const Next<T>&, const Sums<T>&);           \
  template void pack(const T* const*, int64_t, int64_t, int64_t, int64_t, Word<T>*);                               \
  template void round_rows(const Wide<T>*, int64_t, T*, int64_t, int64_t, int64_t);

INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(Bits)

}  // namespace moe_engine
