#include "distributed/rendezvous.h"

#include <c10/util/Exception.h>
#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <algorithm>
#include <cstdlib>

#include "core/activity.h"
#include "core/error.h"
#include "core/system.h"
#include "core/text.h"

namespace kompakt {
namespace {

using std::chrono::seconds;

constexpr seconds beat_pause{1};
constexpr seconds silence_dead{60};    // without any other sign: a machine that is gone, or one that swaps badly
constexpr seconds silence_broken{5};   // when a connection broke as well
constexpr seconds blame_patience{12};  // how long a broken connection is looked into
constexpr seconds last_words{3};       // how long rank 0 stays so that the others can read why it ends
constexpr const char *running = "running", *done = "done", *failed = "failed: ", *victim = "lost: ";

const char* resume_hint() { return "the same command with --resume goes on from the last saved state, on any number of ranks"; }

// Of an environment variable.
seconds rendezvous_seconds(const char* name, std::int64_t otherwise, std::int64_t least) {
  const char* text = std::getenv(name);
  if (!text) return seconds(otherwise);
  const auto value = parse_int(text);
  if (!value || *value < least || *value > 86400) throw Error(str(name, " is no number that fits")).given(text).allowed(str(least, " to 86400"));
  return seconds(*value);
}

// Longer than any work between two marks of activity: a training step, a block's rounding.
seconds hang_patience() { return rendezvous_seconds("KOMPAKT_HANG_SECONDS", 1800, 0); }

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

std::string torch_words(const std::exception& error) {
  const auto* torch = dynamic_cast<const c10::Error*>(&error);
  return first_line(torch ? torch->what_without_backtrace() : error.what());
}

std::vector<std::uint8_t> store_bytes(const std::string& text) { return {text.begin(), text.end()}; }
std::string store_text(const std::vector<std::uint8_t>& bytes) { return {bytes.begin(), bytes.end()}; }

}  // namespace

Rendezvous::Rendezvous(const Launch& launch) : launch_(launch), prefix_("kompakt/" + launch.attempt), sights_(static_cast<std::size_t>(launch.world)), hang_patience_(hang_patience()) {
  // Torch prints a stack trace on stderr for every try that fails; what is wrong stands in our own errors.
  if (!std::getenv("TORCH_CPP_LOG_LEVEL")) FLAGS_caffe2_log_level = 3;
  store_ = connect(launch_.rank == 0 && !launch_.hosted);
  meet();
  beat_store_ = connect(false);
  thread_ = std::thread([this] { beat(); });
}

seconds Rendezvous::patience() { return rendezvous_seconds("KOMPAKT_RENDEZVOUS_SECONDS", 300, 1); }

Rendezvous::~Rendezvous() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

c10::intrusive_ptr<c10d::Store> Rendezvous::store(const std::string& name) const { return c10::make_intrusive<c10d::PrefixStore>(prefix_ + "/" + name, store_); }

std::string Rendezvous::key(const char* kind, int rank) const { return str(prefix_, "/", kind, "/", rank); }

c10::intrusive_ptr<c10d::Store> Rendezvous::connect(bool server) const {
  const std::string place = str(launch_.address, ":", launch_.port);
  const seconds limit = patience();
  c10d::TCPStoreOptions options;
  options.port = static_cast<std::uint16_t>(launch_.port);
  options.isServer = server;
  options.waitWorkers = false;
  options.timeout = limit;
  try {
    return c10::make_intrusive<c10d::TCPStore>(launch_.address, options);
  } catch (const std::exception& error) {
    const std::string words = torch_words(error);
    if (server && (words.find("in use") != std::string::npos || words.find("EADDRINUSE") != std::string::npos))
      throw Error(str("port ", launch_.port, " of this machine is taken, so the ranks cannot meet there"), ExitCode::user).at("MASTER_PORT").given(str(launch_.port)).hint("set MASTER_PORT to a free port, the same on all ranks");
    throw Error(str("the ranks cannot meet: no answer from ", place, " within ", limit.count(), " s (", words, ")")).at("MASTER_ADDR, MASTER_PORT").given(place)
        .hint("MASTER_ADDR is the host of rank 0, which must have been started too; a firewall between the machines is the other usual reason");
  }
}

void Rendezvous::meet() {
  const seconds limit = patience();
  try {
    if (store_->add(key("claim", launch_.rank), 1) > 1)
      throw Error(str("two processes say that they are rank ", launch_.rank)).at("RANK").given(str(launch_.rank)).hint("each process needs a rank of its own, from 0 to WORLD_SIZE - 1; a job that still runs on this port is the other usual reason");
    set(key("world", launch_.rank), str(launch_.world));
    set(key("state", launch_.rank), running);
    set(key("work", launch_.rank), "0 0");
    store_->add(key("beats", launch_.rank), 1);
    const auto deadline = Clock::now() + limit;
    for (;;) {
      std::vector<std::string> missing;
      for (int rank = 0; rank < launch_.world; ++rank)
        if (!store_->check({key("beats", rank)})) missing.push_back(str(rank));
      if (missing.empty()) break;
      check_interrupted();
      if (Clock::now() > deadline)
        throw Error(str(missing.size() == 1 ? "rank " : "ranks ", join(missing, ", "), " of ", launch_.world, " did not come to ", launch_.address, ":", launch_.port, " within ", limit.count(), " s")).at("WORLD_SIZE").given(str(launch_.world))
            .hint("start as many processes as WORLD_SIZE says; what the missing ones printed tells why");
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    for (int rank = 0; rank < launch_.world; ++rank) {
      const std::string world = store_text(store_->get(key("world", rank)));
      if (world != str(launch_.world)) throw Error(str("rank ", rank, " belongs to a job of ", world, " ranks, this one to a job of ", launch_.world)).at("WORLD_SIZE").given(str(launch_.world)).hint("give all processes the same WORLD_SIZE");
    }
  } catch (const c10::Error& error) {
    throw Error(str("the ranks could not meet: ", torch_words(error))).at("MASTER_ADDR, MASTER_PORT").given(str(launch_.address, ":", launch_.port)).hint("what rank 0 printed tells why");
  }
  const auto now = Clock::now();
  for (Sight& sight : sights_) sight.changed = sight.worked = now, sight.state = running;
}

void Rendezvous::set(const std::string& name, const std::string& value) { store_->set(name, store_bytes(value)); }

void Rendezvous::beat() {
  std::vector<std::string> keys;
  for (int rank = 0; rank < launch_.world; ++rank) keys.insert(keys.end(), {key("beats", rank), key("state", rank), key("work", rank)});
  try {
    for (;;) {
      beat_store_->add(key("beats", launch_.rank), 1);
      beat_store_->set(key("work", launch_.rank), store_bytes(str(entered_.load(std::memory_order_relaxed), " ", activity_count())));
      const auto values = beat_store_->multiGet(keys);
      std::unique_lock lock(mutex_);
      for (std::size_t rank = 0; rank < sights_.size(); ++rank) {
        Sight& sight = sights_[rank];
        const std::string beats = store_text(values[3 * rank]), work = store_text(values[3 * rank + 2]);
        sight.state = store_text(values[3 * rank + 1]);
        if (work != sight.work) sight.work = work, sight.worked = Clock::now();
        if (beats != sight.beats) sight.beats = beats, sight.changed = Clock::now();
      }
      wake_.notify_all();
      wake_.wait_for(lock, beat_pause, [this] { return stop_; });
      if (stop_) return;
    }
  } catch (const std::exception& error) {
    const std::lock_guard lock(mutex_);
    store_error_ = torch_words(error);
    wake_.notify_all();
  }
}

// Called with the lock held.
void Rendezvous::blame_ended(bool with_victims) {
  for (std::size_t rank = 0; rank < sights_.size(); ++rank) {
    if (static_cast<int>(rank) == launch_.rank) continue;
    const std::string& state = sights_[rank].state;
    if (starts_with(state, failed)) throw Error(str("rank ", rank, " has ended: ", state.substr(std::string_view(failed).size())), ExitCode::resource).hint(str("mend that; ", resume_hint()));
    if (state == done) throw Error(str("rank ", rank, " has left before the work was done"), ExitCode::resource).hint(resume_hint());
  }
  for (std::size_t rank = 0; with_victims && rank < sights_.size(); ++rank)
    if (starts_with(sights_[rank].state, victim) && static_cast<int>(rank) != launch_.rank) throw Error(sights_[rank].state.substr(std::string_view(victim).size()), ExitCode::resource).hint(resume_hint());
  if (!store_error_.empty() && !leaving_)
    throw Error(launch_.hosted ? str("the launcher at ", launch_.address, ":", launch_.port, ", through which the ranks meet, does not answer any more") : str("rank 0, which holds the rendezvous at ", launch_.address, ":", launch_.port, ", is gone"), ExitCode::resource).hint(resume_hint());
}

void Rendezvous::blame_silent(seconds silence, const char* sign) {
  std::vector<std::string> silent;
  for (std::size_t rank = 0; rank < sights_.size(); ++rank)
    if (static_cast<int>(rank) != launch_.rank && Clock::now() - sights_[rank].changed > silence && !starts_with(sights_[rank].state, victim)) silent.push_back(str(rank));
  if (!silent.empty()) throw Error(str(silent.size() == 1 ? "rank " : "ranks ", join(silent, ", "), silent.size() == 1 ? " is gone: " : " are gone: ", sign), ExitCode::resource).hint(resume_hint());
}

// Of the ranks that are furthest behind this one, who waits: those whose work has stood still. Called with the lock held.
void Rendezvous::blame_hanging() {
  if (hang_patience_.count() == 0) return;
  const auto entered = [](const Sight& sight) { return parse_int(sight.work.substr(0, sight.work.find(' '))).value_or(0); };
  std::int64_t least = entered_.load(std::memory_order_relaxed);
  for (std::size_t rank = 0; rank < sights_.size(); ++rank)
    if (static_cast<int>(rank) != launch_.rank && !sights_[rank].work.empty()) least = std::min(least, entered(sights_[rank]));
  if (least == entered_.load(std::memory_order_relaxed)) return;
  std::vector<std::string> hanging;
  for (std::size_t rank = 0; rank < sights_.size(); ++rank) {
    const Sight& sight = sights_[rank];
    if (static_cast<int>(rank) == launch_.rank || sight.work.empty() || entered(sight) != least || starts_with(sight.state, victim)) continue;
    if (Clock::now() - sight.worked > hang_patience_) hanging.push_back(str(rank));
  }
  if (!hanging.empty())
    throw Error(str(hanging.size() == 1 ? "rank " : "ranks ", join(hanging, ", "), hanging.size() == 1 ? " hangs: it lives, but its work has" : " hang: they live, but their work has", " stood still for ", hang_patience_.count(), " s while others wait"), ExitCode::resource)
        .at("KOMPAKT_HANG_SECONDS").given(str(hang_patience_.count())).hint(str("end its process, whose stack tells why (gdb -p); more seconds where a step takes that long, 0 = never; ", resume_hint()));
}

void Rendezvous::check() {
  const std::lock_guard lock(mutex_);
  try {
    blame_ended(true);
    blame_silent(silence_dead, "no sign of life for a minute");
    blame_hanging();
  } catch (...) {
    victim_ = true;
    throw;
  }
}

void Rendezvous::lost(const std::string& transport_message) {
  std::unique_lock lock(mutex_);
  victim_ = true;
  const auto deadline = Clock::now() + blame_patience;
  while (Clock::now() < deadline) {
    blame_ended(false);
    blame_silent(silence_broken, "its connection broke and it gives no sign of life");
    wake_.wait_for(lock, std::chrono::milliseconds(500));
  }
  blame_ended(true);
  throw Error(str("the connection to another rank broke, though all of them live: ", first_line(transport_message)), ExitCode::resource).hint(str("check the network between the machines; ", resume_hint()));
}

bool Rendezvous::others_ended() {
  for (std::size_t rank = 0; rank < sights_.size(); ++rank)
    if (static_cast<int>(rank) != launch_.rank && sights_[rank].state == running && Clock::now() - sights_[rank].changed < silence_broken) return false;
  return true;
}

void Rendezvous::fail(const std::string& reason) noexcept {
  try {
    set(key("state", launch_.rank), (victim_ ? victim : failed) + first_line(reason));
    std::unique_lock lock(mutex_);
    leaving_ = true;
    if (launch_.rank == 0 && !launch_.hosted) wake_.wait_for(lock, last_words, [this] { return others_ended() || !store_error_.empty(); });
  } catch (...) {  // nobody is left to tell
  }
}

void Rendezvous::leave() {
  try {
    set(key("state", launch_.rank), done);
    std::unique_lock lock(mutex_);
    leaving_ = true;
    if (launch_.rank == 0 && !launch_.hosted) wake_.wait_for(lock, silence_dead, [this] { return others_ended() || !store_error_.empty(); });
  } catch (const c10::Error&) {  // the work is done: how the others leave changes nothing
  }
}

}  // namespace kompakt
