// Attention of decode rows over the slot cache: `tree_attention.py` says what, this is how on a CPU.
//
// For a few rows, attention is a few thousand multiplications; what costs is calling a dozen operators
// for them. Here it is one. Keys and values are read where they lie (no copies, no mask of the whole
// context), and only as far as a row attends. The rows of b are those of sequence `sequences[b]` of the
// cache, or of b.
//
// Per row everything runs in one fixed order: main slots ascending, scratch slots ascending, itself. So
// a row's result depends on what it attends and on nothing else in the batch.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vectors.h"

namespace ssd_rows_attention {

using namespace ssd_vectors;

constexpr int BLOCK = 32;     // slots whose keys stay in the first cache while all rows meet them
constexpr int KEYS = 8;       // that a query meets at once
constexpr int CHUNK = 8;      // vectors of an output kept in registers

// A query with N keys: the same sums as one by one, but N chains of multiplications that do not wait for each other.
template <int N, typename T>
inline void dots(const float* query, const T* keys, int64_t stride, int64_t vectors, float* to) {
  Vector totals[N] = {};
  for (int64_t v = 0; v < vectors; ++v) {
    const Vector part = load(query + v * LANES);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) totals[n] += part * load(keys + n * stride + v * LANES);
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) to[n] = sum(totals[n]);
}

template <typename T>
inline void all_dots(const float* query, const T* keys, int64_t stride, int64_t count, int64_t vectors, float* to) {
  int64_t s = 0;
  for (; s + KEYS <= count; s += KEYS) dots<KEYS>(query, keys + s * stride, stride, vectors, to + s);
  for (; s < count; ++s) dots<1>(query, keys + s * stride, stride, vectors, to + s);
}

// A row's scores become weights; returns 1 / their sum. `count` is padded with -inf to whole vectors. A sink is one
// more score, whose weight counts for the sum alone; -inf for none.
inline float to_weights(float* scores, int64_t count, float softcap, float sink) {
  if (softcap != 0)
    for (int64_t i = 0; i < count; ++i) scores[i] = std::tanh(scores[i] / softcap) * softcap;
  for (int64_t i = count; i % LANES; ++i) scores[i] = -std::numeric_limits<float>::infinity();
  float peak = std::max(scores[0], sink);
  for (int64_t i = 1; i < count; ++i) peak = std::max(peak, scores[i]);
  Vector total{};
  for (int64_t i = 0; i < count; i += LANES) {
    const Vector weights = exp_nonpositive(load(scores + i) - peak);
    *reinterpret_cast<Vector*>(scores + i) = weights;
    total += weights;
  }
  return 1.0f / (sum(total) + std::exp(sink - peak));
}

template <int N, typename T>
inline void add_values(const float* weights, int64_t slots, const T* values, int64_t stride, Vector* out) {
  for (int64_t s = 0; s < slots; ++s, values += stride)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) out[v] += weights[s] * load(values + v * LANES);
}

struct States {  // keys or values [S, H_kv, slots, D] of one sequence and head
  const void* data = nullptr;
  int64_t stride = 0;
  template <typename T>
  const T* at(int64_t slot) const { return static_cast<const T*>(data) + slot * stride; }
};

template <typename T>
States of(const at::Tensor& states, int64_t b, int64_t h) {
  return {states.const_data_ptr<T>() + b * states.stride(0) + h * states.stride(1), states.stride(2)};
}

template <int N, typename T>
void add_chunk(const float* weights, int64_t start, int64_t limit, const int32_t* seen, int64_t seen_count, States main, States scratch,
               const T* own, int64_t first, float scale, T* to) {
  Vector out[N] = {};
  const int64_t count = limit - start;
  add_values<N>(weights, count, main.at<T>(start) + first, main.stride, out);
  for (int64_t i = 0; i < seen_count; ++i) add_values<N>(weights + count + i, 1, scratch.at<T>(seen[i]) + first, 0, out);
  add_values<N>(weights + count + seen_count, 1, own + first, 0, out);
  for (int v = 0; v < N; ++v)
    for (int lane = 0; lane < LANES; ++lane) to[first + v * LANES + lane] = static_cast<T>(out[v][lane] * scale);
}

