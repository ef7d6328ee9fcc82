// Several kompakt processes as one job: the losses of one process, the same bytes twice, a rank that is killed, resumption on other
// numbers of ranks, and jobs that cannot start.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/catch_torch.h"
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "core/files.h"
#include "core/json.h"
#include "core/random.h"
#include "core/text.h"
#include "distributed/collective.h"
#include "model/checkpoint.h"
#include "tests/distill/tokenizers.h"
#include "tests/pipeline/tiny.h"
#include "tests/support.h"
#include "tests/tiny_models.h"
#include "tests/train/ranks.h"

using namespace kompakt;
using namespace kompakt::testing;
namespace fs = std::filesystem;

namespace {

struct Ended {
  int code = -1;  // -1: killed
  std::string errors;
};

// Starts rank `rank` of `world` of `kompakt run`; a world of 1 is a plain process.
pid_t start_rank(const TinySetting& tiny, const std::string& name, int rank, int world, int port, const std::vector<std::string>& more) {
  const char* binary = std::getenv("KOMPAKT_BINARY");
  REQUIRE(binary != nullptr);
  const std::string recipe = tiny.recipe().string(), out = tiny.out(name).string(), store = "store=" + (tiny.folder() / ("stages-" + name)).string();
  const std::string errors = (tiny.folder() / str(name, "-", rank, ".err")).string();
  std::vector<std::string> words = {binary, "run", recipe, "--out", out, "--set", store, "--resume", "--quiet"};
  words.insert(words.end(), more.begin(), more.end());
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  std::fflush(nullptr);  // what stands in the buffers is this process's to print, not the child's
  const pid_t child = ::fork();
  if (child == 0) {
    if (world > 1) {
      ::setenv("RANK", str(rank).c_str(), 1);
      ::setenv("LOCAL_RANK", str(rank).c_str(), 1);
      ::setenv("WORLD_SIZE", str(world).c_str(), 1);
      ::setenv("LOCAL_WORLD_SIZE", str(world).c_str(), 1);
      ::setenv("MASTER_ADDR", "127.0.0.1", 1);
      ::setenv("MASTER_PORT", str(port).c_str(), 1);
    }
    if (!std::freopen(errors.c_str(), "w", stderr) || !std::freopen("/dev/null", "w", stdout)) ::_exit(126);
    ::execv(binary, arguments.data());
    ::_exit(127);
  }
  REQUIRE(child > 0);
  return child;
}

Ended end_rank(const TinySetting& tiny, const std::string& name, int rank, pid_t child) {
  int status = 0;
  ::waitpid(child, &status, 0);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_text(tiny.folder() / str(name, "-", rank, ".err"))};
}

// All ranks to their end; `kill_rank` >= 0 gets SIGKILL as soon as the first training has saved a state, or after `milliseconds`.
std::vector<Ended> job(const TinySetting& tiny, const std::string& name, int world, int kill_rank = -1, const std::vector<std::string>& more = {}, int milliseconds = -1) {
  const int port = free_port();
  std::vector<pid_t> children;
  // A kill by the clock may come before rank 0 holds the rendezvous; the others would seek it for five minutes.
  if (milliseconds >= 0) ::setenv("KOMPAKT_RENDEZVOUS_SECONDS", "15", 1);
  for (int rank = 0; rank < world; ++rank) children.push_back(start_rank(tiny, name, rank, world, port, more));
  ::unsetenv("KOMPAKT_RENDEZVOUS_SECONDS");
  if (kill_rank >= 0 && milliseconds >= 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
    ::kill(children[static_cast<std::size_t>(kill_rank)], SIGKILL);
  } else if (kill_rank >= 0) {
    const auto saved = [&] {
      std::error_code none;
      for (const auto& entry : fs::recursive_directory_iterator(tiny.out(name), none))
        if (entry.path().filename() == "state.safetensors") return true;
      return false;
    };
    for (int tries = 0; tries < 6000 && !saved(); ++tries) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    REQUIRE(saved());
    ::kill(children[static_cast<std::size_t>(kill_rank)], SIGKILL);
  }
  std::vector<Ended> out;
  for (int rank = 0; rank < world; ++rank) out.push_back(end_rank(tiny, name, rank, children[static_cast<std::size_t>(rank)]));
  return out;
}

