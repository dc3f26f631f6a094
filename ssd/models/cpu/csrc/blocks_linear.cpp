// Linear layers and embeddings whose weights stay in the quantised blocks of a GGUF file.
//
// A block is 32 weights of one output: unsigned numbers q of 4, 5, 6 or 8 bits, a scale and for some types a minimum;
// a weight is scale * (q - OFFSET) + minimum. K types have superblocks of eight blocks with scales of 6 or 8 bits.
//
// Blocks are rearranged into panels of PANEL outputs, [N / PANEL][K / 32], with the outputs in the lanes of vectors,
// and read strictly in order. No number changes and nothing is added but padding: q takes as many bits as in the file.
// A panel's numbers are widened in registers while they pass, once for up to ROWS rows.
//
// Every element of y is one sum: over k in a block in order, times the block's scale, and over the blocks in order.
// It does not depend on the number of rows nor on the other rows. Activations are float32 and not rounded.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

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

// Conversions to float32. Compilers convert a vector's bytes and half-precision numbers one by one.
SSD_INLINE Vector widened(const uint8_t* halves) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
#else
  Vector wide;
  for (int i = 0; i < LANES; ++i) wide[i] = c10::Half(half_at(halves + i * 2), c10::Half::from_bits());
  return wide;
#endif
}

template <bool SIGNED>
SSD_INLINE Vector widened_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vector)_mm512_cvtepi32_ps(SIGNED ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (Vector)_mm256_cvtepi32_ps(SIGNED ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
  Vector wide;
  for (int i = 0; i < LANES; ++i) wide[i] = SIGNED ? static_cast<int8_t>(from[i]) : from[i];
  return wide;
#endif
}

template <int SHIFT>
SSD_INLINE Words shifted(Words from) {
  if constexpr (SHIFT >= 0) return from >> SHIFT;
  else return from << -SHIFT;
}

#if defined(__AVX512F__)
template <int OFFSET>
SSD_INLINE Vector table(int first) {
  Vector numbers;
  for (int i = 0; i < LANES; ++i) numbers[i] = static_cast<float>(first + i - OFFSET);
  return numbers;
}
#endif

// The numbers of place k of a block, less the offset, as float32. low: the word with the low bits of k, high: the
// block's high bits.
template <Type T, int K>
SSD_INLINE Vector numbers(Words low, Words high) {
  using X = Traits<T>;
  const Words nibble = low >> (K % 8 * 4);
#if defined(__AVX512F__)
  if constexpr (X::BITS == 4) {
    return (Vector)_mm512_permutexvar_ps((__m512i)nibble, (__m512)table<X::OFFSET>(0));
  } else if constexpr (X::BITS == 5) {
    const Words number = (nibble & 15u) | (shifted<K - 4>(high) & 16u);
    return (Vector)_mm512_permutex2var_ps((__m512)table<X::OFFSET>(0), (__m512i)number, (__m512)table<X::OFFSET>(16));
  }
#endif
  Words number = nibble & 15u;
  if constexpr (X::BITS == 5) number |= shifted<K - 4>(high) & 16u;
  if constexpr (X::BITS == 6) number |= shifted<K % 16 * 2 - 4>(high) & 48u;
  return __builtin_convertvector((Integers)number - X::OFFSET, Vector);
}

template <int M>
struct Sums {
  Vector of[M][VECTORS] = {};

  SSD_INLINE void add(const float* x, int64_t depth, const Vector* weights) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) of[m][v] += x[m * depth] * weights[v];
  }
};

template <Type T, int M, int G, size_t... J>
SSD_INLINE void add_eight(const float* x, int64_t depth, const uint8_t* low, const Words* high, Sums<M>& sums,
                      std::index_sequence<J...>) {
  const Words* from = reinterpret_cast<const Words*>(low) + G * VECTORS;
  const Words first = from[0], second = from[1];
  (
      [&]() __attribute__((always_inline)) {
        constexpr int K = G * 8 + J;
        const Vector weights[VECTORS] = {numbers<T, K>(first, high[0]), numbers<T, K>(second, high[1])};
        sums.add(x + K, depth, weights);
      }(),
      ...);
}

// Adds x * (q - OFFSET) of the block's places FIRST .. FIRST + SCALED - 1.
template <Type T, int M, int FIRST>
SSD_INLINE Sums<M> add_block(const float* x, int64_t depth, const uint8_t* low) {
  using X = Traits<T>;
  Sums<M> sums;
  if constexpr (X::BITS == 8) {
#pragma GCC unroll 8
    for (int k = 0; k < BLOCK; ++k) {
      const Vector weights[VECTORS] = {widened_bytes<true>(low + k * PANEL), widened_bytes<true>(low + k * PANEL + LANES)};
      sums.add(x + k, depth, weights);
    }
  } else {
    Words high[VECTORS] = {};
    if constexpr (X::BITS > 4) {
      const Words* from = reinterpret_cast<const Words*>(low + X::LOW) + FIRST / 16 * VECTORS * (X::BITS == 6);
      high[0] = from[0], high[1] = from[1];
    }
    constexpr auto eight = std::make_index_sequence<8>();
    add_eight<T, M, FIRST / 8>(x, depth, low, high, sums, eight);
    add_eight<T, M, FIRST / 8 + 1>(x, depth, low, high, sums, eight);
    if constexpr (X::SCALED == 32) {
      add_eight<T, M, 2>(x, depth, low, high, sums, eight);
      add_eight<T, M, 3>(x, depth, low, high, sums, eight);
    }
  }
  return sums;
}

