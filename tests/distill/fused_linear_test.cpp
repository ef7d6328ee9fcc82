// The fused loss beyond its equality with the plain one: chunks, bfloat16 products, and how much memory it takes.
#include "distill/fused_linear.h"

#include "tests/catch_torch.h"

#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <memory>

#include "tests/distill/tensors.h"
#include "train/chunked_loss.h"
#include "train/logit_chunk.h"
#include "train/precision.h"

using namespace kompakt;
using kompakt::testing::largest_difference;
using kompakt::testing::random_tensor;

namespace {

struct FusedResult {
  double value;
  at::Tensor to_hidden, to_weight;
};

FusedResult fused_result(const LogitLoss& loss, const at::Tensor& hidden, const at::Tensor& weight, const FusedTeacher& teacher, std::int64_t chunk, bool bf16 = false) {
  const at::Tensor h = hidden.clone().requires_grad_(), w = weight.clone().requires_grad_();
  const AutocastGuard autocast(c10::Device(c10::kCPU), bf16);
  LogitLossOptions options;
  options.temperature = 2;
  const at::Tensor value = fused_linear_loss(loss, h, w, {}, teacher, options, chunk);
  const auto gradients = torch::autograd::grad({value}, {h, w});
  return {value.item<double>(), gradients[0], gradients[1]};
}

double fused_relative(const at::Tensor& a, const at::Tensor& b) { return ((a - b).norm() / b.norm()).item<double>(); }

// Bytes that tensors of this thread hold now and held at most while it lives, beyond what was there before.
class AllocationCounter : public c10::MemoryReportingInfoBase {
 public:
  std::int64_t now = 0, peak = 0;
  void reportMemoryUsage(void*, std::int64_t bytes, std::size_t, std::size_t, c10::Device) override { now += bytes, peak = std::max(peak, now); }
  bool memoryProfilingEnabled() const override { return true; }
};

template <class Function>
std::int64_t peak_bytes(const Function& function) {
  const int threads = at::get_num_threads();
  at::set_num_threads(1);  // the counter belongs to this thread
  const auto counter = std::make_shared<AllocationCounter>();
  {
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, counter);
    function();
  }
  at::set_num_threads(threads);
  return counter->peak;
}

}  // namespace

TEST_CASE("fused linear loss: the size of a chunk changes sums by rounding alone", "[distill][fused_linear]") {
  const std::int64_t n = 101, d = 12, v = 300;  // no chunk size but 1 divides the rows
  const at::Tensor hidden = random_tensor({n, d}, 1).to(at::kFloat), weight = random_tensor({v, d}, 2).to(at::kFloat);
  const FusedTeacher teacher{{}, random_tensor({n, d}, 3).to(at::kFloat), random_tensor({v, d}, 4).to(at::kFloat), {}, nullptr};
  for (const LogitLoss& loss : logit_losses()) {
    const FusedResult whole = fused_result(loss, hidden, weight, teacher, n);
    for (const std::int64_t chunk : {std::int64_t(1), std::int64_t(7), std::int64_t(64), std::int64_t(1000), std::int64_t(0), logit_chunk(c10::DeviceType::CUDA, v, 2)}) {
      INFO(loss.name << " chunk " << chunk);
      const FusedResult part = fused_result(loss, hidden, weight, teacher, chunk);
      // Sums of 101 float32 numbers in another order, and products whose blocks another number of rows chooses.
      CHECK(part.value == Approx(whole.value).epsilon(2e-6));
      CHECK(fused_relative(part.to_hidden, whole.to_hidden) < 1e-5);
      CHECK(fused_relative(part.to_weight, whole.to_weight) < 1e-5);
    }
  }
  const at::Tensor targets = at::arange(n, at::kLong) * 37 % v;
  const double whole = chunked_cross_entropy(hidden, weight, {}, targets, 0.1, n).item<double>();
  for (const std::int64_t chunk : {1, 7, 64, 0}) CHECK(chunked_cross_entropy(hidden, weight, {}, targets, 0.1, chunk).item<double>() == Approx(whole).epsilon(2e-6));
}