bool all_well(const std::vector<Ended>& ranks) {
  for (const Ended& rank : ranks) {
    if (rank.code != 0) UNSCOPED_INFO(rank.errors);
    if (rank.code != 0) return false;
  }
  return true;
}

// finetune with held-out scores and the best epoch kept, distill under it, a prune whose recovery trains too. In float32 on every machine:
// with bfloat16 products, other shapes of the same batch round differently.
void write_ranks_recipe(TinySetting& tiny, int epochs = 2) {
  tiny.write_recipe(str("\n  - finetune: {epochs: ", epochs, ", batch_size: 4, accumulate: 4, learning_rate: 1.0e-3, precision: float32, save_every_steps: 3, keep: best, ema: 0.5}\n"
                        "  - distill: {student: {keep_layers: [0, 2]}, epochs: 2, batch_size: 4, accumulate: 4, learning_rate: 1.0e-3, precision: float32, optimizer: adamw_8bit, save_every_steps: 3}\n"
                        "  - prune: {structured: {ffn: 0.5}, criterion: taylor, samples: 24, recover: {epochs: 1, batch_size: 4, accumulate: 4, precision: float32, save_every_steps: 3}}\n"
                        "  - export: {}\n  - evaluate: {latency: false}\n"));
}

std::vector<double> losses(const TinySetting& tiny, const std::string& name) {
  std::vector<double> out;
  const Json manifest = read_json(tiny.out(name) / "manifest.json");
  for (const Json& stage : manifest.at("stages")) {
    const Json& details = stage.at("details");
    for (const Json* owner : {&details, details.contains("recover") ? &details.at("recover") : nullptr})
      if (owner && owner->is_object() && owner->contains("loss_curve"))
        for (const Json& point : owner->at("loss_curve")) out.push_back(point.at("loss").get<double>());
  }
  return out;
}

// Text, a decoder of three layers, and its student of two; `more` options of the stage distill.
void write_ranks_text(const TinySetting& tiny, const std::string& more) {
  const auto tokenizer = word_tokenizer();
  const Json shape = {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"hidden_size", 16}, {"num_hidden_layers", 3}, {"num_attention_heads", 2}, {"num_key_value_heads", 1},
                      {"intermediate_size", 24}, {"vocab_size", tokenizer->vocab_size()}, {"max_position_embeddings", 64}, {"rms_norm_eps", 1e-5}, {"hidden_act", "silu"}, {"tie_word_embeddings", true}};
  Transformer teacher(config_from_json(shape, "tiny"), 1);
  stir(teacher, 1);
  make_folder(tiny.folder() / "decoder");
  save_model(teacher, tiny.folder() / "decoder");
  tokenizer->save(tiny.folder() / "decoder");
  std::string text;
  for (int i = 0; i < 80; ++i) text += "the cat sat on the mat and saw the other cat " + str(i) + "\n";
  write_text(tiny.folder() / "text.txt", text);
  write_text(tiny.recipe(), "name: text\nseed: 5\nteacher: {path: decoder}\ndata:\n  train: {files: [text.txt], format: text, split: line}\n  test: {files: [text.txt], format: text, max_length: 16, tokens: 64}\n"
                            "stages:\n  - distill: {student: {keep_layers: [0, 2]}, " + more + ", batch_size: 2, accumulate: 4, sequence_length: 16, learning_rate: 1.0e-3, precision: float32, save_every_steps: 3}\n"
                            "  - evaluate: {latency: false}\n");
}