// y[M, PANEL] = x[M, depth] · panelᵀ. totals[m * blocks + b] is the sum of x over block b, for the minima.
template <Type T, int M>
void multiply(const float* x, const float* totals, int64_t depth, const uint8_t* panel, float* y, int64_t stride) {
  using X = Traits<T>;
  const int64_t blocks = depth / BLOCK;
  Sums<M> result;
  for (int64_t b = 0; b < blocks;) {
    Vector outer[VECTORS], least[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      outer[v] = widened(panel + v * LANES * 2);
      if constexpr (X::MINIMUM) least[v] = widened(panel + (PANEL + v * LANES) * 2);
    }
    panel += X::HEAD;
    for (int inner = 0; inner < X::OUTER / BLOCK; ++inner, ++b, panel += X::INNER) {
      for (int at = 0; at < X::INNER; at += 64) __builtin_prefetch(panel + at + AHEAD);
      Vector minimum[VECTORS];
      const auto finish = [&](const Sums<M>& sums, const Vector* scale) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) result.of[m][v] += scale[v] * sums.of[m][v];
      };
      const float* from = x + b * BLOCK;
      const uint8_t* low = panel + X::SMALL;
      if constexpr (T == Q6_K) {
        const Vector first[VECTORS] = {outer[0] * widened_bytes<true>(panel), outer[1] * widened_bytes<true>(panel + LANES)};
        finish(add_block<T, M, 0>(from, depth, low), first);
        const Vector second[VECTORS] = {outer[0] * widened_bytes<true>(panel + PANEL),
                                        outer[1] * widened_bytes<true>(panel + PANEL + LANES)};
        finish(add_block<T, M, 16>(from, depth, low), second);
      } else if constexpr (X::K) {
        const Vector scale[VECTORS] = {outer[0] * widened_bytes<false>(panel), outer[1] * widened_bytes<false>(panel + LANES)};
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) minimum[v] = -least[v] * widened_bytes<false>(panel + PANEL + v * LANES);
        finish(add_block<T, M, 0>(from, depth, low), scale);
      } else {
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) minimum[v] = least[v];
        finish(add_block<T, M, 0>(from, depth, low), outer);
      }
      if constexpr (X::MINIMUM)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) result.of[m][v] += totals[m * blocks + b] * minimum[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) reinterpret_cast<Vector*>(y + m * stride)[v] = result.of[m][v];
}

template <Type T, int M = ROWS>
void multiply_rows(int64_t rows, const float* x, const float* totals, int64_t depth, const uint8_t* panel, float* y,
                   int64_t stride) {
  if constexpr (M > 1)
    if (rows < M) return multiply_rows<T, M - 1>(rows, x, totals, depth, panel, y, stride);
  multiply<T, M>(x, totals, depth, panel, y, stride);
}

// Calls action with the type as a template argument.
template <typename Action>
auto with_type(int64_t type, Action action) {
#define SSD_CASE(T) case T: return action.template operator()<T>();
  switch (type) {
    SSD_CASE(Q4_0) SSD_CASE(Q4_1) SSD_CASE(Q5_0) SSD_CASE(Q5_1) SSD_CASE(Q8_0) SSD_CASE(Q4_K) SSD_CASE(Q5_K) SSD_CASE(Q6_K)
  }
#undef SSD_CASE
  TORCH_CHECK(false, "no operator for GGUF type ", type);
}

int64_t packed_size(int64_t type, int64_t outputs, int64_t depth) {
  return with_type(type, [&]<Type T>() -> int64_t {
    using X = Traits<T>;
    TORCH_CHECK(depth > 0 && depth % X::OUTER == 0, "rows must be whole blocks of ", X::OUTER, ", not ", depth);
    return (outputs + PANEL - 1) / PANEL * (depth / X::OUTER) * X::SIZE;
  });
}

