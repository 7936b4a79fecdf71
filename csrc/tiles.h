// The product of two blocks of matrices whose sums stay in registers, compiled for several instruction sets.
//
//   c[i][j] (+)= sum_k a[i][k] b[k][j]
//
// b is a panel: kPanel columns, packed from rows along j (pack) or along k (pack_across), with zeros past the end. T is
// fp32, fp64 or bf16 (Bits), sums are Wide<T>. bf16 is multiplied in words, two numbers that are neighbours along k:
// one instruction where the processor has AVX512-BF16, two fp32 products elsewhere. The rows of a are given by
// pointers, so that a block can be gathered without copying it.
#pragma once

#include "machine.h"

namespace moe_engine {

constexpr int64_t kPanel = 64;   // columns of a panel
constexpr int64_t kDepth = 64;   // words along k of a panel, 16 KiB in fp32 and bf16: it stays in the first-level cache

template <typename T>
using Word = std::conditional_t<std::is_same_v<T, Bits>, uint32_t, T>;
template <typename T>
constexpr int64_t kPair = sizeof(Word<T>) / sizeof(T);  // numbers in a word

// The left operand of outer: word w of row i lies at rows[i] + offset + w * step.
template <typename T>
struct Left {
  const T* const* rows;
  int64_t offset, step;
};

// What outer asks for from memory while it computes, the numbers of the next panel: for each word along k two pieces of
// 128 bytes, at first + word * step and `half` further.
template <typename T>
struct Next {
  const T* first = nullptr;
  int64_t step = 0, half = 0;

  // b[k][j], rows `ld` apart
  static Next down(const T* first, int64_t ld) { return {first, kPair<T> * ld, kPair<T> > 1 ? ld : kPanel / 2}; }
  // b[j][k], rows `ld` apart: as many as a panel is deep
  static Next across(const T* first, int64_t ld) { return {first, ld, 128 / sizeof(T)}; }
};
static_assert(kDepth == kPanel);

// Where outer adds: to `wide`, or to nothing. It writes there, or, if there is an `out`, rounded to that and past the
// caches: `out` and its rows are then aligned() and drain() has to follow.
template <typename T>
struct Sums {
  Wide<T>* wide;
  int64_t ld;
  bool add;
  T* out = nullptr;
  int64_t ld_out = 0;
};

// c[m][kPanel] (+)= a b over `depth` words
template <typename T>
void outer(const Left<T>& a, int64_t m, const Word<T>* panel, int64_t depth, const Next<T>& next, const Sums<T>& c);

// May rows of `width` from `base` be written past the caches?
template <typename T>
bool aligned(const T* base, int64_t width) {
  return (reinterpret_cast<uintptr_t>(base) | width * sizeof(T)) % 64 == 0;
}

// What was written past the caches is visible to other threads from here on.
void drain();

// to[w][c] = the word of numbers from[2w][c], from[2w+1][c] (fp32, fp64: from[w][c]) for columns of rows that start
// at from[.] + offset; 0 for rows past `rows` and for columns from `columns` to `padded`.
template <typename T>
void pack(const T* const* from, int64_t offset, int64_t rows, int64_t columns, int64_t padded, Word<T>* to);

// to[w][c] = word w of row c of from[columns][depth], rows `ld` apart; 0 past `depth` and from `columns` to kPanel.
template <typename T>
void pack_across(const T* from, int64_t ld, int64_t columns, int64_t depth, Word<T>* to);

// to[rows][columns] = from[rows][columns] rounded; `past` the caches if so, which asks for the same as `out` of Sums.
template <typename T>
void round_rows(const Wide<T>* from, int64_t ld_from, T* to, int64_t ld_to, int64_t rows, int64_t columns,
                bool past = false);

// What one instruction set makes of these functions: those above are the ones of best(). Null where the processor does
// not have it.
template <typename T>
struct Tiles {
  decltype(&outer<T>) outer;
  decltype(&pack<T>) pack;
  decltype(&pack_across<T>) pack_across;
  decltype(&round_rows<T>) round_rows;
};
template <typename T>
const Tiles<T>* find_tiles(std::string_view machine);

}  // namespace moe_engine
