// The sampler alone, for tests. One call allocates its scratch; the engine never comes this way.
#include "bindings/bindings.h"
#include "kernels/philox.h"
#include "kernels/sample.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace nb = nanobind;

namespace setpoint {
namespace {

using Row = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = std::vector<int32_t>;

nb::dict kernels_sample(const Row& logits, float temperature, int top_k, float top_p, float min_p, uint64_t seed, int64_t position,
                        float repetition, float frequency, float presence, const Ids& penalty_ids, const Ids& penalty_counts,
                        const Ids& bias_ids, const std::vector<float>& bias_values, const Ids& banned, const std::optional<Ids>& allowed,
                        const std::optional<std::vector<uint32_t>>& mask, int target, int num_logprobs, const std::string& isa) {
  if (penalty_ids.size() != penalty_counts.size() || bias_ids.size() != bias_values.size())
    throw std::invalid_argument("ids and their values differ in length");
  std::vector<float> row(logits.data(), logits.data() + logits.size());
  SampleArgs args;
  args.logits = row.data();
  args.vocab = static_cast<int>(row.size());
  args.temperature = temperature;
  args.top_k = top_k;
  args.top_p = top_p;
  args.min_p = min_p;
  args.seed = seed;
  args.position = position;
  args.repetition = repetition;
  args.frequency = frequency;
  args.presence = presence;
  args.penalty_ids = penalty_ids.data();
  args.penalty_counts = penalty_counts.data();
  args.num_penalties = static_cast<int>(penalty_ids.size());
  args.bias_ids = bias_ids.data();
  args.bias_values = bias_values.data();
  args.num_bias = static_cast<int>(bias_ids.size());
  args.banned = banned.data();
  args.num_banned = static_cast<int>(banned.size());
  if (allowed) {
    args.allowed = allowed->data();
    args.num_allowed = static_cast<int>(allowed->size());
  }
  if (mask && mask->size() != (row.size() + 31) / 32) throw std::invalid_argument("mask: one word for 32 tokens");
  if (mask) args.mask = mask->data();
  args.target = target;
  args.num_logprobs = num_logprobs;
  SampleScratch scratch(args.vocab, isa.c_str());
  SampleResult result;
  sample_row(args, scratch, result);

  nb::dict out;
  out["token"] = result.token;
  out["finite"] = result.finite;
  out["logprob"] = result.logprob;
  out["rank"] = result.rank;
  out["top_ids"] = Ids(result.top_ids, result.top_ids + result.num_top);
  out["top_logprobs"] = std::vector<float>(result.top_logprobs, result.top_logprobs + result.num_top);
  return out;
}

}  // namespace

void bind_sampling(nb::module_& m) {
  using nb::arg;
  m.def("kernels_sample", &kernels_sample, arg("logits"), nb::kw_only(), arg("temperature") = 1.f, arg("top_k") = 0, arg("top_p") = 1.f,
        arg("min_p") = 0.f, arg("seed") = 0, arg("position") = 0, arg("repetition") = 1.f, arg("frequency") = 0.f, arg("presence") = 0.f,
        arg("penalty_ids") = Ids(), arg("penalty_counts") = Ids(), arg("bias_ids") = Ids(), arg("bias_values") = std::vector<float>(),
        arg("banned") = Ids(), arg("allowed") = nb::none(), arg("mask") = nb::none(), arg("target") = -1, arg("num_logprobs") = -1,
        arg("isa") = "auto", "Chooses a token from one row of float32 logits (left unchanged); fields as in csrc/kernels/sample.h.");
  m.def(
      "random_uniform", [](uint64_t seed, int64_t position) { return random_uniform(seed, position); }, arg("seed"), arg("position"),
      "The uniform number in [0, 1) that a draw at (seed, position) uses.");
}

}  // namespace setpoint
