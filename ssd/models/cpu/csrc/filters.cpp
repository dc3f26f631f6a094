// Scores of a sampled choice: top-k, top-p and min-p without sorting a vocabulary, and noise, in one pass.
//
// What `decoding/sampling.py` defines (`filter_logits`, `scores`), for float32 on CPUs. A sort of every row is what
// filters cost there, .5 ms for 4,096 tokens and 20 to 35 ms for 150,000, and a draft has thirty rows a round. But few
// tokens are likely: the edge of top-k and top-p is found among those within some nats of the greatest, by halving them
// (quickselect, by counts or by mass), and the others are passed over in groups whose greatest is known. Of tokens tied
// at the edge of top-p those with the higher id stay.
//
// What a row keeps depends on that row alone.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "vectors.h"

namespace ssd_filters {

using namespace ssd_vectors;

constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr float NATS[] = {4, 7, 10, 15, -NEVER};  // below the greatest: how far to look for the edge, until it is found
constexpr int64_t GROUP = 32;                     // tokens of which the likeliest is known
constexpr int64_t BLOCK = 512;                    // weights whose sum is float32

struct Sampling {
  float temperature, top_k, top_p, min_p;  // a row of `SamplingTensors.packed()`
};

// `Processors.fixed` of a row, [3][V]: biases, factors, penalties. The first factor is 0 where it asks for nothing.
// `allowed`: [V] or null.
void process(const float* logits, const float* fixed, const bool* allowed, int64_t vocabulary, float* out) {
  const float *biases = fixed, *factors = fixed + vocabulary, *penalties = fixed + 2 * vocabulary;
  for (int64_t token = 0; token < vocabulary; ++token) {
    const float biased = logits[token] + biases[token];
    out[token] = (biased > 0 ? biased / factors[token] : biased * factors[token]) - penalties[token];
  }
  if (!allowed) return;
  for (int64_t token = 0; token < vocabulary; ++token) out[token] = allowed[token] ? out[token] : NEVER;
}

// A token stays if its logit is greater than `value`, or equal and its id at least `first`.
struct Edge {
  float value = NEVER;
  int64_t first = 0;
};

Edge higher(Edge a, Edge b) { return std::pair(a.value, a.first) < std::pair(b.value, b.first) ? b : a; }

struct Item {
  float logit, weight;
  int64_t token;
};

bool likelier(const Item& a, const Item& b) { return a.logit > b.logit || (a.logit == b.logit && a.token > b.token); }

class Row {
 public:
  Row(const float* logits, int64_t vocabulary, float temperature)
      : logits_(logits), vocabulary_(vocabulary), temperature_(temperature), greatest_of_((vocabulary + GROUP - 1) / GROUP) {
    for (size_t group = 0; group < greatest_of_.size(); ++group) {
      const int64_t first = group * GROUP, last = std::min(first + GROUP, vocabulary);
      Vector most = Vector{} + NEVER;
      int64_t at = first;
      for (; at + LANES <= last; at += LANES) {
        const Vector part = load(logits + at);
        most = part > most ? part : most;
      }
      float greatest_here = NEVER;
      for (int lane = 0; lane < LANES; ++lane) greatest_here = std::max(greatest_here, most[lane]);
      for (; at < last; ++at) greatest_here = std::max(greatest_here, logits[at]);
      greatest_of_[group] = greatest_here;
    }
    greatest = *std::max_element(greatest_of_.begin(), greatest_of_.end());
  }

  // Tokens whose logit is at least this.
  std::vector<Item> from(float least) const {
    std::vector<Item> items;
    for (size_t group = 0; group < greatest_of_.size(); ++group) {
      if (greatest_of_[group] < least) continue;
      const int64_t first = group * GROUP, last = std::min(first + GROUP, vocabulary_);
      for (int64_t token = first; token < last; ++token)
        if (logits_[token] >= least) items.push_back({logits_[token], weights_.empty() ? 0 : weights_[token], token});
    }
    return items;
  }

  std::vector<Item> within(float nats) const { return from(greatest - nats * temperature_); }

  // At least k tokens, and all that are as likely as one of them: each of k groups has one.
  std::vector<Item> at_least(size_t k) const {
    if (k > greatest_of_.size()) return from(NEVER);
    std::vector<float> ordered = greatest_of_;
    std::nth_element(ordered.begin(), ordered.begin() + (k - 1), ordered.end(), std::greater<float>());
    return from(ordered[k - 1]);
  }

  // Their probabilities over that of the likeliest, where `weigh` has not.
  void weigh(std::vector<Item>& items) const {
    for (Item& item : items) item.weight = std::exp((item.logit - greatest) / temperature_);
  }