// blocks: uint8 [N, bytes of a row]; packed: uint8, zeros, as many as packed_size says.
void pack_blocks(const at::Tensor& blocks, int64_t type, int64_t depth, at::Tensor packed) {
  const int64_t outputs = blocks.size(0), row = blocks.size(1);
  TORCH_CHECK(packed.numel() == packed_size(type, outputs, depth), "wrong size of the packed weight");
  TORCH_CHECK(blocks.is_contiguous() && packed.is_contiguous(), "weights must be contiguous");
  const uint8_t* from = blocks.const_data_ptr<uint8_t>();
  uint8_t* to = packed.mutable_data_ptr<uint8_t>();
  with_type(type, [&]<Type T>() {
    using X = Traits<T>;
    const int64_t count = depth / X::OUTER;
    TORCH_CHECK(row == count * X::IN_FILE, "a row must have ", count * X::IN_FILE, " bytes, not ", row);
    at::parallel_for(0, (outputs + PANEL - 1) / PANEL, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin * PANEL; n < std::min(end * PANEL, outputs); ++n)
        for (int64_t i = 0; i < count; ++i)
          put<T>(take_apart<T>(from + n * row + i * X::IN_FILE), to + (n / PANEL * count + i) * X::SIZE, n % PANEL);
    });
  });
}

at::Tensor blocks_linear(const at::Tensor& input, const at::Tensor& packed, int64_t type, int64_t outputs) {
  const int64_t depth = input.size(-1), panels = (outputs + PANEL - 1) / PANEL, stride = panels * PANEL;
  TORCH_CHECK(input.scalar_type() == at::kFloat, "input must be float32 [.., K]");
  TORCH_CHECK(packed.numel() == packed_size(type, outputs, depth), "input must be float32 [.., K]");
  const at::Tensor x = input.contiguous();
  const int64_t rows = x.numel() / depth, blocks = depth / BLOCK, passes = (rows + ROWS - 1) / ROWS;
  auto sizes = input.sizes().vec();
  sizes.back() = stride;
  at::Tensor y = at::empty(sizes, x.options());
  const float* from = x.const_data_ptr<float>();
  const uint8_t* weights = packed.const_data_ptr<uint8_t>();
  float* to = y.mutable_data_ptr<float>();
  with_type(type, [&]<Type T>() {
    using X = Traits<T>;
    std::vector<float> totals(X::MINIMUM ? rows * blocks : 0);
    for (size_t i = 0; i < totals.size(); ++i) {
      Vector sum = {};
      for (int k = 0; k < BLOCK; k += LANES) sum += *reinterpret_cast<const Vector*>(from + i * BLOCK + k);
      for (int lane = 0; lane < LANES; ++lane) totals[i] += sum[lane];
    }
    const int64_t panel = depth / X::OUTER * X::SIZE;
    at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        for (int64_t pass = 0; pass < passes; ++pass) {
          const int64_t row = rows * pass / passes, count = rows * (pass + 1) / passes - row;
          multiply_rows<T>(count, from + row * depth, totals.data() + (X::MINIMUM ? row * blocks : 0), depth,
                           weights + p * panel, to + row * stride + p * PANEL, stride);
        }
    });
  });
  return stride == outputs ? y : y.narrow(-1, 0, outputs).contiguous();
}

// The weights of some outputs, float32 [.., K].
at::Tensor blocks_rows(const at::Tensor& ids, const at::Tensor& packed, int64_t type, int64_t outputs, int64_t depth) {
  TORCH_CHECK(ids.scalar_type() == at::kLong, "ids must be int64");
  TORCH_CHECK(packed.numel() == packed_size(type, outputs, depth), "wrong size of the packed weight");
  const at::Tensor which = ids.contiguous();
  auto sizes = ids.sizes().vec();
  sizes.push_back(depth);
  at::Tensor y = at::empty(sizes, ids.options().dtype(at::kFloat));
  const int64_t* id = which.const_data_ptr<int64_t>();
  const uint8_t* weights = packed.const_data_ptr<uint8_t>();
  float* to = y.mutable_data_ptr<float>();
  with_type(type, [&]<Type T>() {
    using X = Traits<T>;
    const int64_t count = depth / X::OUTER;
    at::parallel_for(0, which.numel(), 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < outputs, "index out of range: ", id[i]);
        for (int64_t at = 0; at < count; ++at)
          weights_of<T>(weights + (id[i] / PANEL * count + at) * X::SIZE, id[i] % PANEL, to + i * depth + at * X::OUTER);
      }
    });
  });
  return y;
}

}  // namespace ssd_blocks_linear

TORCH_LIBRARY_FRAGMENT(ssd, library) {
  library.def("packed_size(int type, int outputs, int depth) -> int", &ssd_blocks_linear::packed_size);
  library.def("pack_blocks(Tensor blocks, int type, int depth, Tensor(a!) packed) -> ()");
  library.def("blocks_linear(Tensor input, Tensor packed, int type, int outputs) -> Tensor");
  library.def("blocks_rows(Tensor ids, Tensor packed, int type, int outputs, int depth) -> Tensor");
}

TORCH_LIBRARY_IMPL(ssd, CPU, library) {
  library.impl("pack_blocks", &ssd_blocks_linear::pack_blocks);
  library.impl("blocks_linear", &ssd_blocks_linear::blocks_linear);
  library.impl("blocks_rows", &ssd_blocks_linear::blocks_rows);
}