TEST_CASE("fused linear loss under bfloat16 autocast stays near float32, and sums over chunks in float32", "[distill][fused_linear]") {
  const std::int64_t n = 97, d = 32, v = 515;
  const at::Tensor hidden = random_tensor({n, d}, 5).to(at::kFloat), weight = random_tensor({v, d}, 6, 0.5).to(at::kFloat);
  const FusedTeacher teacher{{}, random_tensor({n, d}, 7).to(at::kFloat), random_tensor({v, d}, 8, 0.5).to(at::kFloat), {}, nullptr};
  for (const LogitLoss& loss : logit_losses()) {
    const FusedResult exact = fused_result(loss, hidden, weight, teacher, n), half = fused_result(loss, hidden, weight, teacher, 40, true), small = fused_result(loss, hidden, weight, teacher, 1, true);
    INFO(loss.name << " value " << half.value / exact.value - 1 << ", hidden " << fused_relative(half.to_hidden, exact.to_hidden) << ", weight " << fused_relative(half.to_weight, exact.to_weight) << ", weight by rows "
                   << fused_relative(small.to_weight, exact.to_weight));
    CHECK(half.to_weight.scalar_type() == at::kFloat);
    // bfloat16 has 8 bits: every factor and every logit is off by up to 2^-9 of itself. Logits of up to 10 are off by 0.02, so are, relatively,
    // probabilities and what is made of them; averages over hundreds of columns are nearer.
    CHECK(half.value == Approx(exact.value).epsilon(0.005));
    // Slopes that are on or off come or go whole where two numbers nearly tie: the sign of q - p, and which eight tokens are the teacher's likeliest.
    const double bound = loss.uses_top ? 0.3 : loss.name == "total_variation" ? 0.1 : 0.02;
    CHECK(fused_relative(half.to_hidden, exact.to_hidden) < bound);
    CHECK(fused_relative(half.to_weight, exact.to_weight) < bound);
    // As many chunks as rows: a sum kept in bfloat16 would lose bits at each of 97 additions.
    CHECK(fused_relative(small.to_weight, exact.to_weight) < bound);
  }
}

TEST_CASE("fused losses never hold the logits of all tokens", "[distill][fused_linear]") {
  const std::int64_t n = 1280, d = 16, v = 4096, chunk = 64, of_chunk = chunk * v * 4, of_all = n * v * 4, of_weight = v * d * 4;
  const at::Tensor hidden = random_tensor({n, d}, 9).to(at::kFloat).requires_grad_(), weight = random_tensor({v, d}, 10).to(at::kFloat).requires_grad_();
  const FusedTeacher teacher{{}, random_tensor({n, d}, 11).to(at::kFloat), random_tensor({v, d}, 12).to(at::kFloat), {}, nullptr};
  const at::Tensor targets = at::arange(n, at::kLong) * 37 % v;
  // The counter sees what it is there for: both sides' logits.
  const std::int64_t plain = peak_bytes([&] { logit_loss(*find_logit_loss("forward_kl"), at::linear(hidden, weight), at::linear(teacher.hidden, teacher.weight)); });
  CHECK(plain > 2 * of_all);
  const std::int64_t small = 2 * of_weight + 4 * n * d;  // gradients of head and hidden states, and a copy
  for (const LogitLoss& loss : logit_losses()) {
    LogitLossOptions options;
    const std::int64_t peak = peak_bytes([&] { fused_linear_loss(loss, hidden, weight, {}, teacher, options, chunk).backward(); });
    INFO(loss.name << " holds " << static_cast<double>(peak) / static_cast<double>(of_chunk) << " chunks of logits");
    // By rows: both sides and nothing else. Others: what fused_linear.h says.
    const std::int64_t chunks = loss.by_rows ? 2 : loss.name == "adaptive_kl" ? 17 : 11;
    CHECK(peak <= chunks * of_chunk + small);
    CHECK(peak < of_all);
  }
  const std::int64_t labels = peak_bytes([&] { chunked_cross_entropy(hidden, weight, {}, targets, 0.1, chunk).backward(); });
  INFO("cross entropy holds " << static_cast<double>(labels) / static_cast<double>(of_chunk));
  CHECK(labels <= 2 * of_chunk + small);
}
