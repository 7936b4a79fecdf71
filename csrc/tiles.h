// Products of blocks of matrices whose sums stay in registers, compiled for several instruction sets in tiles.cpp.
//
//   dot     c[i][j]    = sum_k a[i][k] b[j][k]     both matrices are read where they lie
//   outer   c[i][j] (+)= sum_k a[i][k] b[k][j]     b is a panel: kPanel columns, packed, with zeros past the end
//
// T is fp32, fp64 or bf16 (Bits), sums are Wide<T>. bf16 is multiplied in words, two numbers that are neighbours along
// k: one instruction where the processor has AVX512-BF16, two fp32 products elsewhere. Left operands are given by
// pointers to their rows, so that a block can be gathered without copying it.
#pragma once

#include "simd.h"

#include <string_view>

namespace moe_engine {

constexpr int64_t kPanel = 64;   // columns of a panel
constexpr int64_t kDepth = 128;  // words along k of a panel: a panel fills half of a small first-level cache

template <typename T>
using Word = std::conditional_t<std::is_same_v<T, Bits>, uint32_t, T>;
template <typename T>
constexpr int64_t kPair = sizeof(Word<T>) / sizeof(T);  // numbers in a word

// c[m][n] = a b^T, with b[n][k], rows `ld` apart. c has room for m and n rounded up to multiples of 4.
template <typename T>
void dot(const T* const* a, int64_t m, const T* b, int64_t ld, int64_t n, int64_t k, Wide<T>* c, int64_t ldc);

// The left operand of outer: word w of row i lies at rows[i] + offset + w * step.
template <typename T>
struct Left {
  const T* const* rows;
  int64_t offset, step;
};

// Rows `ld` apart, of which kPanel columns are asked for from memory while outer computes.
template <typename T>
struct Next {
  const T* rows;
  int64_t ld;
};

// Where outer adds: to `wide`, or to nothing. It writes there, or, if there is an `out`, rounded to that and past the
// caches: `out` and its rows are then aligned to 64 bytes, and drain() has to follow.
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

// What was written past the caches is visible to other threads from here on.
void drain();

// to[w][c] = the word of numbers from[2w][c], from[2w+1][c] (fp32, fp64: from[w][c]) for columns of rows that start
// at from[.] + offset; 0 for rows past `rows` and for columns from `columns` to `padded`.
template <typename T>
void pack(const T* const* from, int64_t offset, int64_t rows, int64_t columns, int64_t padded, Word<T>* to);

// to[rows][columns] = from[rows][columns] rounded
template <typename T>
void round_rows(const Wide<T>* from, int64_t ld_from, T* to, int64_t ld_to, int64_t rows, int64_t columns);

// What one instruction set makes of these functions: avx512_bf16, avx512, avx2 or baseline. The functions above are the
// first of them that the processor has; find_version is for tests, and null for one that it lacks.
template <typename T>
struct Versions {
  decltype(&dot<T>) dot;
  decltype(&outer<T>) outer;
  decltype(&pack<T>) pack;
  decltype(&round_rows<T>) round_rows;
};
template <typename T>
const Versions<T>* find_version(std::string_view name);

}  // namespace moe_engine
