// Hidden-state and relation losses, projections, and the fused linear loss.
#include <ATen/ATen.h>

#include "tests/catch_torch.h"
#include <cmath>

#include "core/json.h"
#include "distill/fused_linear.h"
#include "distill/losses.h"
#include "tests/distill/tensors.h"
#include "tests/support.h"
#include "train/precision.h"

using namespace kompakt;
using kompakt::testing::contains_all;
using kompakt::testing::error_text;
using kompakt::testing::gradient_error;
using kompakt::testing::gradient_of;
using kompakt::testing::largest_difference;
using kompakt::testing::random_tensor;
using kompakt::testing::tensor_of;

namespace {

at::Tensor mask_of(const at::Tensor& lengths, std::int64_t tokens) { return at::arange(tokens).unsqueeze(0) < lengths.unsqueeze(1); }

Json golden(const char* part) { return read_json(testing::source_folder() / "tests/goldens/distill.json").at(part); }

}  // namespace

TEST_CASE("hidden losses equal the goldens, with projection and padding") {
  const Json item = golden("hidden");
  const at::Tensor student = tensor_of(item.at("student"), {2, 4, 3}), teacher = tensor_of(item.at("teacher"), {2, 4, 5}), projection = tensor_of(item.at("projection"), {3, 5});
  const at::Tensor mask = mask_of(tensor_of(item.at("lengths"), {2}).to(at::kLong), 4);
  const auto check = [&](const char* name, const auto& loss) {
    INFO(name);
    const Json& expected = item.at(name);
    const auto [value, gradient] = gradient_of([&](const at::Tensor& s) { return loss(s, projection); }, student);
    CHECK(value == Approx(expected.at("value").get<double>()).epsilon(1e-10));
    CHECK(largest_difference(gradient, tensor_of(expected.at("gradient"), {2, 4, 3})) < 1e-10);
    CHECK(largest_difference(gradient_of([&](const at::Tensor& w) { return loss(student, w); }, projection).second, tensor_of(expected.at("projection_gradient"), {3, 5})) < 1e-10);
  };
  check("mse", [&](const at::Tensor& s, const at::Tensor& w) { return hidden_mse(s, teacher, mask, w); });
  check("cosine", [&](const at::Tensor& s, const at::Tensor& w) { return hidden_cosine(s, teacher, mask, w); });
}

TEST_CASE("hidden losses: by hand, equality, scale and edges") {
  const at::Tensor s = at::tensor({1.0, 2.0, 3.0, 4.0}, at::kDouble).reshape({1, 2, 2}), t = at::tensor({1.0, 0.0, 3.0, 5.0}, at::kDouble).reshape({1, 2, 2});
  CHECK(hidden_mse(s, t).item<double>() == Approx(5.0 / 4));
  CHECK(hidden_mse(s, t, at::tensor({1, 0}, at::kLong).to(at::kBool).reshape({1, 2})).item<double>() == Approx(2));
  CHECK(hidden_mse(s, t, {}, {}, true).item<double>() == Approx(1.25 / t.var(false).item<double>()));
  CHECK(hidden_mse(s * 10, t * 10, {}, {}, true).item<double>() == Approx(hidden_mse(s, t, {}, {}, true).item<double>()));
  CHECK(hidden_cosine(s * 7, t).item<double>() == Approx(hidden_cosine(s, t).item<double>()));
  const at::Tensor states = random_tensor({2, 3, 4}, 1);
  for (const bool cosine : {false, true}) {
    const auto loss = [&](const at::Tensor& x, const at::Tensor& mask) { return cosine ? hidden_cosine(x, states, mask) : hidden_mse(x, states, mask); };
    const auto [value, gradient] = gradient_of([&](const at::Tensor& x) { return loss(x, {}); }, states);
    CHECK(std::abs(value) < 1e-14);
    CHECK(gradient.abs().max().item<double>() < 1e-14);
    const auto [none, zero] = gradient_of([&](const at::Tensor& x) { return loss(x, at::zeros({2, 3}, at::kBool)); }, states);
    CHECK(none == 0);
    CHECK(zero.abs().max().item<double>() == 0);
  }
  const at::Tensor zeros = at::zeros({1, 2, 3}, at::kDouble);
  CHECK(hidden_cosine(zeros, zeros).item<double>() == 0);
  CHECK(hidden_cosine(zeros, zeros + 1).item<double>() == 1);
  CHECK(hidden_mse(states.to(at::kFloat), states.to(at::kBFloat16)).scalar_type() == at::kFloat);
  CHECK(contains_all(error_text([&] { hidden_mse(states, random_tensor({2, 3, 5}, 2)); }), {"different widths", "4", "5"}));
}

