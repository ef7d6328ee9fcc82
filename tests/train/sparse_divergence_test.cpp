// KL from the teacher's cache: the hand's numbers, the bound over many draws and in every position, the codes alone, whole windows.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"

#include <cmath>

#include "tests/support.h"
#include "tests/train/fixtures.h"
#include "train/sparse_codec.h"
#include "train/sparse_divergence.h"
#include "train/teacher.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

std::shared_ptr<Transformer> sharp_decoder(std::uint64_t seed) {
  std::shared_ptr<Transformer> model = tiny_llama(true, seed);
  const at::NoGradGuard no_grad;
  for (const NamedParameter& parameter : model->parameters())
    if (parameter.value->dim() == 2) parameter.value->mul_(20);
  return model;
}

// The teacher's weights, a little off.
std::shared_ptr<Transformer> student_of(const Transformer& teacher, double distance) {
  const std::shared_ptr<Transformer> out = teacher.clone(), other = sharp_decoder(99);
  const at::NoGradGuard no_grad;
  auto from = other->parameters(), into = out->parameters();
  for (std::size_t i = 0; i < into.size(); ++i) into[i].value->add_(*from[i].value, distance);
  return out;
}

std::vector<std::int64_t> some_window(std::int64_t length) {
  std::vector<std::int64_t> out;
  for (std::int64_t i = 0; i < length; ++i) out.push_back((i * 17 + i * i) % 50);
  return out;
}

TaskData no_text() {
  TaskData data;
  data.kind = TaskData::Kind::text;
  data.hash = "windows";
  return data;
}

TokenBatch one_row(const std::vector<std::int64_t>& ids, std::int64_t number) {
  const auto length = static_cast<std::int64_t>(ids.size());
  return {.ids = ids, .lengths = {length}, .examples = {number}, .rows = 1, .columns = length};
}

SparseTargets flat(const SparseTargets& s) { return {s.ids.flatten(0, 1), s.log_p.flatten(0, 1), s.log_rest.flatten(0, 1), s.draws.flatten(0, 1), s.draw_log_p.flatten(0, 1), s.vocabulary}; }

struct Exact {
  at::Tensor kl, same, logits;  // [n] float64, [n] bool, the student's [n,V]
};
Exact exact_divergence(const Transformer& student, const Transformer& teacher, const std::vector<std::int64_t>& window) {
  const ModelInput input = to_input(one_row(window, 0), c10::Device(c10::kCPU));
  const at::Tensor logits = student.forward(input)[0], other = teacher.forward(input)[0];
  const at::Tensor log_p = at::log_softmax(other.to(at::kDouble), -1), log_q = at::log_softmax(logits.to(at::kDouble), -1);
  return {(log_p.exp() * (log_p - log_q)).sum(-1), other.argmax(-1).eq(logits.argmax(-1)), logits};
}

}  // namespace

TEST_CASE("sparse divergence: five tokens by hand") {
  const at::Tensor q = at::tensor({0.3, 0.3, 0.1, 0.1, 0.2}).to(at::kFloat).unsqueeze(0);
  const auto numbers = [](std::vector<double> values) { return at::tensor(at::ArrayRef<double>(values)).to(at::kFloat).unsqueeze(0); };
  SparseTargets teacher{at::tensor({0, 1}, at::kLong).unsqueeze(0), numbers({std::log(.5), std::log(.2)}), numbers({std::log(.3)}).squeeze(0), at::tensor({2, 4, 3, 2}, at::kLong).unsqueeze(0),
                        numbers({std::log(.5), std::log(1 / 6.), std::log(1 / 3.), std::log(.5)}), 5};
  const SparseDivergence d = sparse_divergence(q.log(), teacher);
  const auto value = [](const at::Tensor& x) { return x.item<double>(); };
  CHECK_THAT(value(d.kl), Catch::Matchers::WithinAbs(0.131167, 1e-5));
  CHECK_THAT(value(d.variance), Catch::Matchers::WithinAbs(0.010810, 1e-5));
  // The codes widen the bounds; without them they are 0.08802 and 0.38227.
  CHECK(value(d.at_least) < 0.0881);
  CHECK(value(d.at_most) > 0.3822);
  CHECK(d.same_top1.item<bool>());
  teacher.draws = teacher.draws.narrow(1, 0, 0), teacher.draw_log_p = teacher.draw_log_p.narrow(1, 0, 0);
  const SparseDivergence bound = sparse_divergence(q.log(), teacher);
  CHECK_THAT(value(bound.kl), Catch::Matchers::WithinAbs(0.0880, 1e-4));
  CHECK(value(bound.variance) == 0);
  // A model of more columns than the teacher knows: they do not count.
  const SparseDivergence padded = sparse_divergence(at::constant_pad_nd(q.log(), {0, 2}, 3.0), teacher);
  CHECK_THAT(value(padded.kl), Catch::Matchers::WithinAbs(value(bound.kl), 1e-6));
  // Equal distributions: zero, and the bound says so.
  const SparseDivergence zero = sparse_divergence(numbers({.5, .2, .1, .1, .1}).log(), teacher);
  CHECK_THAT(value(zero.kl), Catch::Matchers::WithinAbs(0, 1e-6));
  CHECK(value(zero.at_least) == 0);
}

