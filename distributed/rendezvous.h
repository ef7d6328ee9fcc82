// Where the ranks of a job meet, and how each knows whether the others live: a key-value store that rank 0 (or torchrun) holds,
// with a counter per rank that grows every second, and one that grows with its work. Moves no tensors.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/launch.h"

namespace kompakt {

class Rendezvous {
 public:
  explicit Rendezvous(const Launch& launch);  // returns when every rank is there; errors: see Collective::join
  ~Rendezvous();
  Rendezvous(const Rendezvous&) = delete;
  Rendezvous& operator=(const Rendezvous&) = delete;

  // How long the ranks seek each other: 300 s, or KOMPAKT_RENDEZVOUS_SECONDS.
  static std::chrono::seconds patience();
  // For a transport that brings its own keys.
  c10::intrusive_ptr<c10d::Store> store(const std::string& name) const;
  // This rank enters one more of the operations that all ranks run in the same order.
  void enter() { entered_.fetch_add(1, std::memory_order_relaxed); }
  // Throws an Error with the name of a rank that has ended, that has been silent for a minute, or that is behind and has neither entered an
  // operation nor passed a point of its work (core/activity.h) for KOMPAKT_HANG_SECONDS.
  void check();
  // The transport lost a connection: finds out whose, which takes a few seconds, and throws.
  [[noreturn]] void lost(const std::string& transport_message);
  void fail(const std::string& reason) noexcept;
  void leave();

 private:
  using Clock = std::chrono::steady_clock;
  struct Sight {  // of another rank
    std::string beats, state, work;    // work: "<operations entered> <marks of activity>"
    Clock::time_point changed, worked;
  };
  c10::intrusive_ptr<c10d::Store> connect(bool server) const;
  void meet();
  void beat();
  void set(const std::string& key, const std::string& value);
  std::string key(const char* kind, int rank) const;
  void blame_ended(bool with_victims);                       // ranks that said why they end
  void blame_silent(std::chrono::seconds silence, const char* sign);  // ranks without a sign of life
  void blame_hanging();
  bool others_ended();

  const Launch launch_;
  const std::string prefix_;
  c10::intrusive_ptr<c10d::Store> store_, beat_store_;  // the second one belongs to the thread
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Sight> sights_;
  std::string store_error_;  // the thread's last words
  bool stop_ = false, victim_ = false, leaving_ = false;
  std::chrono::seconds hang_patience_{0};  // 0 = a rank that lives is waited for without limit
  std::atomic<std::int64_t> entered_{0};
  std::thread thread_;
};

}  // namespace kompakt