TEST_CASE("under bf16 autocast the losses of hidden states, relations and embeddings stay float32, value and gradient") {
  const at::Tensor student = random_tensor({3, 6, 8}, 1).to(at::kFloat), teacher = random_tensor({3, 6, 5}, 2).to(at::kFloat), projection = random_tensor({8, 5}, 3).to(at::kFloat);
  const at::Tensor queries = (random_tensor({2, 4, 6, 4}, 4) * 10).to(at::kFloat), keys = (random_tensor({2, 2, 6, 8}, 5) * 10).to(at::kFloat), vectors = random_tensor({7, 16}, 6).to(at::kFloat), others = random_tensor({7, 16}, 7).to(at::kFloat);
  const auto check = [](const char* name, const auto& loss, const at::Tensor& x) {
    INFO(name);
    const auto [value, gradient] = gradient_of(loss, x);
    // As the loop does it: the loss under autocast, its gradient behind it.
    const auto [value_under, gradient_under] = gradient_of([&](const at::Tensor& leaf) {
      const AutocastGuard autocast(c10::Device(c10::kCPU), true);
      REQUIRE(at::mm(at::ones({2, 2}), at::ones({2, 2})).scalar_type() == at::kBFloat16);
      return at::Tensor(loss(leaf));
    }, x);
    CHECK(value_under == value);
    CHECK(at::equal(gradient_under, gradient));
  };
  check("mse", [&](const at::Tensor& x) { return hidden_mse(x, teacher, {}, projection); }, student);
  check("cosine", [&](const at::Tensor& x) { return hidden_cosine(x, teacher, {}, projection); }, student);
  check("relation", [&](const at::Tensor& x) { return relation_loss(x, keys, {}, {}); }, queries);
  check("contrastive", [&](const at::Tensor& x) { return embedding_contrastive(x, others, 0.05); }, vectors);
  check("similarity", [&](const at::Tensor& x) { return embedding_similarity(x, others, 0.05); }, vectors);
}

TEST_CASE("projections: least squares recovers an exact map, the orthogonal start is orthogonal") {
  const at::Tensor s = random_tensor({50, 4}, 3), p = random_tensor({4, 6}, 4);
  CHECK(largest_difference(least_squares_projection(s, at::mm(s, p), 0), p) < 1e-6);
  CHECK(least_squares_projection(at::zeros({5, 3}), at::zeros({5, 2})).abs().max().item<double>() == 0);
  for (const auto& [rows, columns] : {std::pair<std::int64_t, std::int64_t>{4, 7}, {7, 4}, {5, 5}, {1, 3}}) {
    const at::Tensor q = orthogonal_projection(rows, columns, 11, "projection").to(at::kDouble);
    const at::Tensor gram = rows <= columns ? at::mm(q, q.t()) : at::mm(q.t(), q);
    CHECK(largest_difference(gram, at::eye(std::min(rows, columns), at::kDouble)) < 1e-6);
    CHECK(at::equal(q, orthogonal_projection(rows, columns, 11, "projection").to(at::kDouble)));
    CHECK(!at::equal(q, orthogonal_projection(rows, columns, 12, "projection").to(at::kDouble)));
  }
}

