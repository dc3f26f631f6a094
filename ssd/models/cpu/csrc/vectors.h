// Vectors of eight float32, for operators whose rows are short.
#pragma once

#include <ATen/ATen.h>

namespace ssd_vectors {

constexpr int LANES = 8;

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

inline Vector load(const at::BFloat16* from) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16);
}

typedef float Half __attribute__((vector_size(LANES * 2)));

inline float sum(Vector x) {
  const Half part = __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
  return (part[0] + part[2]) + (part[1] + part[3]);
}

// e^x for x <= 0, within 2 units in the last place; 0 below the normal numbers, NaN for NaN.
inline Vector exp_nonpositive(Vector x) {
  const Vector lowest = Vector{} - 87.3f;
  const auto dead = x <= lowest;
  x = dead ? lowest : x;
  const Vector shifted = x * 1.44269504f + 12582912.0f;  // rounds to an integer, kept in the low bits
  const Vector whole = shifted - 12582912.0f;
  const Vector r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  Vector p = Vector{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Words power = ((Words)shifted + 127) << 23;
  const Vector result = p * (Vector)power;
  return dead ? Vector{} : result;
}

}  // namespace ssd_vectors