// One, two and four processes with the same losses.
void check_same_losses(const TinySetting& tiny, std::size_t least) {
  for (const auto& [name, world] : {std::pair{"one", 1}, {"two", 2}, {"four", 4}}) REQUIRE(all_well(job(tiny, name, world)));
  const std::vector<double> one = losses(tiny, "one");
  REQUIRE(one.size() > least);
  for (const char* name : {"two", "four"}) {
    const std::vector<double> other = losses(tiny, name);
    REQUIRE(other.size() == one.size());
    for (std::size_t i = 0; i < one.size(); ++i) CHECK(other[i] == Approx(one[i]).margin(1e-5).epsilon(0));
  }
}

}  // namespace

TEST_CASE("one, two and four processes have the same losses; two have the same bytes twice", "[ranks]") {
  if (!collectives_available()) return skip("built without Gloo");
  TinySetting tiny;
  write_ranks_recipe(tiny);
  REQUIRE(all_well(job(tiny, "one", 1)));
  REQUIRE(all_well(job(tiny, "two", 2)));
  REQUIRE(all_well(job(tiny, "again", 2)));
  REQUIRE(all_well(job(tiny, "four", 4)));
  const std::vector<double> one = losses(tiny, "one");
  REQUIRE(one.size() > 15);
  for (const char* name : {"two", "four"}) {
    const std::vector<double> other = losses(tiny, name);
    REQUIRE(other.size() == one.size());
    for (std::size_t i = 0; i < one.size(); ++i) CHECK(other[i] == Approx(one[i]).margin(1e-5).epsilon(0));
  }
  CHECK(folder_bytes(tiny.out("two") / "artifact") == folder_bytes(tiny.out("again") / "artifact"));
  CHECK(read_json(tiny.out("two") / "manifest.json").at("stages")[0].at("details").at("ranks") == 2);
  CHECK(!fs::exists(tiny.out("two") / "work"));
}

TEST_CASE("text under a cache that all ranks fill: the losses of one process, and of a job that was killed", "[ranks]") {
  if (!collectives_available()) return skip("built without Gloo");
  TinySetting tiny;
  write_ranks_text(tiny, "cache: {top: 8, tail: 4}, epochs: 3");
  check_same_losses(tiny, 8);
  // Every rank wrote its own rows, in files of its own.
  std::size_t parts = 0;
  for (const auto& entry : fs::recursive_directory_iterator(tiny.folder() / "stages-four")) parts += starts_with(entry.path().filename().string(), "part-");
  CHECK(parts >= 4);
  job(tiny, "killed", 2, 1);
  REQUIRE(all_well(job(tiny, "killed", 2)));
  CHECK(folder_bytes(tiny.out("killed") / "01-distill") == folder_bytes(tiny.out("two") / "01-distill"));
}

TEST_CASE("texts that the student writes, or the teacher: every process writes its share, and the losses are those of one", "[ranks]") {
  if (!collectives_available()) return skip("built without Gloo");
  for (const char* texts : {"on_policy: {lambda: 0.7, max_new_tokens: 5, prompt_tokens: 4}, steps: 6", "teacher_text: {max_new_tokens: 5, prompt_tokens: 4, temperature: 1}, steps: 4"}) {
    INFO(texts);
    TinySetting tiny;
    write_ranks_text(tiny, texts);
    check_same_losses(tiny, 3);
  }
}

