// What the CPU kernels share: loops compiled for several instruction sets, bf16 conversion, exp, large outputs.
//
// MULTIVERSION marks a plain loop that the compiler vectorises once for each listed instruction set; the loader picks
// the version when the library is opened, so that one build runs on every x86-64 machine. Elsewhere (aarch64, clang) the
// loop is compiled once, for the baseline. Functions that such a loop calls are INLINE, so that they are compiled with it.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MULTIVERSION
#endif
#define INLINE inline __attribute__((always_inline))

namespace moe_engine {

INLINE float widen(uint16_t bf16) {
  uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest even; NaN stays NaN.
INLINE uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return value != value ? 0x7fc0 : rounded;
}

// exp with a relative error of 2e-7 (degree 6 on [-ln2/2, ln2/2]): 0 below -87.3, finite above 88.3, NaN for NaN.
INLINE float fast_exp(float x) {
  float bounded = x > 88.3f ? 88.3f : x;
  float n = (bounded * 1.44269504f + 12582912.f) - 12582912.f;
  float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, 4);
  return x < -87.3f ? 0.f : p * scale;
}

// An uninitialised tensor. Large ones ask for huge pages: the first touch of a fresh output costs as much as filling it.
inline at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor out = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  if (out.nbytes() >= 4 * 1024 * 1024) {
    uintptr_t first = (reinterpret_cast<uintptr_t>(out.data_ptr()) + page - 1) & ~(page - 1);
    uintptr_t last = (reinterpret_cast<uintptr_t>(out.data_ptr()) + out.nbytes()) & ~(page - 1);
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return out;
}

}  // namespace moe_engine
