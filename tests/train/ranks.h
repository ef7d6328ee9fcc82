// Several ranks for tests: threads of one process that meet on a free port of this machine.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <exception>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "distributed/collective.h"

namespace kompakt::testing {

// One that was free a moment ago.
inline int free_port() {
  const int socket = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  int port = 0;
  if (socket >= 0 && ::bind(socket, reinterpret_cast<sockaddr*>(&address), size) == 0 && ::getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size) == 0) port = ntohs(address.sin_port);
  if (socket >= 0) ::close(socket);
  return port;
}

inline Launch test_launch(int rank, int world, int port) {
  Launch launch;
  launch.rank = launch.local_rank = rank;
  launch.world = launch.local_world = world;
  launch.address = "127.0.0.1";
  launch.port = port;
  return launch;
}

// `work` on each of `world` ranks at once; the first exception comes out here.
inline void on_ranks(int world, const std::function<void(Collective&)>& work) {
  const int port = free_port();
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(world));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world; ++rank)
    threads.emplace_back([&, rank] {
      std::unique_ptr<Collective> ranks;
      try {
        ranks = Collective::join(test_launch(rank, world, port), c10::Device(c10::kCPU));
        work(*ranks);
        ranks->leave();
      } catch (const std::exception& error) {
        failures[static_cast<std::size_t>(rank)] = std::current_exception();
        if (ranks) ranks->fail(error.what());
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& failure : failures)
    if (failure) std::rethrow_exception(failure);
}

}  // namespace kompakt::testing
