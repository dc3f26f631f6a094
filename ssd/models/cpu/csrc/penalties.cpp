// Repetition, presence and frequency penalties of rows with paths, as `Processors._penalize` has them, in place.
//
// In torch that is twenty passes over every row of the vocabulary; here one. Each element goes through the same
// operations in the same order, so the bits are the same too.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace ssd_penalties {

struct Penalties {
  float repetition, presence, frequency;
};

__attribute__((optimize("fp-contract=off"))) inline float penalized(float logit, int32_t count, bool seen, const Penalties& of) {
  const float repeated = logit > 0 ? logit / of.repetition : logit * of.repetition;
  const float frequent = of.frequency * static_cast<float>(count), present = of.presence * (count > 0 ? 1.0f : 0.0f);
  return ((seen || count > 0 ? repeated : logit) - frequent) - present;
}

__attribute__((optimize("fp-contract=off"))) void penalize_row(float* row, const int32_t* counts, const bool* in_prompt,
                                                               int64_t vocabulary, const Penalties& of) {
  for (int64_t token = 0; token < vocabulary; ++token) row[token] = penalized(row[token], counts[token], in_prompt[token], of);
}

void penalize(const at::Tensor& rows, const at::Tensor& counts, const at::Tensor& in_prompt, const at::Tensor& penalties,
              const at::Tensor& slots, const at::Tensor& given) {
  TORCH_CHECK(rows.dim() == 3 && rows.is_contiguous() && rows.scalar_type() == at::kFloat, "rows must be float32 [A, R, V]");
  const int64_t active = rows.size(0), each = rows.size(1), vocabulary = rows.size(2), batch = counts.size(0);
  TORCH_CHECK(counts.is_contiguous() && counts.scalar_type() == at::kInt && in_prompt.is_contiguous() &&
                  in_prompt.scalar_type() == at::kBool && counts.size(1) == vocabulary &&
                  in_prompt.sizes() == counts.sizes(),
              "counts must be int32 [B, V], and what is in the prompt bool");
  TORCH_CHECK(penalties.is_contiguous() && penalties.scalar_type() == at::kFloat && penalties.size(0) == 3 &&
                  penalties.size(1) == batch,
              "penalties must be float32 [3, B]");
  const at::Tensor paths = given.contiguous();
  TORCH_CHECK(slots.numel() == active && slots.scalar_type() == at::kLong && paths.scalar_type() == at::kLong &&
                  paths.dim() == 3 && paths.size(0) == active && paths.size(1) == each,
              "slots must be int64 [A] and paths [A, R, D]");
  const int64_t depth = paths.size(2);
  const float* of = penalties.const_data_ptr<float>();
  at::parallel_for(0, active * each, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> before(depth);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t slot = slots.const_data_ptr<int64_t>()[at / each];
      const int64_t* path = paths.const_data_ptr<int64_t>() + at * depth;
      const Penalties asked{of[slot], of[batch + slot], of[2 * batch + slot]};
      const int32_t* counted = counts.const_data_ptr<int32_t>() + slot * vocabulary;
      const bool* prompt = in_prompt.const_data_ptr<bool>() + slot * vocabulary;
      float* row = rows.mutable_data_ptr<float>() + at * vocabulary;
      for (int64_t i = 0; i < depth; ++i)
        if (path[i] >= 0) before[i] = row[path[i]];
      penalize_row(row, counted, prompt, vocabulary, asked);
      for (int64_t i = 0; i < depth; ++i)
        if (path[i] >= 0) {
          const int32_t more = static_cast<int32_t>(std::count(path, path + depth, path[i]));
          row[path[i]] = penalized(before[i], counted[path[i]] + more, true, asked);
        }
    }
  });
}

}  // namespace ssd_penalties

TORCH_LIBRARY_FRAGMENT(ssd, library) {
  library.def(
      "penalize(Tensor(a!) rows, Tensor counts, Tensor in_prompt, Tensor penalties, Tensor slots, Tensor paths) -> ()");
}

TORCH_LIBRARY_IMPL(ssd, CPU, library) { library.impl("penalize", &ssd_penalties::penalize); }