template <typename T>
void attend(const at::Tensor& query, const at::Tensor& main_keys, const at::Tensor& main_values,
            const at::Tensor& scratch_keys, const at::Tensor& scratch_values, const at::Tensor& own_keys,
            const at::Tensor& own_values, const at::Tensor& limits, const at::Tensor& starts, const at::Tensor& mask,
            const at::Tensor& sinks, const at::Tensor& sequences, float scale, float softcap, at::Tensor& out) {
  const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2), dim = query.size(3);
  const int64_t kv_heads = own_keys.size(1), group = heads / kv_heads, vectors = dim / LANES;
  const int64_t scratch_slots = scratch_keys.defined() ? scratch_keys.size(2) : 0;
  const int64_t most = main_keys.size(2);
  const int64_t width = (most + scratch_slots + 1 + LANES - 1) / LANES * LANES;
  const int64_t* limit_of = limits.const_data_ptr<int64_t>();
  const int64_t* start_of = starts.defined() ? starts.const_data_ptr<int64_t>() : nullptr;
  const float* sink_of = sinks.defined() ? sinks.const_data_ptr<float>() : nullptr;
  const bool* shown = scratch_slots ? mask.const_data_ptr<bool>() : nullptr;
  const bool own_masks = scratch_slots && mask.dim() == 3 && mask.size(0) > 1;
  const int64_t* sequence_of = sequences.defined() ? sequences.const_data_ptr<int64_t>() : nullptr;

  at::parallel_for(0, batch * kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(rows * group * width), scaled(rows * group * dim);
    std::vector<int32_t> seen(rows * scratch_slots);
    std::vector<int64_t> counts(rows), firsts(rows), lasts(rows);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / kv_heads, h = task % kv_heads, at = sequence_of ? sequence_of[b] : b;
      const States mk = of<T>(main_keys, at, h), mv = of<T>(main_values, at, h);
      const States ok = of<T>(own_keys, b, h), ov = of<T>(own_values, b, h);
      const States sk = scratch_slots ? of<T>(scratch_keys, at, h) : States{};
      const States sv = scratch_slots ? of<T>(scratch_values, at, h) : States{};
      int64_t earliest = most, longest = 0;
      for (int64_t r = 0; r < rows; ++r) {
        lasts[r] = std::clamp<int64_t>(limit_of[b * rows + r], 0, most);
        firsts[r] = start_of ? std::clamp<int64_t>(start_of[b * rows + r], 0, lasts[r]) : 0;
        earliest = std::min(earliest, firsts[r]);
        longest = std::max(longest, lasts[r]);
        counts[r] = 0;
        for (int64_t x = 0; x < scratch_slots; ++x)
          if (shown[((own_masks ? b * rows : 0) + r) * scratch_slots + x]) seen[r * scratch_slots + counts[r]++] = x;
        for (int64_t g = 0; g < group; ++g) {
          const T* from = query.const_data_ptr<T>() + b * query.stride(0) + (h * group + g) * query.stride(1) + r * query.stride(2);
          for (int64_t d = 0; d < dim; ++d) scaled[(r * group + g) * dim + d] = static_cast<float>(from[d]) * scale;
        }
      }
      for (int64_t block = earliest; block < longest; block += BLOCK)
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t first = std::max(firsts[r], block), last = std::min(lasts[r], block + BLOCK);
          for (int64_t m = r * group; m < (r + 1) * group; ++m)
            all_dots(&scaled[m * dim], mk.at<T>(first), mk.stride, last - first, vectors, &scores[m * width + first - firsts[r]]);
        }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t g = 0; g < group; ++g) {
          const int64_t m = r * group + g, start = firsts[r], limit = lasts[r], count = counts[r];
          const int32_t* slots = seen.data() + r * scratch_slots;
          float* mine = &scores[m * width];
          for (int64_t i = 0; i < count; ++i) dots<1>(&scaled[m * dim], sk.at<T>(slots[i]), 0, vectors, mine + limit - start + i);
          dots<1>(&scaled[m * dim], ok.at<T>(r), 0, vectors, mine + limit - start + count);
          const float sink = sink_of ? sink_of[h * group + g] : -std::numeric_limits<float>::infinity();
          const float share = to_weights(mine, limit - start + count + 1, softcap, sink);
          T* to = out.mutable_data_ptr<T>() + ((b * rows + r) * heads + h * group + g) * dim;
          int64_t v = 0;
          for (; v + CHUNK <= vectors; v += CHUNK)
            add_chunk<CHUNK, T>(mine, start, limit, slots, count, mv, sv, ov.at<T>(r), v * LANES, share, to);
          for (; v < vectors; ++v) add_chunk<1, T>(mine, start, limit, slots, count, mv, sv, ov.at<T>(r), v * LANES, share, to);
        }
    }
  });
}