TEST_CASE("sparse divergence: over many draws the estimate keeps its stated bound, and its standard error is what is seen") {
  const at::NoGradGuard no_grad;
  const auto teacher = sharp_decoder(5), student = student_of(*teacher, 0.15);
  const std::vector<std::int64_t> window = some_window(32);
  const Exact exact = exact_divergence(*student, *teacher, window);
  const double truth = exact.kl.mean().item<double>();
  const TemporaryFolder folder;
  const TaskData data = no_text();
  const auto cache = sparse_teacher(teacher, data, 32, {.top = 4, .tail = 8}, folder.path());
  cache->prepare({});
  constexpr int seeds = 300;
  int within = 0;
  double sum = 0, squares = 0, variance = 0, code_error = 0;
  for (int seed = 0; seed < seeds; ++seed) {  // draws are a function of the row's number
    const SparseDivergence d = sparse_divergence(exact.logits, flat(cache->targets(one_row(window, seed)).sparse));
    const double kl = d.kl.mean().item<double>(), error = std::sqrt(d.variance.sum().item<double>()) / 32;
    code_error = d.code_error.mean().item<double>();
    within += std::abs(kl - truth) <= 1.96 * error + code_error;
    sum += kl, squares += kl * kl, variance += error * error;
    CHECK(at::equal(d.same_top1, exact.same));
    CHECK((d.at_least <= exact.kl + 1e-6).all().item<bool>());
    CHECK((d.at_most >= exact.kl - 1e-6).all().item<bool>());
  }
  CHECK(within >= seeds * 95 / 100);
  const double mean = sum / seeds, seen = (squares - seeds * mean * mean) / (seeds - 1);
  INFO("exact " << truth << " mean " << mean << " code error " << code_error << " seen " << std::sqrt(seen) << " stated " << std::sqrt(variance / seeds));
  CHECK(std::abs(mean - truth) <= 4 * std::sqrt(seen / seeds) + code_error);
  CHECK(std::abs(mean - truth) <= 0.02 * truth);  // rounding goes both ways: far below the worst case of the codes
  CHECK(std::sqrt(seen) > 0.002 * truth);         // the draws do say something here
  CHECK_THAT(variance / seeds / seen, Catch::Matchers::WithinAbs(1, 0.3));  // chi-square of 299 degrees: 0.08 a standard error, and the estimates' own spread
}

TEST_CASE("sparse divergence: with every token known only the codes are left, and they keep their bound in every position") {
  const at::NoGradGuard no_grad;
  const auto teacher = sharp_decoder(5), student = student_of(*teacher, 0.15);
  const std::vector<std::int64_t> window = some_window(32);
  const Exact exact = exact_divergence(*student, *teacher, window);
  const TemporaryFolder folder;
  const TaskData data = no_text();
  for (const std::int64_t top : {50, 49, 1}) {
    INFO("top " << top);
    const auto cache = sparse_teacher(teacher, data, 32, {.top = top, .tail = top == 1 ? 8 : 0}, folder.path());
    cache->prepare({});
    const SparseDivergence d = sparse_divergence(exact.logits, flat(cache->targets(one_row(window, 0)).sparse));
    CHECK(d.kl.isfinite().all().item<bool>());
    CHECK(at::equal(d.same_top1, exact.same));
    CHECK((d.at_least <= exact.kl + 1e-6).all().item<bool>());
    CHECK((d.at_most >= exact.kl - 1e-6).all().item<bool>());
    if (top == 1) continue;
    CHECK(((d.kl - exact.kl).abs() <= d.code_error + 1e-6).all().item<bool>());
    CHECK(d.code_error.mean().item<double>() < 0.2);
  }
}

