// Vectors of each instruction set that a kernel is compiled for: avx512_bf16, avx512, avx2, baseline. A kernel is
// written once, for a Machine M and a number T (fp32, fp64 or bf16), and instantiated by MACHINES; best() names the
// first that the processor has, tests go through all of them.
#pragma once

#include "simd.h"

#include <string_view>

#define UNROLL _Pragma("GCC unroll 32")

// VERSION(name, attribute that allows its instructions, bytes of a vector, has products of bf16)
#if defined(__x86_64__)
#define MACHINES(VERSION)                                                                                          \
  VERSION(baseline, , 16, false)                                                                                   \
  VERSION(avx2, __attribute__((target("avx2,fma"))), 32, false)                                                    \
  VERSION(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), 64, false)                    \
  VERSION(avx512_bf16, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), 64, true)
#else
#define MACHINES(VERSION) VERSION(baseline, , 16, false)
#endif

namespace moe_engine {

template <int size, bool has_bf16>
struct Machine {
  static constexpr int bytes = size, vectors = size == 64 ? 4 : 2;
  static constexpr bool bf16 = has_bf16;
};

inline bool supports(std::string_view machine) {
#if defined(__x86_64__)
  bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl");
  if (machine == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
  if (machine == "avx512") return avx512;
  if (machine == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return machine == "baseline";
}

inline std::string_view best() {
  for (std::string_view name : {"avx512_bf16", "avx512", "avx2"}) {
    if (supports(name)) return name;
  }
  return "baseline";
}

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

// A vector of wide numbers from numbers of type T.
template <typename V, typename T>
INLINE V load_wide(const T* from) {
  if constexpr (!std::is_same_v<T, Bits>) {
    return load<V>(from);
  } else {
    using Half = typename Vectors<Bits, sizeof(V) / 2>::Type;
    return (V)(__builtin_convertvector(load<Half>(from), Integers<V>) << 16);
  }
}

template <typename V>
INLINE V spread(const void* word) {
  Lanes<V> bits;
  std::memcpy(&bits, word, sizeof bits);
  return (V)(Integers<V>{} + bits);
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

}  // namespace moe_engine