TEST_CASE("a killed rank is named, and the job goes on from its saved state on two ranks or on one", "[ranks]") {
  if (!collectives_available()) return skip("built without Gloo");
  TinySetting tiny;
  write_ranks_recipe(tiny, 20);
  const std::vector<Ended> broken = job(tiny, "broken", 2, 1);
  CHECK(broken[1].code == -1);
  CHECK(broken[0].code == 4);
  INFO(broken[0].errors);
  CHECK(contains_all(broken[0].errors, {"rank 0: rank 1 is gone", "--resume"}));
  // Twice more, both times at a moment and on a rank of chance.
  const CounterRandom chance(static_cast<std::uint64_t>(::getpid()), "kill");
  for (std::uint64_t round = 0; round < 2; ++round) {
    const auto milliseconds = 700 + chance.below(2 * round, 1200), rank = chance.below(2 * round + 1, 2);
    INFO("killed rank " << rank << " after " << milliseconds << " ms");
    job(tiny, "broken", 2, static_cast<int>(rank), {}, static_cast<int>(milliseconds));
  }
  fs::create_directories(tiny.out("alone"));
  fs::copy(tiny.out("broken"), tiny.out("alone"), fs::copy_options::recursive | fs::copy_options::overwrite_existing);
  REQUIRE(all_well(job(tiny, "broken", 2)));
  REQUIRE(all_well(job(tiny, "alone", 1)));  // what two ranks have saved, one goes on with
  REQUIRE(all_well(job(tiny, "whole", 2)));
  CHECK(folder_bytes(tiny.out("whole") / "artifact") == folder_bytes(tiny.out("broken") / "artifact"));
  CHECK(losses(tiny, "alone").size() == losses(tiny, "whole").size());
}

TEST_CASE("when rank 0 is killed the others name it", "[ranks]") {
  if (!collectives_available()) return skip("built without Gloo");
  TinySetting tiny;
  write_ranks_recipe(tiny, 20);
  const std::vector<Ended> ended = job(tiny, "a", 2, 0);
  CHECK(ended[0].code == -1);
  CHECK(ended[1].code == 4);
  INFO(ended[1].errors);
  CHECK(contains_all(ended[1].errors, {"rank 1: rank 0", "gone"}));
}

TEST_CASE("jobs that cannot work end before any compute", "[ranks]") {
  if (!collectives_available()) return skip("built without Gloo");
  TinySetting tiny;  // its recipe accumulates nothing
  for (const Ended& ended : job(tiny, "small", 2)) {
    CHECK(ended.code == 2);
    INFO(ended.errors);
    CHECK(contains_all(ended.errors, {"cannot be dealt out evenly to 2 ranks", "accumulate: 1", "batch_size: 4, accumulate: 2"}));
  }
  write_ranks_recipe(tiny);
  ::setenv("KOMPAKT_RENDEZVOUS_SECONDS", "1", 1);
  const pid_t lonely = start_rank(tiny, "lonely", 0, 2, free_port(), {});
  const Ended ended = end_rank(tiny, "lonely", 0, lonely);
  ::unsetenv("KOMPAKT_RENDEZVOUS_SECONDS");
  CHECK(ended.code == 2);
  INFO(ended.errors);
  CHECK(contains_all(ended.errors, {"rank 0: ", "rank 1 of 2 did not come"}));
  // Nobody answers at the address.
  ::setenv("KOMPAKT_RENDEZVOUS_SECONDS", "1", 1);
  const pid_t lost = start_rank(tiny, "lost", 1, 2, free_port(), {});
  const Ended unanswered = end_rank(tiny, "lost", 1, lost);
  ::unsetenv("KOMPAKT_RENDEZVOUS_SECONDS");
  CHECK(unanswered.code == 2);
  INFO(unanswered.errors);
  CHECK(contains_all(unanswered.errors, {"rank 1: ", "no answer from 127.0.0.1:", "MASTER_ADDR"}));
  CHECK(!fs::exists(tiny.out("lost") / "01-finetune"));
  // Other data on one rank.
  const int port = free_port();
  const pid_t first = start_rank(tiny, "other", 0, 2, port, {}), second = start_rank(tiny, "other", 1, 2, port, {"--set", "seed=6"});
  const Ended leader = end_rank(tiny, "other", 0, first), follower = end_rank(tiny, "other", 1, second);
  CHECK(leader.code != 0);
  CHECK(follower.code != 0);
  INFO(leader.errors);
  CHECK(contains_all(leader.errors, {"rank 1 has another recipe"}));
}