TEST_CASE("sparse divergence: equally likely tokens share the error of the distance in front of them") {
  // Behind the likeliest come equal tokens, at a distance that is rounded up the most: their own codes are 0, and all of them lie too low.
  const at::NoGradGuard no_grad;
  constexpr std::int64_t vocabulary = 50;
  for (const std::int64_t top : {vocabulary, std::int64_t(20)}) {
    const std::int64_t draws = top == vocabulary ? 0 : 4;
    const double root = 118.52 / 255, gap = sparse_largest_gap * root * root, first = -std::log1p(49 * std::exp(-gap));
    const SparseLayout layout{1, top, draws, vocabulary};
    SparseRow row;
    for (std::int64_t i = 0; i < top; ++i) row.ids.push_back(i), row.log_p.push_back(static_cast<float>(i == 0 ? first : first - gap));
    for (std::int64_t i = 0; i < draws; ++i) row.draws.push_back(top + i), row.draw_log_p.push_back(static_cast<float>(-std::log(vocabulary - top)));
    row.log_rest = {static_cast<float>(top == vocabulary ? -std::numeric_limits<double>::infinity() : first - gap + std::log(vocabulary - top))};
    const SparseRow decoded = decode_sparse_row(encode_sparse_row(row, layout), layout, "row");
    const auto floats = [](const std::vector<float>& values) { return at::tensor(at::ArrayRef<float>(values)).unsqueeze(0); };
    const auto numbers = [](const std::vector<std::int64_t>& values) { return at::tensor(at::ArrayRef<std::int64_t>(values), at::kLong).unsqueeze(0); };
    const SparseTargets targets{numbers(decoded.ids), floats(decoded.log_p), at::tensor(at::ArrayRef<float>(decoded.log_rest)), draws > 0 ? numbers(decoded.draws) : at::Tensor(), draws > 0 ? floats(decoded.draw_log_p) : at::Tensor(), vocabulary};
    at::Tensor logits = at::full({1, vocabulary}, -70.0f);
    logits[0][0] = 0.0f;
    const at::Tensor log_p = at::full({vocabulary}, first - gap, at::kDouble), log_q = at::log_softmax(logits[0].to(at::kDouble), 0);
    log_p[0] = first;
    const double exact = (log_p.exp() * (log_p - log_q)).sum().item<double>();
    const SparseDivergence d = sparse_divergence(logits, targets);
    INFO("top " << top << " exact " << exact << " stated " << d.kl.item<double>() << " +- " << d.code_error.item<double>() << ", at least " << d.at_least.item<double>() << ", at most " << d.at_most.item<double>());
    CHECK(std::abs(d.kl.item<double>() - exact) > 0.01);  // the codes do err here
    CHECK(std::abs(d.kl.item<double>() - exact) <= d.code_error.item<double>());  // draws among equal tokens have no spread
    CHECK(d.at_least.item<double>() <= exact);
    CHECK(d.at_most.item<double>() >= exact);
  }
}

TEST_CASE("sparse divergence: windows of text beside the live teacher") {
  const at::NoGradGuard no_grad;
  const auto teacher = sharp_decoder(5), student = student_of(*teacher, 0.15);
  std::vector<std::vector<std::int64_t>> windows;
  for (std::int64_t w = 0; w < 5; ++w) {
    windows.push_back(some_window(20));
    windows.back()[3] = w;
  }
  const TemporaryFolder folder;
  const TaskData data = no_text();
  const auto cache = sparse_teacher(teacher, data, 20, {.top = 6, .tail = 8}, folder.path());
  cache->prepare({});
  const SparseScores sparse = score_language(*student, *cache, windows, 7);
  const LanguageScores full = score_language(*student, teacher.get(), windows);
  CHECK(sparse.scores.kl.size() == 5 * 19);
  CHECK(sparse.scores.same_top1 == full.same_top1);
  for (std::size_t w = 0; w < windows.size(); ++w) CHECK_THAT(sparse.scores.window_nll[w], Catch::Matchers::WithinRel(full.window_nll[w], 1e-5));
  const auto mean = [](const std::vector<float>& values) {
    double sum = 0;
    for (const float value : values) sum += value;
    return sum / static_cast<double>(values.size());
  };
  CHECK(std::abs(mean(sparse.scores.kl) - mean(full.kl)) <= 4 * sparse.standard_error + sparse.code_error);
  CHECK(sparse.standard_error > 0);
  CHECK(sparse.at_least <= mean(full.kl));
  CHECK(sparse.at_most >= mean(full.kl));
  CHECK(sparse.sampled);
}
