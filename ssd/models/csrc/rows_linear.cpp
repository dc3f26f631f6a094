// Linear layers for a few rows: y[M, N] = x[M, K] · wᵀ, the product a decode forward consists of.
//
// Such a product should take as long as reading the weights once, whether M is 1 or 8; general matrix
// products reach half of that or less. Weights are packed into panels of PANEL outputs, [N / PANEL][K][PANEL],
// and read strictly in order, so that hardware prefetching keeps up; up to ROWS rows are multiplied by
// a panel while it passes, further rows take it from the cache.
//
// Float32 weights that are bfloat16 numbers (a model shipped in bfloat16) are kept as such and widened in
// registers: half the bytes, and not one bit of a result differs.
//
// Every element of y is one sum over k = 0, 1, .., K - 1 in that order, however many rows there are:
// a row's result does not depend on M, nor on the other rows.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
#else
constexpr int LANES = 8, VECTORS = 2;
#endif
constexpr int PANEL = LANES * VECTORS;
constexpr int ROWS = 6;             // accumulators and operands fill the registers
constexpr int AHEAD = 4096;         // bytes of weights to prefetch ahead
constexpr int LINE = 64;            // bytes of a cache line

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

inline Vector load(const at::BFloat16* from) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16);
}

template <int M, typename Weight>
inline void multiply(const float* x, int64_t depth, const Weight* panel, float* y, int64_t stride) {
  Vector sums[M][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k, panel += PANEL) {
#pragma GCC unroll 4
    for (int at = 0; at < PANEL; at += LINE / sizeof(Weight)) __builtin_prefetch(reinterpret_cast<const char*>(panel + at) + AHEAD);
    Vector weights[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) weights[v] = load(panel + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const float value = x[m * depth + k];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[m][v] += value * weights[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) reinterpret_cast<Vector*>(y + m * stride)[v] = sums[m][v];
}

template <typename Weight>
void multiply_rows(int64_t rows, const float* x, int64_t depth, const Weight* panel, float* y, int64_t stride) {
  switch (rows) {
    case 1: return multiply<1>(x, depth, panel, y, stride);
    case 2: return multiply<2>(x, depth, panel, y, stride);
    case 3: return multiply<3>(x, depth, panel, y, stride);
    case 4: return multiply<4>(x, depth, panel, y, stride);
    case 5: return multiply<5>(x, depth, panel, y, stride);
    default: return multiply<ROWS>(x, depth, panel, y, stride);
  }
}

at::Tensor pack(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == at::kFloat, "weight must be float32 [N, K]");
  const int64_t outputs = weight.size(0), depth = weight.size(1), panels = (outputs + PANEL - 1) / PANEL;
  at::Tensor padded = at::zeros({panels * PANEL, depth}, weight.options());
  padded.narrow(0, 0, outputs).copy_(weight);
  const at::Tensor packed = padded.view({panels, PANEL, depth}).transpose(1, 2).contiguous();
  const at::Tensor halves = packed.to(at::kBFloat16);
  return at::equal(halves.to(at::kFloat), packed) ? halves : packed;
}

template <typename Weight>
void run(const float* from, int64_t rows, int64_t depth, const Weight* weights, int64_t panels, float* to) {
  const int64_t stride = panels * PANEL;
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t row = 0; row < rows; row += ROWS)
        multiply_rows(std::min<int64_t>(rows - row, ROWS), from + row * depth, depth, weights + p * depth * PANEL,
                      to + row * stride + p * PANEL, stride);
  });
}

at::Tensor rows_linear(const at::Tensor& input, const at::Tensor& packed, int64_t outputs) {
  const int64_t depth = packed.size(1), panels = packed.size(0);
  TORCH_CHECK(input.scalar_type() == at::kFloat && input.size(-1) == depth, "input must be float32 [.., K]");
  const at::Tensor x = input.contiguous();
  const int64_t rows = x.numel() / depth, stride = panels * PANEL;
  auto sizes = input.sizes().vec();
  sizes.back() = stride;
  at::Tensor y = at::empty(sizes, x.options());
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  if (packed.scalar_type() == at::kBFloat16)
    run(from, rows, depth, packed.const_data_ptr<at::BFloat16>(), panels, to);
  else
    run(from, rows, depth, packed.const_data_ptr<float>(), panels, to);
  return stride == outputs ? y : y.narrow(-1, 0, outputs).contiguous();
}

}  // namespace

TORCH_LIBRARY(ssd, library) {
  library.def("pack(Tensor weight) -> Tensor");
  library.def("rows_linear(Tensor input, Tensor packed, int outputs) -> Tensor");
}

TORCH_LIBRARY_IMPL(ssd, CPU, library) {
  library.impl("pack", &pack);
  library.impl("rows_linear", &rows_linear);
}
