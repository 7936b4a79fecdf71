// What the CPU kernels share: loops compiled for several instruction sets, bf16 conversion, exp, large outputs.
//
// MULTIVERSION marks a plain loop that the compiler vectorises once for each listed instruction set; the loader picks
// the version when the library is opened, so that one build runs on every x86-64 machine. Elsewhere (aarch64, clang)
// the loop is compiled once, for the baseline. Functions that such a loop calls are INLINE, so that they are compiled
// with it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MULTIVERSION __attribute__((target_clones("default", "avx2", "avx512f")))
#endif
#else
#define MULTIVERSION
#endif
#define INLINE inline __attribute__((always_inline))

namespace moe_engine {

using Bits = uint16_t;  // a bf16 number

INLINE float widen(float value) { return value; }
INLINE double widen(double value) { return value; }
INLINE float widen(Bits bf16) {
  uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The nearest value of the output's dtype, ties to even; NaN stays NaN.
INLINE void narrow(float value, float& out) { out = value; }
INLINE void narrow(double value, double& out) { out = value; }
INLINE void narrow(float value, Bits& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uint32_t chosen = value != value ? 0x7fc0 : rounded;
  out = static_cast<Bits>(chosen);
}

// exp with a relative error of 2e-7 where the result is a normal number, rounded to a denormal one or 0 below, infinity
// above, NaN for NaN. F is float or a vector of them, U as many uint32.
//
// x = 2 n ln2 + r, exp(x) = p(r) 2^n 2^n, which reaches results whose exponent is that of no normal number; p has degree
// 7 on [-ln2, ln2]. Adding 1.5 * 2^23 rounds to n and leaves its bits lowest: nothing is converted, so NaN is no fault.
template <typename F, typename U>
INLINE F fast_exp(F x) {
  F bounded = x > 89.f ? F{} + 89.f : x;
  bounded = bounded < -176.f ? F{} - 176.f : bounded;  // there the exponent of 2^n becomes that of 0
  F sum = bounded * 0.72134752f + 12582912.f, n = sum - 12582912.f;
  F r = bounded - n * 1.38671875f + n * 4.2438889e-4f;  // 2 ln2 in two parts, of which the first times n is exact
  F p = F{} + 1.9610325e-4f;
  p = p * r + 1.4105506e-3f;
  p = p * r + 8.3361315e-3f;
  p = p * r + 4.1661218e-2f;
  p = p * r + 1.6666614e-1f;
  p = p * r + 5.0000036e-1f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  U bits;
  std::memcpy(&bits, &sum, sizeof bits);
  bits = (bits << 23) + 0x3f800000;
  F scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale * scale;
}
INLINE float fast_exp(float x) { return fast_exp<float, uint32_t>(x); }
INLINE double fast_exp(double x) { return std::exp(x); }

// fp32 for fp32 and bf16, fp64 for fp64: what a kernel computes in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Call function(a value of the C++ type of dtype); bf16 arrives as Bits.
template <typename Function>
void by_dtype(at::ScalarType dtype, const char* name, const Function& function) {
  if (dtype == at::kFloat) return function(float());
  if (dtype == at::kBFloat16) return function(Bits());
  if (dtype == at::kDouble) return function(double());
  TORCH_CHECK_VALUE(false, name, ": found ", dtype, ", expected float32, bfloat16 or float64");
}

template <typename T>
const T* data(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* output(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// An uninitialised tensor. Large ones ask for huge pages: the first touch of fresh small ones costs more than filling
// them.
inline at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor out = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, large = 4 * 1024 * 1024;
  if (out.nbytes() >= large) {
    uintptr_t begin = reinterpret_cast<uintptr_t>(out.data_ptr()), first = (begin + page - 1) & ~(page - 1);
    madvise(reinterpret_cast<void*>(first), ((begin + out.nbytes()) & ~(page - 1)) - first, MADV_HUGEPAGE);
  }
#endif
  return out;
}

}  // namespace moe_engine
