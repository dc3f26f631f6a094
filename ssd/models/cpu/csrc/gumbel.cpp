// Gumbel noise of (seed, position, token), as decoding/noise.py defines it: -log(-log(u)) of 31 bits.
//
// The noise of a round is drawn for every token of the vocabulary at every position of a tree. In torch's compiled
// loops most of its time goes into logarithms that are exact to the last bit in every case there is. Here both
// arguments are known to be positive and normal, and a logarithm is an exponent and a polynomial: on a Zen 3 core
// 3 ns a number, where the compiled loop takes 9 to 14. The bits are the same; the noise is within 3e-7 of it
// (relative to 1 + |noise|), and the same for a token whatever else is drawn.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace ssd_gumbel {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int64_t BLOCK = 512;  // tokens of a piece of work

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// SplitMix64's increment and finalizer.
constexpr uint64_t STEP = 0x9E3779B97F4A7C15;

uint64_t mixed(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

inline Words mixed_tokens(Words x) {
  x = (x ^ (x >> 17)) * 0xED5AD4BBu;
  x = (x ^ (x >> 11)) * 0xAC4C1B51u;
  x = (x ^ (x >> 15)) * 0x31848BABu;
  return x ^ (x >> 14);
}

// log(x) of normal x > 0, x = 2^e (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2). `near` is x - 1 where that is known
// better than x tells, used where e = 0. The polynomial is ours: least relative error of log(1 + f), 6e-9.
inline Vector logarithm(Vector x, const Vector* near) {
  constexpr int32_t SQRT_HALF = 0x3f3504f3;
  const Integers e = ((Integers)x - SQRT_HALF) >> 23;
  Vector f = (Vector)((Integers)x - (e << 23)) - 1.0f;
  if (near) f = e == 0 ? *near : f;
  // Pairs of terms, not one after the other: the chain of dependent steps is what a core waits for here.
  const Vector square = f * f, fourth = square * square;
  const Vector low = (f * -0.250008225440979f + 0.3333333134651184f) + (f * -0.16623356938362122f + 0.20001226663589478f) * square;
  const Vector high = (f * -0.131601944565773f + 0.14201761782169342f) + (f * -0.07634429633617401f + 0.12761549651622772f) * square;
  const Vector p = high * fourth + low;
  const Vector exponent = __builtin_convertvector(e, Vector);
  // log(2) in two parts, the first of which times e is exact.
  return (exponent * -2.12194440e-4f + (p * f - 0.5f) * square + f) + exponent * 0.693359375f;
}

inline Vector noise(Words mixed_token, uint32_t low, uint32_t high) {
  Words x = mixed_token ^ low;
  x = (x ^ (x >> 16)) * 0x21F0AAADu + high;
  x = (x ^ (x >> 15)) * 0xD35A2D97u;
  x = (x ^ (x >> 15)) >> 1;
  // v = 1 - u, see decoding/noise.py.
  Vector v = (__builtin_convertvector((Integers)x, Vector) + 0.5f) * 0x1p-31f;
  const Vector most = Vector{} + (1 - 0x1p-24f);
  v = v < most ? v : most;
  const Vector near = -v, exponential = -logarithm(1.0f - v, &near);
  return -logarithm(exponential, nullptr);
}

// Noise of the tokens first, first + 1, .., at most BLOCK of them, for every row. Their words are mixed once.
void draw(const std::vector<uint64_t>& keys, int64_t first, int64_t count, float* out, int64_t stride) {
  Words words[BLOCK / LANES], token;
  for (int lane = 0; lane < LANES; ++lane) token[lane] = static_cast<uint32_t>(first) + lane;
  for (int64_t at = 0; at < count; at += LANES, token += LANES) words[at / LANES] = mixed_tokens(token);
  for (size_t row = 0; row < keys.size(); ++row) {
    const uint32_t low = static_cast<uint32_t>(keys[row]), high = static_cast<uint32_t>(keys[row] >> 32);
    float* to = out + row * stride + first;
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) *reinterpret_cast<Vector*>(to + at) = noise(words[at / LANES], low, high);
    if (at == count) continue;
    const Vector last = noise(words[at / LANES], low, high);
    std::copy_n(reinterpret_cast<const float*>(&last), count - at, to + at);
  }
}

at::Tensor gumbel(const at::Tensor& seeds, const at::Tensor& positions, int64_t vocabulary) {
  TORCH_CHECK(seeds.scalar_type() == at::kLong && positions.scalar_type() == at::kLong, "seeds and positions must be int64");
  TORCH_CHECK(vocabulary >= 1 && vocabulary < (int64_t{1} << 31), "vocabulary must be in [1, 2**31), not ", vocabulary);
  const auto rows = at::broadcast_tensors({seeds, positions});
  const at::Tensor seed = rows[0].contiguous(), position = rows[1].contiguous();
  std::vector<int64_t> shape = seed.sizes().vec();
  shape.push_back(vocabulary);
  at::Tensor out = at::empty(shape, seeds.options().dtype(at::kFloat));
  std::vector<uint64_t> keys(seed.numel());
  for (size_t row = 0; row < keys.size(); ++row) {
    const uint64_t step = (static_cast<uint64_t>(position.const_data_ptr<int64_t>()[row]) + 1) * STEP;
    keys[row] = mixed(mixed(static_cast<uint64_t>(seed.const_data_ptr<int64_t>()[row])) + step);
  }
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, (vocabulary + BLOCK - 1) / BLOCK, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      draw(keys, block * BLOCK, std::min(BLOCK, vocabulary - block * BLOCK), to, vocabulary);
  });
  return out;
}

}  // namespace ssd_gumbel

TORCH_LIBRARY_FRAGMENT(ssd, library) { library.def("gumbel(Tensor seeds, Tensor positions, int vocabulary) -> Tensor"); }

TORCH_LIBRARY_IMPL(ssd, CPU, library) { library.impl("gumbel", &ssd_gumbel::gumbel); }
