// The process and its machine: peak memory, cores, disk, interruption.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace kompakt {

std::int64_t peak_memory_bytes();    // high-water mark of the resident set since start or the last reset
std::int64_t current_memory_bytes(); // resident set now
void release_free_memory();          // what was freed goes back to the system; small tensors of a finished phase else stay resident
bool reset_peak_memory();            // false where the kernel does not allow it
std::int64_t physical_memory_bytes();
std::int64_t free_disk_bytes(const std::filesystem::path& folder);
int core_count();                    // usable by this process (affinity respected)
std::string processor_name();
double cpu_seconds();                // user + system time of this process
std::string executable_path();

// SIGINT and SIGTERM set a flag; a long job asks at safe points, saves and leaves by check_interrupted().
void install_signal_handlers();
bool interrupted();
void request_interrupt(int signal);  // as if it had come: from another rank, and in tests
// Throws Error with exit code 130 or 143 and a hint to use --resume, when a signal has come.
void check_interrupted();

}  // namespace kompakt
