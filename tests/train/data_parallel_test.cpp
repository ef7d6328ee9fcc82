// Ranks as threads: sums, copies and texts between them, buckets, shares of the optimizer, and what happens when one fails.
#include <ATen/ATen.h>

#include "tests/catch_torch.h"
#include <atomic>
#include <cstdlib>
#include <mutex>

#include "core/error.h"
#include "core/system.h"
#include "tests/support.h"
#include "tests/train/fixtures.h"
#include "tests/train/ranks.h"
#include "train/data_parallel.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

// Catch's assertions are for one thread: what ranks find is collected and checked at the end.
class Findings {
 public:
  void expect(bool condition, const std::string& what) {
    if (condition) return;
    const std::lock_guard lock(mutex_);
    wrong_.push_back(what);
  }
  std::string all() const { return join(wrong_, "; "); }

 private:
  std::mutex mutex_;
  std::vector<std::string> wrong_;
};

std::vector<TrainableParameter> parallel_parameters(bool same) {
  std::vector<TrainableParameter> out;
  std::int64_t n = 0;
  for (const std::int64_t size : {300, 7, 40, 5000, 1}) {
    at::Tensor value = at::arange(size, at::kFloat) * 1e-3 + (same ? 0.0 : 1.0);
    value.requires_grad_(true);
    out.push_back({str("p", n++), value, 1e-2, 0.1});
  }
  return out;
}

// Loss of micro batch i; the last parameter takes part in none, the fourth in the second alone.
at::Tensor parallel_loss(const std::vector<TrainableParameter>& p, int micro) {
  at::Tensor out = (p[0].value.sum() * (micro + 1) + p[1].value.square().sum()) * 0.1 + p[2].value.sum() * p[1].value[micro];
  if (micro == 1) out = out + p[3].value.square().sum() * 0.01;
  return out;
}

}  // namespace

TEST_CASE("ranks: sums, copies and texts") {
  if (!collectives_available()) return skip("built without Gloo");
  Findings findings;
  on_ranks(3, [&](Collective& ranks) {
    const auto expect = [&](bool condition, const char* what) { findings.expect(condition, str("rank ", ranks.rank(), ": ", what)); };
    expect(ranks.world() == 3 && ranks.leader() == (ranks.rank() == 0), "who");
    const at::Tensor sum = at::arange(5, at::kFloat) * (ranks.rank() + 1);
    ranks.all_reduce(sum)->wait();
    expect(at::equal(sum, at::arange(5, at::kFloat) * 6), "sum");
    at::Tensor copy = at::full({4}, ranks.rank(), at::kByte);
    ranks.broadcast(copy, 2);
    expect(at::equal(copy, at::full({4}, 2, at::kByte)), "copy");
    ranks.broadcast(at::empty({0}), 1);
    const std::vector<std::string> texts = ranks.gather(std::string(static_cast<std::size_t>(ranks.rank()) * 1000, 'x') + str(ranks.rank()));
    expect(texts.size() == 3 && texts[0] == "0" && texts[1].size() == 1001 && texts[2].back() == '2', "texts");
    expect(ranks.from_leader(ranks.leader() ? "yes" : "no") == "yes", "leader's text");
    expect(ranks.from_leader("").empty(), "empty text");
    ranks.check_equal("same", "thing", "");
    const std::string text = error_text([&] { ranks.check_equal(ranks.rank() == 1 ? "b" : "a", "recipe", "copy it"); });
    expect(text.find("rank 1 has another recipe than rank 0") != std::string::npos && text.find("copy it") != std::string::npos, "difference");
  });
  INFO(findings.all());
  CHECK(findings.all().empty());
}

TEST_CASE("ranks: one that fails tells the others why") {
  if (!collectives_available()) return skip("built without Gloo");
  std::string seen;
  CHECK_THROWS_AS(on_ranks(2, [&](Collective& ranks) {
    if (ranks.rank() == 1) throw Error("the disk is full").at("somewhere");
    try {
      ranks.from_leader("");
      ranks.gather("waits for rank 1");
    } catch (const Error& error) {
      seen = error.what();
      CHECK(error.code() == ExitCode::resource);
      throw;
    }
  }), Error);
  CHECK(contains_all(seen, {"rank 1 has ended", "somewhere: the disk is full", "--resume"}));
}

