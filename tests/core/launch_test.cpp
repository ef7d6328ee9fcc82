// Which process of a job this is: every launcher's variables, and what is wrong with them.
#include "core/launch.h"

#include <catch2/catch.hpp>

#include <map>

#include "tests/support.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

Launch launch_of(const std::map<std::string, std::string>& variables) {
  return read_launch([&](const char* name) {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  });
}

}  // namespace

TEST_CASE("one process where nobody says otherwise") {
  CHECK(launch_of({}).alone());
  CHECK(launch_of({{"RANK", "0"}, {"WORLD_SIZE", "1"}}).alone());
  CHECK(launch_of({{"MASTER_ADDR", "elsewhere"}}).alone());
  CHECK(launch_of({}).address.empty());
}

TEST_CASE("torchrun, Open MPI and MPICH say who a process is") {
  const Launch a = launch_of({{"RANK", "3"}, {"WORLD_SIZE", "4"}, {"LOCAL_RANK", "1"}, {"LOCAL_WORLD_SIZE", "2"}, {"MASTER_ADDR", "node7"}, {"MASTER_PORT", "1234"}, {"TORCHELASTIC_USE_AGENT_STORE", "True"}, {"TORCHELASTIC_RESTART_COUNT", "2"}});
  CHECK(a.rank == 3);
  CHECK(a.world == 4);
  CHECK(a.local_rank == 1);
  CHECK(a.local_world == 2);
  CHECK(a.address == "node7");
  CHECK(a.port == 1234);
  CHECK(a.hosted);
  CHECK(a.attempt == "2");
  const Launch b = launch_of({{"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "2"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "1"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}});
  CHECK(b.rank == 1);
  CHECK(b.address == "127.0.0.1");  // all on one machine
  CHECK(b.port == 29500);
  CHECK(!b.hosted);
  CHECK(launch_of({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"MASTER_ADDR", "a"}}).world == 2);
  // torchrun inside an mpirun job: the nearer one counts.
  CHECK(launch_of({{"RANK", "0"}, {"WORLD_SIZE", "1"}, {"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "2"}}).alone());
}

TEST_CASE("variables that do not fit are named") {
  CHECK(contains_all(error_text([] { launch_of({{"RANK", "0"}}); }), {"RANK is set", "WORLD_SIZE is not"}));
  CHECK(contains_all(error_text([] { launch_of({{"WORLD_SIZE", "2"}}); }), {"WORLD_SIZE is set", "RANK is not"}));
  CHECK(contains_all(error_text([] { launch_of({{"RANK", "2"}, {"WORLD_SIZE", "2"}}); }), {"RANK", "given:   2", "0 to 1"}));
  CHECK(contains_all(error_text([] { launch_of({{"RANK", "-1"}, {"WORLD_SIZE", "2"}}); }), {"RANK", "-1"}));
  CHECK(contains_all(error_text([] { launch_of({{"RANK", "0"}, {"WORLD_SIZE", "two"}}); }), {"WORLD_SIZE", "two"}));
  CHECK(contains_all(error_text([] { launch_of({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"LOCAL_WORLD_SIZE", "3"}}); }), {"LOCAL_WORLD_SIZE", "1 to 2"}));
  CHECK(contains_all(error_text([] { launch_of({{"RANK", "0"}, {"WORLD_SIZE", "2"}}); }), {"MASTER_ADDR"}));
  CHECK(contains_all(error_text([] { launch_of({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "70000"}}); }), {"MASTER_PORT", "70000"}));
}
