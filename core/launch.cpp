#include "core/launch.h"

#include <array>
#include <cstdlib>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {
namespace {

struct LauncherRow {
  const char *name, *rank, *world, *local_rank, *local_world;
};
constexpr std::array<LauncherRow, 3> launchers = {{
    {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
    {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"},
    {"MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
}};

constexpr int default_port = 29500;

std::string launch_text(const Environment& environment, const char* name) {
  const char* value = environment(name);
  return value ? value : "";
}

int launch_number(const Environment& environment, const char* name, std::int64_t least, std::int64_t most) {
  const std::string text = launch_text(environment, name);
  const auto value = parse_int(text);
  if (!value || *value < least || *value > most)
    throw Error(str("the environment variable ", name, " is no number that fits")).at(name).given(text).allowed(str(least, " to ", most)).hint("start several processes with torchrun, mpirun or scripts/slurm_run.sh; for one process, unset it");
  return static_cast<int>(*value);
}

}  // namespace

Launch read_launch(const Environment& environment) {
  Launch launch;
  for (const LauncherRow& row : launchers) {
    const bool has_rank = environment(row.rank), has_world = environment(row.world);
    if (!has_rank && !has_world) continue;
    if (!has_rank || !has_world)
      throw Error(str("the environment variable ", has_rank ? row.rank : row.world, " is set, and ", has_rank ? row.world : row.rank, " is not")).at(row.name).hint("set both, as torchrun does; for one process, unset it");
    launch.world = launch_number(environment, row.world, 1, 65536);
    launch.rank = launch_number(environment, row.rank, 0, launch.world - 1);
    launch.local_world = environment(row.local_world) ? launch_number(environment, row.local_world, 1, launch.world) : 1;
    launch.local_rank = environment(row.local_rank) ? launch_number(environment, row.local_rank, 0, launch.world - 1) : 0;
    if (launch.alone()) return launch;
    launch.address = launch_text(environment, "MASTER_ADDR");
    if (launch.address.empty()) {
      if (launch.local_world != launch.world) throw Error("the environment variable MASTER_ADDR is missing: nobody knows where rank 0 is").at(row.name).hint("set it to the host of rank 0, and MASTER_PORT to a free port there");
      launch.address = "127.0.0.1";
    }
    launch.port = environment("MASTER_PORT") ? launch_number(environment, "MASTER_PORT", 1, 65535) : default_port;
    launch.hosted = launch_text(environment, "TORCHELASTIC_USE_AGENT_STORE") == "True";
    if (const char* attempt = environment("TORCHELASTIC_RESTART_COUNT")) launch.attempt = attempt;
    return launch;
  }
  return launch;
}

const Launch& this_launch() {
  static const Launch launch = read_launch([](const char* name) { return std::getenv(name); });
  return launch;
}

std::string rank_prefix() {
  try {
    return this_launch().alone() ? "" : str("rank ", this_launch().rank, ": ");
  } catch (...) {
    return "";
  }
}

}  // namespace kompakt