TEST_CASE("ranks: a rendezvous that nobody keeps, a rank that is missing, one that is there twice, another world") {
  if (!collectives_available()) return skip("built without Gloo");
  ::setenv("KOMPAKT_RENDEZVOUS_SECONDS", "1", 1);
  const int port = free_port();
  const auto join_as = [&](const Launch& launch) { return Collective::join(launch, c10::Device(c10::kCPU)); };
  CHECK(contains_all(error_text([&] { join_as(test_launch(1, 2, port)); }), {"no answer", "MASTER_ADDR", "127.0.0.1"}));
  CHECK(contains_all(error_text([&] { join_as(test_launch(0, 3, port)); }), {"ranks 1, 2 of 3 did not come", "WORLD_SIZE"}));
  ::setenv("KOMPAKT_RENDEZVOUS_SECONDS", "soon", 1);
  CHECK(contains_all(error_text([&] { join_as(test_launch(0, 2, port)); }), {"KOMPAKT_RENDEZVOUS_SECONDS", "soon"}));
  ::setenv("KOMPAKT_RENDEZVOUS_SECONDS", "3", 1);
  std::string first, second;
  std::thread other([&] { second = error_text([&] { join_as(test_launch(0, 2, port)); }); });
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  first = error_text([&] { join_as(test_launch(0, 2, port)); });
  other.join();
  CHECK(contains_all(first, {"port", "taken", "MASTER_PORT"}));
  ::unsetenv("KOMPAKT_RENDEZVOUS_SECONDS");
}

TEST_CASE("gradients are summed, shares cover everything once, parameters come from their owners") {
  if (!collectives_available()) return skip("built without Gloo");
  // Alone: both micro batches, all parameters.
  const auto alone = parallel_parameters(true);
  AdamW whole(alone, {0.9, 0.98, 1e-6});
  Findings findings;
  std::vector<std::vector<at::Tensor>> after(2);
  std::vector<NamedTensors> states(2);
  std::vector<std::vector<bool>> mine(2);
  on_ranks(2, [&](Collective& ranks) {
    const auto r = static_cast<std::size_t>(ranks.rank());
    const auto parameters = parallel_parameters(ranks.leader());  // rank 1 starts from other values: they are overwritten
    DataParallel parallel(&ranks, parameters);
    findings.expect(parallel.takes(r) && !parallel.takes(1 - r) && parallel.takes(r + 2), "deal");
    mine[r] = parallel.mine();
    AdamW optimizer(parameters, {0.9, 0.98, 1e-6}, parallel.mine());
    for (int step = 0; step < 3; ++step) {  // from the second on buckets leave during the backward pass
      optimizer.zero_grad();
      parallel.before_last_backward();
      parallel_loss(parameters, ranks.rank()).backward();
      const StepShare all = parallel.finish_step({1.0 + ranks.rank(), {{ranks.leader() ? "a" : "b", 0.5}}, ranks.rank() == 1 && step == 2});
      findings.expect(all.loss == 3 && all.parts.size() == 2 && all.parts[1].first == "b" && all.interrupted == (step == 2), "numbers");
      findings.expect(!parameters[4].value.grad().defined() && parameters[3].value.grad().defined(), "which have gradients");
      optimizer.step(1);
      parallel.share_parameters();
    }
    // A rank without a micro batch takes part with nothing.
    optimizer.zero_grad();
    if (ranks.leader()) {
      parallel.before_last_backward();
      parallel_loss(parameters, 0).backward();
    }
    const StepShare all = parallel.finish_step(ranks.leader() ? StepShare{std::nan(""), {}, false} : StepShare{});
    findings.expect(std::isnan(all.loss) && parameters[0].value.grad().defined() && !parameters[3].value.grad().defined(), "a rank without work");
    optimizer.step(1);
    parallel.share_parameters();
    for (const TrainableParameter& parameter : parameters) after[r].push_back(parameter.value.detach().clone());
    states[r] = parallel.whole_state(optimizer);
    // And back into optimizers that know nothing.
    AdamW fresh(parameters, {0.9, 0.98, 1e-6}, parallel.mine());
    parallel.give_state(states[0], fresh);
    const NamedTensors again = parallel.whole_state(fresh);
    for (std::size_t i = 0; i < again.size(); ++i) findings.expect(at::equal(again[i].second, states[0][i].second), again[i].first);
  });
  INFO(findings.all());
  CHECK(findings.all().empty());
  for (int step = 0; step < 4; ++step) {
    whole.zero_grad();
    for (const int micro : {0, 1})
      if (micro == 0 || step < 3) parallel_loss(alone, micro).backward();
    whole.step(1);
  }
  for (std::size_t i = 0; i < alone.size(); ++i) {
    CHECK(mine[0][i] != mine[1][i]);
    CHECK(at::equal(after[0][i], after[1][i]));
    CHECK(at::allclose(after[0][i], alone[i].value.detach(), 1e-5, 1e-6));
  }
  CHECK(states[1].empty());
  const NamedTensors expected = whole.state();
  REQUIRE(states[0].size() == expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CHECK(states[0][i].first == expected[i].first);
    CHECK(at::allclose(states[0][i].second, expected[i].second, 1e-4, 1e-6));
  }
}

