// Perplexity and divergence over windows of text: against log-probabilities of whole heads, and heads that differ in their padding rows.
#include "evaluate/language.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>

#include "evaluate/inputs.h"
#include "tests/catch_torch.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

const std::vector<std::vector<std::int64_t>> language_windows = {{3, 9, 41, 17, 5, 30, 8, 22}, {11, 4, 4, 36, 28, 13, 47, 6}};

// The same model with `rows` more rows of embedding and head, filled with `size`.
std::unique_ptr<Transformer> with_padding(std::uint64_t seed, std::int64_t rows, double size) {
  const at::NoGradGuard no_grad;
  auto model = tiny_decoder(seed);
  const auto more = [&](const at::Tensor& weight) { return at::cat({weight, at::full({rows, weight.size(1)}, size)}); };
  auto config = model->config();
  config.vocab += rows;
  auto padded = std::make_unique<Transformer>(config, seed);
  for (const auto& [name, value] : padded->parameters())
    for (const auto& [other, source] : model->parameters())
      if (name == other) value->copy_(value->size(0) == source->size(0) ? *source : more(*source));
  return padded;
}

at::Tensor logits_of(const Transformer& model, std::size_t window) {
  const at::NoGradGuard no_grad;
  return model.head(model.hidden(window_input(language_windows, window, 1, c10::Device(c10::kCPU))).squeeze(0)).narrow(0, 0, 7).to(at::kDouble);
}

}  // namespace

TEST_CASE("divergence of a text is that of whole heads, whatever the chunk") {
  const auto teacher = tiny_decoder(3), student = tiny_decoder(4);
  for (const std::int64_t chunk : {1, 3, 128}) {
    const LanguageScores scores = score_language(*student, teacher.get(), language_windows, chunk);
    REQUIRE(scores.kl.size() == 14);
    CHECK(scores.scored_per_window == 7);
    for (std::size_t w = 0; w < 2; ++w) {
      const at::Tensor p = at::log_softmax(logits_of(*teacher, w), 1), q = at::log_softmax(logits_of(*student, w), 1), kl = (p.exp() * (p - q)).sum(1);
      double nll = 0;
      for (std::int64_t i = 0; i < 7; ++i) {
        CHECK(scores.kl[w * 7 + static_cast<std::size_t>(i)] == Approx(kl[i].item<double>()).epsilon(1e-4));
        CHECK(scores.same_top1[w * 7 + static_cast<std::size_t>(i)] == (p[i].argmax().item<std::int64_t>() == q[i].argmax().item<std::int64_t>() ? 1 : 0));
        nll -= q[i][language_windows[w][static_cast<std::size_t>(i) + 1]].item<double>();
      }
      CHECK(scores.window_nll[w] == Approx(nll).epsilon(1e-5));
    }
  }
  const LanguageScores same = score_language(*teacher, teacher.get(), language_windows);
  for (const float kl : same.kl) CHECK(kl == Approx(0).margin(1e-6));
  CHECK(score_language(*student, nullptr, language_windows).kl.empty());
}

TEST_CASE("heads that differ in their padding rows are compared by the rows of both, and the student's padding counts against it") {
  const auto teacher = tiny_decoder(3), student = tiny_decoder(4);
  const auto padded_teacher = with_padding(3, 6, 0.05), padded_student = with_padding(4, 9, 0.05);
  const LanguageScores plain = score_language(*student, teacher.get(), language_windows);
  // What the teacher has in its padding is nobody's: the others share its probability as before.
  const LanguageScores wide_teacher = score_language(*student, padded_teacher.get(), language_windows);
  REQUIRE(wide_teacher.kl.size() == plain.kl.size());
  for (std::size_t i = 0; i < plain.kl.size(); ++i) CHECK(wide_teacher.kl[i] == Approx(plain.kl[i]).epsilon(1e-4).margin(1e-6));
  CHECK(wide_teacher.teacher_window_nll[0] > plain.teacher_window_nll[0]);  // its own perplexity is of its whole head
  CHECK(wide_teacher.window_nll == plain.window_nll);
  // What the student has there is lost to it: -log of what is left.
  const LanguageScores wide_student = score_language(*padded_student, teacher.get(), language_windows);
  for (std::size_t w = 0; w < 2; ++w) {
    const at::Tensor left = at::softmax(logits_of(*padded_student, w), 1).narrow(1, 0, 50).sum(1);
    for (std::size_t i = 0; i < 7; ++i) {
      const double lost = -std::log(left[static_cast<std::int64_t>(i)].item<double>());
      CHECK(lost > 1e-3);
      CHECK(wide_student.kl[w * 7 + i] == Approx(plain.kl[w * 7 + i] + lost).epsilon(1e-4));
    }
  }
  const LanguageScores self = score_language(*teacher, padded_teacher.get(), language_windows);
  for (const float kl : self.kl) CHECK(kl == Approx(0).margin(1e-5));
}
