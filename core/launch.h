// Which of several processes of one job this is, as the program that started it says: torchrun, mpirun, or nobody.
// Reads environment variables only; who talks to whom is distributed/collective.h.
#pragma once

#include <functional>
#include <string>

namespace kompakt {

struct Launch {
  int rank = 0, world = 1;              // this process among all
  int local_rank = 0, local_world = 1;  // among those of this machine
  std::string address;                  // host and port of the rendezvous, empty for one process
  int port = 0;
  bool hosted = false;                  // the launcher itself answers there (torchrun); else rank 0 does
  std::string attempt = "0";            // torchrun's count of restarts: keeps a new attempt apart from the old one's traces
  bool alone() const { return world == 1; }
};

using Environment = std::function<const char*(const char*)>;  // like getenv

// Rows tried in order: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE (torchrun; scripts/slurm_run.sh sets the same), OMPI_COMM_WORLD_*
// (Open MPI), PMI_* (MPICH, Intel MPI). MASTER_ADDR may be missing when all processes are on this machine; MASTER_PORT defaults to 29500.
// Errors: half of a row, numbers that do not fit each other, no MASTER_ADDR for several machines.
Launch read_launch(const Environment& environment);

// Of this process; read once. Throws what read_launch throws.
const Launch& this_launch();

// "rank 2: " in a job of several processes, "" otherwise; never throws.
std::string rank_prefix();

}  // namespace kompakt