at::Tensor dense(const at::Tensor& states) { return states.stride(-1) == 1 ? states : states.contiguous(); }

at::Tensor rows_attention(const at::Tensor& query, const at::Tensor& main_keys, const at::Tensor& main_values,
                          const std::optional<at::Tensor>& scratch_keys,
                          const std::optional<at::Tensor>& scratch_values, const at::Tensor& own_keys,
                          const at::Tensor& own_values, const at::Tensor& limits, const std::optional<at::Tensor>& mask,
                          double scale, double softcap, const std::optional<at::Tensor>& starts,
                          const std::optional<at::Tensor>& sinks, const std::optional<at::Tensor>& sequences) {
  const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2), dim = query.size(3);
  TORCH_CHECK(dim % LANES == 0 && heads % own_keys.size(1) == 0, "head size must be a multiple of ", LANES);
  at::Tensor out = at::empty({batch, rows, heads, dim}, query.options());
  const bool has_scratch = scratch_keys && scratch_values && mask;
  const at::Tensor none;
  const at::Tensor seen = has_scratch ? mask->contiguous() : none;
  const at::Tensor sk = has_scratch ? dense(*scratch_keys) : none, sv = has_scratch ? dense(*scratch_values) : none;
  const at::Tensor q = dense(query), ok = dense(own_keys), ov = dense(own_values), mk = dense(main_keys);
  const at::Tensor mv = dense(main_values), until = limits.expand({batch, rows}).contiguous();
  const at::Tensor from = starts ? starts->expand({batch, rows}).contiguous() : none;
  const at::Tensor drain = sinks ? sinks->to(at::kFloat).contiguous() : none;
  const at::Tensor which = sequences ? sequences->contiguous() : none;
  if (query.scalar_type() == at::kBFloat16)
    attend<at::BFloat16>(q, mk, mv, sk, sv, ok, ov, until, from, seen, drain, which, scale, softcap, out);
  else
    attend<float>(q, mk, mv, sk, sv, ok, ov, until, from, seen, drain, which, scale, softcap, out);
  return out;
}

}  // namespace ssd_rows_attention

// No argument has a default: calls that torch.compile makes from C++ crash on one (torch 2.13).
TORCH_LIBRARY_FRAGMENT(ssd, library) {
  library.def(
      "rows_attention(Tensor query, Tensor main_keys, Tensor main_values, Tensor? scratch_keys, Tensor? scratch_values, "
      "Tensor own_keys, Tensor own_values, Tensor limits, Tensor? mask, float scale, float softcap, "
      "Tensor? starts, Tensor? sinks, Tensor? sequences) -> Tensor");
}

TORCH_LIBRARY_IMPL(ssd, CPU, library) { library.impl("rows_attention", &ssd_rows_attention::rows_attention); }