TEST_CASE("a gradient that grows after its bucket has left is sent again") {
  if (!collectives_available()) return skip("built without Gloo");
  Findings findings;
  on_ranks(2, [&](Collective& ranks) {
    const auto parameters = parallel_parameters(true);
    DataParallel parallel(&ranks, parameters);
    const auto step = [&](bool twice) {
      for (const TrainableParameter& parameter : parameters) parameter.value.mutable_grad() = at::Tensor();
      parallel.before_last_backward();
      for (int pass = 0; pass < (twice && ranks.rank() == 1 ? 2 : 1); ++pass) {
        at::Tensor loss = parameters[0].value.sum();
        for (std::size_t i = 1; i < parameters.size(); ++i) loss = loss + parameters[i].value.sum();
        loss.backward();
      }
      parallel.finish_step({});
      return parameters[0].value.grad()[0].item<float>();
    };
    findings.expect(step(false) == 2, "once");
    findings.expect(step(true) == 3, "grew on rank 1");
    findings.expect(step(false) == 2, "once more");
  });
  CHECK(findings.all().empty());
}

TEST_CASE("ranks: one that lives and hangs is named, one that gets on is waited for") {
  if (!collectives_available()) return skip("built without Gloo");
  ::setenv("KOMPAKT_HANG_SECONDS", "3", 1);
  std::atomic<bool> over{false};
  const std::string hung = error_text([&] {
    on_ranks(3, [&](Collective& ranks) {
      if (ranks.rank() == 2)
        for (int i = 0; i < 200 && !over; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(100));  // its heart beats, its work stands
      try {
        ranks.from_leader("");  // rank 0 goes on to the gather, rank 1 with it
        ranks.gather("");
      } catch (...) {
        over = true;
        throw;
      }
    });
  });
  INFO(hung);
  CHECK(contains_all(hung, {"rank 2 hangs", "3 s", "--resume"}));
  // Twice as long as the ranks may take to meet: that limit ends with the meeting.
  ::setenv("KOMPAKT_RENDEZVOUS_SECONDS", "3", 1);
  Findings findings;
  on_ranks(2, [&](Collective& ranks) {
    if (ranks.rank() == 1)
      for (int i = 0; i < 60; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        check_interrupted();  // as an evaluation does for every batch
      }
    findings.expect(ranks.gather("x").size() == 2, "waited");
  });
  CHECK(findings.all().empty());
  ::setenv("KOMPAKT_HANG_SECONDS", "-1", 1);
  CHECK(contains_all(error_text([&] { on_ranks(2, [](Collective&) {}); }), {"KOMPAKT_HANG_SECONDS", "0 to 86400"}));
  ::unsetenv("KOMPAKT_HANG_SECONDS");
  ::unsetenv("KOMPAKT_RENDEZVOUS_SECONDS");
}

TEST_CASE("a world size that does not fit the batch is refused with one that does") {
  CHECK_NOTHROW(check_world_fits(8, 4, 2, "x"));
  CHECK(contains_all(error_text([] { check_world_fits(32, 1, 4, "recipe.yaml:7:5"); }), {"recipe.yaml:7:5", "accumulate: 1", "a multiple of 4", "batch_size: 8, accumulate: 4"}));
  CHECK(contains_all(error_text([] { check_world_fits(6, 3, 2, "x"); }), {"batch_size: 9, accumulate: 2"}));
  CHECK(contains_all(error_text([] { check_world_fits(2, 1, 4, "x"); }), {"2 sequences is too small for 4 ranks"}));
}
