// Linear layers for a few rows: y[M, N] = x[M, K] · wᵀ, the product a decode forward consists of.
//
// Such a product should take as long as reading the weights once, whether M is 1 or 8; general matrix
// products reach half of that or less. Weights are packed into panels of PANEL outputs, [N / PANEL][K][PANEL],
// and read strictly in order, so that hardware prefetching keeps up; up to ROWS rows are multiplied by
// a panel while it passes, further rows take it from the cache. Where the multipliers are the bound (AVX2: six
// rows take as long as reading does), nothing but them may take a cycle: hence the layout of a panel.
//
// Float32 weights that are bfloat16 numbers (a model shipped in bfloat16) are kept as such and widened in
// registers: half the bytes, and not one bit of a result differs. Two vectors lie interleaved, one in the
// low and one in the high halves of 32-bit words, so that widening is one shift and one mask.
//
// Every element of y is one sum over k = 0, 1, .., K - 1 in that order, however many rows there are:
// a row's result does not depend on M, nor on the other rows.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ssd_rows_linear {

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
#else
constexpr int LANES = 8, VECTORS = 2;
#endif
constexpr int PANEL = LANES * VECTORS;
constexpr int ROWS = 6;             // accumulators and operands fill the registers
constexpr int AHEAD = 4096;         // bytes of weights to prefetch ahead
constexpr int64_t HUGE_PAGE = 2 << 20;

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * 4), aligned(2), may_alias));

// The weights of one k: VECTORS vectors.
inline void load(const float* from, Vector* weights) {
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) weights[v] = reinterpret_cast<const Vector*>(from)[v];
}

inline void load(const at::BFloat16* from, Vector* weights) {
#pragma GCC unroll 2
  for (int v = 0; v < VECTORS; v += 2) {
    const Words both = reinterpret_cast<const Words*>(from)[v / 2];
    weights[v] = (Vector)(both << 16);
    weights[v + 1] = (Vector)(both & 0xffff0000u);
  }
}

template <int M, typename Weight>
inline void multiply(const float* x, int64_t depth, const Weight* panel, float* y, int64_t stride) {
  Vector sums[M][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k, panel += PANEL) {
#pragma GCC unroll 4
    for (size_t at = 0; at < PANEL * sizeof(Weight); at += 64) __builtin_prefetch(reinterpret_cast<const char*>(panel) + at + AHEAD);
    Vector weights[VECTORS];
    load(panel, weights);
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
  if (!at::equal(halves.to(at::kFloat), packed)) return packed;
  return halves.view({panels, depth, VECTORS / 2, 2, LANES}).transpose(3, 4).reshape({panels, depth, PANEL});
}

// Memory for weights, in large pages where the system gives them: walking the tables of small ones takes a core
// a share of the time of reading the weights. It holds nothing before it is written.
at::Tensor reserve(int64_t bytes) {
#ifdef __linux__
  const size_t size = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, whole = size + HUGE_PAGE;
  void* start = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(start != MAP_FAILED, "no memory for ", bytes, " bytes of weights");
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(start) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);
  return at::from_blob(reinterpret_cast<void*>(aligned), {bytes}, [=](void*) { munmap(start, whole); }, at::kByte);
#else
  return at::empty({bytes}, at::kByte);
#endif
}

template <typename Weight>
void run(const float* from, int64_t rows, int64_t depth, const Weight* weights, int64_t panels, float* to) {
  const int64_t stride = panels * PANEL, passes = (rows + ROWS - 1) / ROWS;
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t pass = 0; pass < passes; ++pass) {
        // Shared evenly: a pass of a row or two waits for its own sums.
        const int64_t row = rows * pass / passes, count = rows * (pass + 1) / passes - row;
        multiply_rows(count, from + row * depth, depth, weights + p * depth * PANEL, to + row * stride + p * PANEL, stride);
      }
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

}  // namespace ssd_rows_linear

TORCH_LIBRARY(ssd, library) {
  library.def("pack(Tensor weight) -> Tensor");
  library.def("reserve(int bytes) -> Tensor", &ssd_rows_linear::reserve);
  library.def("rows_linear(Tensor input, Tensor packed, int outputs) -> Tensor");
}

TORCH_LIBRARY_IMPL(ssd, CPU, library) {
  library.impl("pack", &ssd_rows_linear::pack);
  library.impl("rows_linear", &ssd_rows_linear::rows_linear);
}
