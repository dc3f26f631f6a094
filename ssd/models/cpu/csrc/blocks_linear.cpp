// Linear layers and embeddings whose weights stay in the quantised blocks of a GGUF file.
//
// Every element of y is one sum: over k in a block in order, times the block's scale, and over the blocks in order.
// It does not depend on the number of rows nor on the other rows. Activations are float32 and not rounded.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "blocks.h"

namespace ssd_blocks_linear {

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
