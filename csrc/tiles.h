// Products of blocks of matrices whose sums stay in registers, compiled for several instruction sets in tiles.cpp.
//
//   dot     c[i][j] (+)= sum_k a[i][k] b[j][k]     both matrices are read where they lie, whatever their row lengths
//   outer   c[i][j] (+)= sum_k a[i][k] b[k][j]     b is a panel: kPanel columns packed by pack_panel, zeros past the end
//
// T is fp32, fp64 or bf16 (Bits), sums are Wide<T>. bf16 is multiplied in words, two numbers that are neighbours along
// k: one instruction where the processor has AVX512-BF16, two fp32 products elsewhere. Left operands are given by
// pointers to their rows, so that a block can be gathered without copying it.
#pragma once

#include "simd.h"

namespace moe_engine {

constexpr int64_t kPanel = 64;   // columns of a panel
constexpr int64_t kDepth = 128;  // words along k of a panel: a panel fills half of a small first-level cache

template <typename T>
using Word = std::conditional_t<std::is_same_v<T, Bits>, uint32_t, T>;
template <typename T>
constexpr int64_t kPair = sizeof(Word<T>) / sizeof(T);  // numbers in a word

// c[m][n] = a b^T, with b[n][k] and rows of b `ld` apart. c has room for m and n rounded up to multiples of 4.
template <typename T>
void dot(const T* const* a, int64_t m, const T* b, int64_t ld, int64_t n, int64_t k, Wide<T>* c, int64_t ldc);

// c[m][kPanel] (+)= a b over `depth` words; word w of row i of a lies at a[i] + offset + w * step. Meanwhile a block of
// kPanel columns that starts at `next`, with rows `stride` apart, is asked for from memory.
template <typename T>
void outer(const T* const* a, int64_t offset, int64_t step, int64_t m, const Word<T>* panel, int64_t depth, const T* next,
           int64_t stride, Wide<T>* c, int64_t ldc, bool add);

// to[w][c] = the word of numbers from[2w][c], from[2w+1][c] (fp32, fp64: from[w][c]) for columns of rows that start
// at from[.] + offset; 0 for rows past `rows` and for columns from `columns` to `padded`.
template <typename T>
void pack(const T* const* from, int64_t offset, int64_t rows, int64_t columns, int64_t padded, Word<T>* to);

// to[i] = from[i] rounded
template <typename T>
void round_row(const Wide<T>* from, T* to, int64_t count);

}  // namespace moe_engine
