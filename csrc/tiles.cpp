// The product of tiles.h. A tile is as many sums as fit in the registers of the instruction set: its lanes run along
// the columns of the panel, and a word of a is spread over a vector and meets the panel's row.
#include "tiles.h"

#include <algorithm>

namespace moe_engine {
namespace {

constexpr int kTall = 6;  // rows of a tile

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

// Ask for two lines from memory.
INLINE void ask(const void* at) {
  __builtin_prefetch(at, 0, 2);
  __builtin_prefetch(static_cast<const char*>(at) + 64, 0, 2);
}

template <int rows, typename T, typename M>
INLINE void outer_tile(const Left<T>& a, int64_t row, const Word<T>* panel, int64_t depth, const Next<T>& next,
                       int halves, const Sums<T>& c, int64_t column) {
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
    const T* ahead = next.first + k * next.step;
    if (halves & 1) ask(ahead);
    if (halves & 2) ask(ahead + next.half);
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
    // the first tile asks for one half of what is next, the second, if there is one, for the other
    int halves = !next.first ? 0 : m <= kTall ? 3 : 1 + i / kTall % 2;
    for (int64_t j = 0; j < kPanel; j += wide) {
      switch (m - i) {
        case 1: outer_tile<1, T, M>(a, i, panel, depth, next, halves, c, j); break;
        case 2: outer_tile<2, T, M>(a, i, panel, depth, next, halves, c, j); break;
        case 3: outer_tile<3, T, M>(a, i, panel, depth, next, halves, c, j); break;
        case 4: outer_tile<4, T, M>(a, i, panel, depth, next, halves, c, j); break;
        case 5: outer_tile<5, T, M>(a, i, panel, depth, next, halves, c, j); break;
        default: outer_tile<kTall, T, M>(a, i, panel, depth, next, halves, c, j);
      }
    }
  }
}

template <bool stream, typename T, typename M>
INLINE void round_block(const Wide<T>* from, int64_t ld_from, T* to, int64_t ld_to, int64_t rows, int64_t columns) {
  using V = Vector<T, M>;
  constexpr int64_t lanes = M::bytes / sizeof(Wide<T>);
  for (int64_t r = 0; r < rows; r++, from += ld_from, to += ld_to) {
    int64_t c = 0;
    for (; c + 2 * lanes <= columns; c += 2 * lanes)
      write_rounded<T, M, stream>(load<V>(from + c), load<V>(from + c + lanes), to + c);
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

// Of the 16 bytes at each place of a and b, the lower or the upper halves: `unit` lanes of a, then of b, and so on.
template <int unit, bool upper, typename V>
INLINE V interleave(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(Lane<V>), piece = 16 / sizeof(Lane<V>);
  Integers<V> from;
  for (int j = 0; j < lanes; j++) {
    int place = j % piece / unit, lane = j - j % piece + (upper ? piece / 2 : 0) + place / 2 * unit + j % unit;
    from[j] = place % 2 ? lanes + lane : lane;
  }
  return __builtin_shuffle(a, b, from);
}

// Every second piece of 16 bytes of a, then of b.
template <bool odd, typename V>
INLINE V every_second(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(Lane<V>), piece = 16 / sizeof(Lane<V>);
  Integers<V> from;
  for (int j = 0; j < lanes; j++) from[j] = (2 * (j / piece) + odd) * piece + j % piece;
  return __builtin_shuffle(a, b, from);
}

template <int unit, typename V>
INLINE void transpose_pieces(V* v) {
  constexpr int lanes = sizeof(V) / sizeof(Lane<V>), piece = 16 / sizeof(Lane<V>);
  if constexpr (unit < piece) {
    UNROLL for (int i = 0; i < lanes; i++) {
      if (i & unit) continue;
      V a = v[i], b = v[i + unit];
      v[i] = interleave<unit, false>(a, b);
      v[i + unit] = interleave<unit, true>(a, b);
    }
    transpose_pieces<2 * unit>(v);
  } else if constexpr (unit < lanes) {
    UNROLL for (int i = 0; i < lanes; i++) {
      if (i & unit) continue;
      V a = v[i], b = v[i + unit];
      v[i] = every_second<false>(a, b);
      v[i + unit] = every_second<true>(a, b);
    }
    transpose_pieces<2 * unit>(v);
  }
}

// to[w][.] = word w of the rows of `from`, for as many words and rows as a vector has lanes
template <typename V>
INLINE void transpose(const void* from, int64_t bytes, void* to, int64_t bytes_to) {
  constexpr int lanes = sizeof(V) / sizeof(Lane<V>);
  V v[lanes];
  UNROLL for (int i = 0; i < lanes; i++) v[i] = load<V>(static_cast<const char*>(from) + i * bytes);
  transpose_pieces<1>(v);
  UNROLL for (int w = 0; w < lanes; w++) {
    int place = 16 / sizeof(Lane<V>) == 4 ? (w & ~3) | (w & 1) << 1 | (w & 2) >> 1 : w;  // where its pieces met
    write<false>(v[place], static_cast<char*>(to) + w * bytes_to);
  }
}

template <typename T, typename M>
INLINE void pack_across_block(const T* from, int64_t ld, int64_t columns, int64_t depth, Word<T>* to) {
  using W = Word<T>;
  using V = typename Vectors<W, M::bytes>::Type;
  constexpr int64_t lanes = M::bytes / sizeof(W), deep = lanes * kPair<T>;
  int64_t words = (depth + kPair<T> - 1) / kPair<T>;
  for (int64_t c = 0; c < kPanel; c += lanes) {
    for (int64_t w = 0; w < words; w += lanes) {
      const T* corner = from + c * ld + w * kPair<T>;
      W* place = to + w * kPanel + c;
      int64_t numbers = std::min(deep, depth - w * kPair<T>);
      if (c + lanes <= columns && numbers == deep) {
        transpose<V>(corner, ld * sizeof(T), place, kPanel * sizeof(W));
        continue;
      }
      alignas(V) W square[lanes][lanes] = {}, turned[lanes][lanes];
      for (int64_t i = 0; i < std::min(lanes, columns - c); i++)
        std::memcpy(square[i], corner + i * ld, numbers * sizeof(T));
      transpose<V>(square, sizeof square[0], turned, sizeof turned[0]);
      for (int64_t i = 0; i < std::min(lanes, words - w); i++)
        std::memcpy(place + i * kPanel, turned[i], sizeof turned[i]);
    }
  }
}

#define VERSION(name, allow, ...)                                                                                     \
  template <typename T>                                                                                               \
  struct name {                                                                                                       \
    using M = Machine<__VA_ARGS__>;                                                                                   \
    allow static void outer(const Left<T>& a, int64_t m, const Word<T>* panel, int64_t depth, const Next<T>& next,    \
                            const Sums<T>& c) {                                                                       \
      outer_block<T, M>(a, m, panel, depth, next, c);                                                                 \
    }                                                                                                                 \
    allow static void pack(const T* const* from, int64_t offset, int64_t rows, int64_t columns, int64_t padded,       \
                           Word<T>* to) {                                                                             \
      pack_block(from, offset, rows, columns, padded, to);                                                            \
    }                                                                                                                 \
    allow static void pack_across(const T* from, int64_t ld, int64_t columns, int64_t depth, Word<T>* to) {           \
      pack_across_block<T, M>(from, ld, columns, depth, to);                                                          \
    }                                                                                                                 \
    allow static void round_rows(const Wide<T>* from, int64_t ld_from, T* to, int64_t ld_to, int64_t rows,            \
                                 int64_t columns, bool past) {                                                        \
      if (past) return round_block<(M::bytes > 16), T, M>(from, ld_from, to, ld_to, rows, columns);                   \
      round_block<false, T, M>(from, ld_from, to, ld_to, rows, columns);                                              \
    }                                                                                                                 \
    static constexpr Tiles<T> all{outer, pack, pack_across, round_rows};                                              \
  };
MACHINES(VERSION)
#undef VERSION

template <typename T>
const Tiles<T>& chosen() {
  static const Tiles<T>& tiles = *find_tiles<T>(best());
  return tiles;
}

}  // namespace

template <typename T>
const Tiles<T>* find_tiles(std::string_view machine) {
  if (!supports(machine)) return nullptr;
#define VERSION(name, ...) if (machine == #name) return &name<T>::all;
  MACHINES(VERSION)
#undef VERSION
  return nullptr;
}

template <typename T>
void outer(const Left<T>& a, int64_t m, const Word<T>* panel, int64_t depth, const Next<T>& next, const Sums<T>& c) {
  chosen<T>().outer(a, m, panel, depth, next, c);
}

template <typename T>
void pack(const T* const* from, int64_t offset, int64_t rows, int64_t columns, int64_t padded, Word<T>* to) {
  chosen<T>().pack(from, offset, rows, columns, padded, to);
}

template <typename T>
void pack_across(const T* from, int64_t ld, int64_t columns, int64_t depth, Word<T>* to) {
  chosen<T>().pack_across(from, ld, columns, depth, to);
}

template <typename T>
void round_rows(const Wide<T>* from, int64_t ld_from, T* to, int64_t ld_to, int64_t rows, int64_t columns, bool past) {
  chosen<T>().round_rows(from, ld_from, to, ld_to, rows, columns, past);
}

void drain() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

#define INSTANTIATE(T)                                                                                             \
  template const Tiles<T>* find_tiles(std::string_view);                                                           \
  template void outer(const Left<T>&, int64_t, const Word<T>*, int64_t, const Next<T>&, const Sums<T>&);           \
  template void pack(const T* const*, int64_t, int64_t, int64_t, int64_t, Word<T>*);                               \
  template void pack_across(const T*, int64_t, int64_t, int64_t, Word<T>*);                                        \
  template void round_rows(const Wide<T>*, int64_t, T*, int64_t, int64_t, int64_t, bool);

INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(Bits)

}  // namespace moe_engine
