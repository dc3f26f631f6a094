// Quantised blocks of a GGUF file, and how the operators arrange them.
//
// A block is 32 weights of one output: unsigned numbers q of 4, 5, 6 or 8 bits, a scale and for some types a minimum;
// a weight is scale * (q - OFFSET) + minimum. K types have superblocks of eight blocks with scales of 6 or 8 bits.
//
// Blocks are rearranged into panels of PANEL outputs, [N / PANEL][K / 32], with the outputs in the lanes of vectors,
// and read strictly in order. No number changes and nothing is added but padding: q takes as many bits as in the file.
// A panel's numbers are widened in registers while they pass, once for up to ROWS rows.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Half.h>

#include <array>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ssd_blocks_linear {

#define SSD_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6;
#else
constexpr int LANES = 8, ROWS = 2;
#endif
constexpr int VECTORS = 2, PANEL = LANES * VECTORS;
constexpr int BLOCK = 32, SUPERBLOCK = 256;
constexpr int AHEAD = 2048;  // bytes of weights to prefetch ahead

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// Numbers of the types are those of the file format.
enum Type : int64_t { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

template <Type T>
struct Traits {
  static constexpr bool K = T >= Q4_K;
  static constexpr int BITS = T == Q8_0 ? 8 : T == Q6_K ? 6 : T == Q5_0 || T == Q5_1 || T == Q5_K ? 5 : 4;
  static constexpr bool MINIMUM = T == Q4_1 || T == Q5_1 || T == Q4_K || T == Q5_K;
  static constexpr int OFFSET = T == Q4_0 ? 8 : T == Q5_0 ? 16 : T == Q6_K ? 32 : 0;
  static constexpr int SCALED = T == Q6_K ? 16 : 32;      // weights that share a scale
  static constexpr int OUTER = K ? SUPERBLOCK : BLOCK;    // weights that share a half-precision scale
  static constexpr int IN_FILE = T == Q4_0   ? 18
                                 : T == Q4_1 ? 20
                                 : T == Q5_0 ? 22
                                 : T == Q5_1 ? 24
                                 : T == Q8_0 ? 34
                                 : T == Q4_K ? 144
                                 : T == Q5_K ? 176
                                             : 210;       // bytes of OUTER weights in the file
  // Layout of a panel's OUTER weights: half-precision scales and minima, then blocks, each with its own small scales
  // and minima, its numbers' low bits (or bytes), and their high bits.
  static constexpr int HEAD = PANEL * 2 * (MINIMUM ? 2 : 1);
  static constexpr int SMALL = K ? PANEL * (BLOCK / SCALED) * (MINIMUM ? 2 : 1) : 0;
  static constexpr int LOW = BITS == 8 ? PANEL * BLOCK : PANEL * BLOCK / 2;
  static constexpr int HIGH = BITS == 5 ? PANEL * 4 : BITS == 6 ? PANEL * 8 : 0;
  static constexpr int INNER = SMALL + LOW + HIGH;
  static constexpr int SIZE = HEAD + (OUTER / BLOCK) * INNER;
};

// One output's OUTER weights, taken apart.
struct Parts {
  uint16_t scale = 0, minimum = 0;  // half precision
  uint8_t scales[16] = {}, minima[16] = {};
  uint8_t numbers[SUPERBLOCK] = {};
};

inline uint16_t half_at(const uint8_t* from) {
  uint16_t bits;
  std::memcpy(&bits, from, 2);
  return bits;
}

template <Type T>
Parts take_apart(const uint8_t* from) {
  Parts parts;
  if constexpr (T == Q4_0 || T == Q4_1 || T == Q5_0 || T == Q5_1) {
    parts.scale = half_at(from);
    from += 2;
    if (Traits<T>::MINIMUM) parts.minimum = half_at(from), from += 2;
    uint32_t high = 0;
    if (Traits<T>::BITS == 5) std::memcpy(&high, from, 4), from += 4;
    for (int i = 0; i < 16; ++i) {
      parts.numbers[i] = (from[i] & 15) | (high >> i & 1) << 4;
      parts.numbers[i + 16] = from[i] >> 4 | (high >> (i + 16) & 1) << 4;
    }
  } else if constexpr (T == Q8_0) {
    parts.scale = half_at(from);
    std::memcpy(parts.numbers, from + 2, 32);
  } else if constexpr (T == Q6_K) {
    const uint8_t *low = from, *high = from + 128;
    std::memcpy(parts.scales, from + 192, 16);
    parts.scale = half_at(from + 208);
    for (int half = 0; half < 2; ++half, low += 64, high += 32)
      for (int i = 0; i < 32; ++i) {
        uint8_t* to = parts.numbers + half * 128 + i;
        to[0] = (low[i] & 15) | (high[i] & 3) << 4;
        to[32] = (low[i + 32] & 15) | (high[i] >> 2 & 3) << 4;
        to[64] = low[i] >> 4 | (high[i] >> 4 & 3) << 4;
        to[96] = low[i + 32] >> 4 | (high[i] >> 6 & 3) << 4;
      }
  } else {
    parts.scale = half_at(from), parts.minimum = half_at(from + 2);
    const uint8_t* six = from + 4;
    for (int j = 0; j < 4; ++j) {
      parts.scales[j] = six[j] & 63, parts.minima[j] = six[j + 4] & 63;
      parts.scales[j + 4] = (six[j + 8] & 15) | (six[j] >> 6) << 4;
      parts.minima[j + 4] = six[j + 8] >> 4 | (six[j + 4] >> 6) << 4;
    }
    const uint8_t *high = from + 16, *low = from + (T == Q5_K ? 48 : 16);
    for (int j = 0; j < 8; ++j)
      for (int i = 0; i < 32; ++i) {
        const uint8_t byte = low[j / 2 * 32 + i];
        parts.numbers[j * 32 + i] = (j % 2 ? byte >> 4 : byte & 15) | (T == Q5_K ? (high[i] >> j & 1) << 4 : 0);
      }
  }
  return parts;
}

template <Type T>
void put(const Parts& parts, uint8_t* panel, int output) {
  using X = Traits<T>;
  const int v = output / LANES, lane = output % LANES;
  std::memcpy(panel + output * 2, &parts.scale, 2);
  if (X::MINIMUM) std::memcpy(panel + (PANEL + output) * 2, &parts.minimum, 2);
  for (int block = 0; block < X::OUTER / BLOCK; ++block) {
    uint8_t* to = panel + X::HEAD + block * X::INNER;
    const uint8_t* numbers = parts.numbers + block * BLOCK;
    if constexpr (X::K) {
      constexpr int PER = BLOCK / X::SCALED;
      for (int i = 0; i < PER; ++i) to[i * PANEL + output] = parts.scales[block * PER + i];
      if (X::MINIMUM) to[PANEL + output] = parts.minima[block];
      to += X::SMALL;
    }
    if constexpr (X::BITS == 8) {
      for (int k = 0; k < BLOCK; ++k) to[k * PANEL + output] = numbers[k];
    } else {
      uint32_t* low = reinterpret_cast<uint32_t*>(to);
      for (int k = 0; k < BLOCK; ++k)
        low[(k / 8 * VECTORS + v) * LANES + lane] |= static_cast<uint32_t>(numbers[k] & 15) << k % 8 * 4;
      uint32_t* high = reinterpret_cast<uint32_t*>(to + X::LOW);
      if constexpr (X::BITS == 5)
        for (int k = 0; k < BLOCK; ++k) high[output] |= static_cast<uint32_t>(numbers[k] >> 4) << k;
      if constexpr (X::BITS == 6)
        for (int k = 0; k < BLOCK; ++k)
          high[k / 16 * PANEL + output] |= static_cast<uint32_t>(numbers[k] >> 4) << k % 16 * 2;
    }
  }
}

// The inverse of put: the weights of one output, as the file's own arithmetic gives them.
template <Type T>
void weights_of(const uint8_t* panel, int output, float* to) {
  using X = Traits<T>;
  const int v = output / LANES, lane = output % LANES;
  const auto half = [&](int at) {
    return static_cast<float>(c10::Half(half_at(panel + (at + output) * 2), c10::Half::from_bits()));
  };
  const float outer = half(0), least = X::MINIMUM ? half(PANEL) : 0.0f;
  for (int block = 0; block < X::OUTER / BLOCK; ++block) {
    const uint8_t* from = panel + X::HEAD + block * X::INNER;
    const uint8_t* small = from;
    from += X::SMALL;
    const uint32_t *low = reinterpret_cast<const uint32_t*>(from), *high = reinterpret_cast<const uint32_t*>(from + X::LOW);
    for (int k = 0; k < BLOCK; ++k) {
      float scale = outer, minimum = least;
      if constexpr (T == Q6_K) scale *= static_cast<int8_t>(small[k / 16 * PANEL + output]);
      else if constexpr (X::K) scale *= small[output], minimum *= -static_cast<float>(small[PANEL + output]);
      int number;
      if constexpr (X::BITS == 8) {
        number = static_cast<int8_t>(from[k * PANEL + output]);
      } else {
        number = low[(k / 8 * VECTORS + v) * LANES + lane] >> k % 8 * 4 & 15;
        if constexpr (X::BITS == 5) number |= (high[output] >> k & 1) << 4;
        if constexpr (X::BITS == 6) number |= (high[k / 16 * PANEL + output] >> k % 16 * 2 & 3) << 4;
      }
      // Scale times number is exact (at most 24 bits), so it does not matter whether the compiler fuses the addition.
      const float product = scale * static_cast<float>(number - X::OFFSET);
      *to++ = X::MINIMUM ? product + minimum : product;
    }
  }
}

}  // namespace ssd_blocks_linear