  // The same of all tokens, for `within`; returns their sum.
  double weigh() {
    weights_.resize((vocabulary_ + BLOCK - 1) / BLOCK * BLOCK);
    std::copy_n(logits_, vocabulary_, weights_.data());
    std::fill(weights_.begin() + vocabulary_, weights_.end(), NEVER);
    double total = 0;
    for (float* block = weights_.data(); block < weights_.data() + weights_.size(); block += BLOCK) {
      Vector part = {};
      for (float* at = block; at < block + BLOCK; at += LANES) {
        Vector& weights = *reinterpret_cast<Vector*>(at);
        weights = exp_nonpositive((weights - greatest) / temperature_);
        part += weights;
      }
      total += sum(part);
    }
    return total;
  }

 private:
  const float* logits_;
  const int64_t vocabulary_;
  const float temperature_;
  std::vector<float> greatest_of_, weights_;  // of groups; of tokens

 public:
  float greatest;
};

double mass_of(std::vector<Item>::const_iterator first, std::vector<Item>::const_iterator last) {
  double mass = 0;
  for (; first < last; ++first) mass += first->weight;
  return mass;
}

// The item, likeliest first, with which the mass so far reaches `wanted`.
Item reaching(std::vector<Item>& items, double wanted) {
  auto first = items.begin(), last = items.end();
  while (last - first > 1) {
    const auto middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, likelier);
    const double mass = mass_of(first, middle);
    if (mass >= wanted) {
      last = middle;
    } else {
      wanted -= mass;
      first = middle;
    }
  }
  return *first;
}

Edge edge_of(const float* logits, int64_t vocabulary, const Sampling& wanted) {
  const bool by_count = wanted.top_k > 0 && wanted.top_k < static_cast<float>(vocabulary), by_mass = wanted.top_p < 1;
  if (!(wanted.temperature > 0) || !(by_count || by_mass || wanted.min_p > 0)) return {};
  Row row(logits, vocabulary, wanted.temperature);
  Edge edge;
  if (wanted.min_p > 0) edge.value = row.greatest + wanted.temperature * std::log(wanted.min_p);
  std::vector<Item> items;
  double mass = 0;  // of what top-k leaves
  if (by_count) {
    const size_t k = static_cast<size_t>(wanted.top_k);
    items = row.at_least(k);
    if (items.size() < k) return edge;  // some logits are no numbers: there is nothing right to do
    std::nth_element(items.begin(), items.begin() + (k - 1), items.end(), likelier);
    const float kth = items[k - 1].logit;
    std::erase_if(items, [&](const Item& item) { return item.logit < kth; });  // ties with the k-th stay
    edge = higher(edge, {kth, 0});
    if (!by_mass) return edge;
    row.weigh(items);
    mass = mass_of(items.begin(), items.end());
  } else if (by_mass) {
    mass = row.weigh();
    for (const float nats : NATS) {
      items = row.within(nats);
      if (mass_of(items.begin(), items.end()) >= wanted.top_p * mass) break;
    }
  } else {
    return edge;
  }
  if (items.empty()) return edge;
  const Item last = reaching(items, wanted.top_p * mass);
  return higher(edge, {last.logit, last.token});
}

// Two operations, not a fused multiply-add: the bits of `sampling.perturbed`.
__attribute__((optimize("fp-contract=off"))) void perturb(const float* logits, const float* noise, float temperature,
                                                          int64_t count, float* out) {
  for (int64_t at = 0; at < count; ++at) {
    const float scaled = noise[at] * temperature;
    out[at] = logits[at] + scaled;
  }
}

at::Tensor dense(const at::Tensor& logits) { return logits.stride(-1) == 1 ? logits : logits.contiguous(); }