TEST_CASE("relation loss equals the golden: other head counts and widths, padding and documents masked") {
  const Json item = golden("relation");
  const at::Tensor student = tensor_of(item.at("student"), {2, 4, 5, 3}), teacher = tensor_of(item.at("teacher"), {2, 2, 5, 8});
  const at::Tensor lengths = tensor_of(item.at("lengths"), {2}).to(at::kLong), documents = tensor_of(item.at("documents"), {2, 5}).to(at::kLong);
  for (const bool normalize : {false, true}) {
    RelationOptions options;
    options.relation_heads = 2;
    options.normalize = normalize;
    const Json& expected = item.at(normalize ? "normalized" : "scaled");
    const auto [value, gradient] = gradient_of([&](const at::Tensor& s) { return relation_loss(s, teacher, lengths, documents, options); }, student);
    CHECK(value == Approx(expected.at("value").get<double>()).epsilon(1e-10));
    CHECK(largest_difference(gradient, tensor_of(expected.at("gradient"), {2, 4, 5, 3})) < 1e-10);
  }
}

TEST_CASE("relation loss: equality, rotation, padding and refusals") {
  const at::Tensor x = random_tensor({2, 4, 5, 6}, 5), teacher = random_tensor({2, 4, 5, 6}, 6);
  const at::Tensor lengths = at::tensor({5, 2}, at::kLong);
  CHECK(std::abs(relation_loss(x, x.clone(), lengths, {}).item<double>()) < 1e-14);
  // One relation head sees the joined vector: rotating it changes no product.
  RelationOptions joined;
  joined.relation_heads = 1;
  const at::Tensor rotation = orthogonal_projection(24, 24, 1, "rotation").to(at::kDouble);
  const at::Tensor rotated = at::matmul(x.transpose(1, 2).reshape({2, 5, 24}), rotation).reshape({2, 5, 4, 6}).transpose(1, 2);
  CHECK(relation_loss(rotated, teacher, lengths, {}, joined).item<double>() == Approx(relation_loss(x, teacher, lengths, {}, joined).item<double>()).epsilon(1e-5));
  // What stands in the padding does not matter.
  at::Tensor junk = x.clone();
  junk[1].narrow(1, 2, 3).fill_(50);
  CHECK(relation_loss(junk, teacher, lengths, {}).item<double>() == Approx(relation_loss(x, teacher, lengths, {}).item<double>()).epsilon(1e-12));
  CHECK(gradient_error([&](const at::Tensor& s) { return relation_loss(s, teacher, lengths, {}); }, x) < 1e-6);
  RelationOptions bad;
  bad.relation_heads = 5;
  CHECK(contains_all(error_text([&] { relation_loss(x, teacher, lengths, {}, bad); }), {"24", "5 relation heads", "4 or 6"}));
}

TEST_CASE("fused linear loss equals the plain one for every loss, chunk and mask") {
  const std::int64_t n = 7, d = 4, v = 9, dt = 3;
  const at::Tensor hidden = random_tensor({n, d}, 20), weight = random_tensor({v, d}, 21), bias = random_tensor({v}, 22);
  FusedTeacher live{{}, random_tensor({n, dt}, 23), random_tensor({v, dt}, 24), random_tensor({v}, 25)};
  FusedTeacher given{at::linear(live.hidden, live.weight, live.bias), {}, {}, {}};
  for (const LogitLoss& row : logit_losses()) {
    for (const std::int64_t chunk : {1, 3, 7, 100, 0}) {
      for (const int masked : {0, 1, 2}) {
        LogitLossOptions options;
        options.temperature = 2;
        if (masked == 1) options.mask = at::tensor({1, 0, 1, 1, 1, 0, 1}, at::kLong).to(at::kBool);
        if (masked == 2) options.mask = at::zeros({n}, at::kBool);
        INFO(row.name << " chunk " << chunk << " mask " << masked);
        const auto all = [&](const auto& function) {
          std::vector<at::Tensor> leaves;
          for (const at::Tensor& x : {hidden, weight, bias}) leaves.push_back(x.clone().requires_grad_());
          const at::Tensor value = function(leaves);
          auto gradients = torch::autograd::grad({value * 1.5}, leaves);
          gradients.push_back(value.detach());
          return gradients;
        };
        const auto plain = all([&](const std::vector<at::Tensor>& x) { return logit_loss(row, at::linear(x[0], x[1], x[2]), given.logits, options); });
        const auto fused = all([&](const std::vector<at::Tensor>& x) { return fused_linear_loss(row, x[0], x[1], x[2], chunk == 3 ? given : live, options, chunk); });
        for (std::size_t i = 0; i < plain.size(); ++i) CHECK(largest_difference(plain[i], fused[i]) < 1e-12);
      }
    }
  }
}