// For every row `fill(b, r, logits, sampling, out)`, then the edge of what it is told are the logits is applied.
template <typename Fill>
at::Tensor filtered(const at::Tensor& given, const at::Tensor& packed, const at::Tensor& processing,
                    const at::Tensor& allowed, const Fill& fill) {
  TORCH_CHECK(given.dim() == 3 && given.scalar_type() == at::kFloat, "logits must be float32 [B, R, V]");
  TORCH_CHECK(packed.dim() == 2 && packed.size(0) == given.size(0) && packed.size(1) == 4 && packed.is_contiguous() &&
                  packed.scalar_type() == at::kFloat,
              "sampling parameters must be float32 [B, 4]");
  const at::Tensor logits = dense(given);
  const int64_t rows = logits.size(1), vocabulary = logits.size(2);
  at::Tensor out = at::empty(logits.sizes(), logits.options());
  const float *from = logits.const_data_ptr<float>(), *processes = nullptr;
  if (processing.defined()) {
    TORCH_CHECK(processing.dim() == 3 && processing.size(0) == logits.size(0) && processing.size(1) == 3 &&
                    processing.size(2) == vocabulary && processing.is_contiguous() && processing.scalar_type() == at::kFloat,
                "fixed processing must be float32 [B, 3, V]");
    processes = processing.const_data_ptr<float>();
  }
  const bool* allows = nullptr;
  if (allowed.defined()) {
    TORCH_CHECK(allowed.sizes() == logits.sizes() && allowed.stride(-1) == 1 && allowed.scalar_type() == at::kBool,
                "what is allowed must be bool [B, R, V]");
    allows = allowed.const_data_ptr<bool>();
  }
  float* to = out.mutable_data_ptr<float>();
  const Sampling* sampling = reinterpret_cast<const Sampling*>(packed.const_data_ptr<float>());
  at::parallel_for(0, logits.size(0) * rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> processed;
    for (int64_t at = begin; at < end; ++at) {
      const int64_t b = at / rows, r = at % rows;
      const float* row = from + b * logits.stride(0) + r * logits.stride(1);
      if (processes && processes[(3 * b + 1) * vocabulary] != 0) {
        processed.resize(vocabulary);
        const bool* here = allows ? allows + b * allowed.stride(0) + r * allowed.stride(1) : nullptr;
        process(row, processes + 3 * b * vocabulary, here, vocabulary, processed.data());
        row = processed.data();
      }
      float* into = to + at * vocabulary;
      fill(b, r, row, sampling[b], into);
      const Edge edge = edge_of(row, vocabulary, sampling[b]);
      if (edge.value == NEVER) continue;
      for (int64_t token = 0; token < vocabulary; ++token) into[token] = row[token] < edge.value ? NEVER : into[token];
      for (int64_t token = 0; token < edge.first; ++token) into[token] = row[token] == edge.value ? NEVER : into[token];
    }
  });
  return out;
}

at::Tensor filter_logits(const at::Tensor& logits, const at::Tensor& packed) {
  const int64_t vocabulary = logits.size(-1);
  return filtered(logits, packed, {}, {}, [&](int64_t, int64_t, const float* row, const Sampling& sampling, float* out) {
    const float temperature = sampling.temperature > 0 ? sampling.temperature : 1.0f;
    for (int64_t token = 0; token < vocabulary; ++token) out[token] = row[token] / temperature;
  });
}

at::Tensor scores(const at::Tensor& logits, const at::Tensor& given, const at::Tensor& ahead, const at::Tensor& packed,
                  const std::optional<at::Tensor>& fixed, const std::optional<at::Tensor>& allowed) {
  const int64_t vocabulary = logits.size(-1);
  TORCH_CHECK(given.dim() == 3 && given.size(0) == logits.size(0) && given.size(2) == vocabulary &&
                  given.scalar_type() == at::kFloat,
              "noise must be float32 [B, H, V]");
  TORCH_CHECK(ahead.dim() == 2 && ahead.size(0) == logits.size(0) && ahead.size(1) == logits.size(1) &&
                  ahead.scalar_type() == at::kLong,
              "rows of noise must be int64 [B, R]");
  const at::Tensor noise = dense(given), processing = fixed.value_or(at::Tensor()), allows = allowed.value_or(at::Tensor());
  const float* drawn = noise.const_data_ptr<float>();
  const int64_t* which = ahead.const_data_ptr<int64_t>();
  const auto fill = [&](int64_t b, int64_t r, const float* row, const Sampling& sampling, float* out) {
    const int64_t place = which[b * ahead.stride(0) + r * ahead.stride(1)];
    TORCH_CHECK(place >= 0 && place < noise.size(1), "there is no row ", place, " of noise");
    perturb(row, drawn + b * noise.stride(0) + place * noise.stride(1), sampling.temperature, vocabulary, out);
  };
  return filtered(logits, packed, processing, allows, fill);
}

}  // namespace ssd_filters

TORCH_LIBRARY_FRAGMENT(ssd, library) {
  library.def("filter_logits(Tensor logits, Tensor packed) -> Tensor");
  library.def(
      "scores(Tensor logits, Tensor noise, Tensor ahead, Tensor packed, Tensor? fixed, Tensor? allowed) -> Tensor");
}

TORCH_LIBRARY_IMPL(ssd, CPU, library) {
  library.impl("filter_logits", &ssd_filters::filter_logits);
  library.impl("scores", &ssd_filters::scores);
}