TEST_CASE("fused linear loss: frozen parts, no gradient wanted, float32 and bfloat16") {
  const at::Tensor hidden = random_tensor({6, 4}, 30).to(at::kFloat), weight = random_tensor({8, 4}, 31).to(at::kFloat);
  const FusedTeacher teacher{random_tensor({6, 8}, 32).to(at::kFloat), {}, {}, {}};
  const LogitLoss& row = *find_logit_loss("forward_kl");
  const double plain = logit_loss(row, at::linear(hidden, weight), teacher.logits).item<double>();
  CHECK(!fused_linear_loss(row, hidden, weight, {}, teacher).requires_grad());
  CHECK(fused_linear_loss(row, hidden, weight, {}, teacher, {}, 4).item<double>() == Approx(plain).epsilon(1e-6));
  const at::Tensor leaf = hidden.clone().requires_grad_();
  const at::Tensor value = fused_linear_loss(row, leaf, weight, {}, teacher, {}, 4);
  CHECK(torch::autograd::grad({value}, {leaf})[0].sizes() == hidden.sizes());
  const at::Tensor half = fused_linear_loss(row, hidden.to(at::kBFloat16), weight.to(at::kBFloat16), {}, teacher, {}, 4);
  CHECK(half.scalar_type() == at::kFloat);
  CHECK(half.item<double>() == Approx(plain).epsilon(0.03));
  CHECK_THROWS_AS(fused_linear_loss(row, hidden, weight.narrow(1, 0, 3), {}, teacher), std::logic_error);
}

TEST_CASE("embedding losses equal the goldens, are zero at equality and take single texts") {
  const Json item = golden("embedding");
  const std::int64_t b = item.at("b"), ds = item.at("ds"), dt = item.at("dt");
  const double temperature = item.at("temperature");
  const at::Tensor student = tensor_of(item.at("student"), {b, ds}), teacher = tensor_of(item.at("teacher"), {b, dt}), projection = tensor_of(item.at("projection"), {ds, dt});
  const auto check = [&](const char* name, const auto& loss) {
    INFO(name);
    const auto [value, gradient] = gradient_of(loss, student);
    CHECK(value == Approx(item.at(name).at("value").get<double>()).epsilon(1e-10));
    CHECK(largest_difference(gradient, tensor_of(item.at(name).at("gradient"), {b, ds})) < 1e-10);
    CHECK(gradient_error(loss, student) < 1e-6);
  };
  check("contrastive", [&](const at::Tensor& s) { return embedding_contrastive(s, teacher, temperature, projection); });
  check("similarity", [&](const at::Tensor& s) { return embedding_similarity(s, teacher, temperature); });
  CHECK(largest_difference(gradient_of([&](const at::Tensor& w) { return embedding_contrastive(student, teacher, temperature, w); }, projection).second,
                           tensor_of(item.at("contrastive").at("projection_gradient"), {ds, dt})) < 1e-10);
  // Only directions count; one text has nobody to be compared with; a zero vector stays finite.
  CHECK(embedding_contrastive(teacher * 3, teacher, temperature).item<double>() == Approx(0).margin(1e-12));
  CHECK(embedding_similarity(teacher * 3, teacher, temperature).item<double>() == Approx(0).margin(1e-12));
  CHECK(embedding_contrastive(teacher.narrow(0, 0, 1), teacher.narrow(0, 1, 1), temperature).item<double>() == Approx(0).margin(1e-12));
  CHECK(embedding_similarity(student.narrow(0, 0, 1), teacher.narrow(0, 0, 1), temperature).item<double>() == 0);
  CHECK(gradient_of([&](const at::Tensor& s) { return embedding_similarity(s, teacher, temperature); }, at::zeros({b, ds}, at::kDouble)).second.isfinite().all().item<bool>());
  CHECK(contains_all(error_text([&] { embedding_contrastive(student, teacher, temperature); }), {"different widths", "3", "5", "similarity"}));
}
