// Where large blocks come from while work alternates between much that is short-lived and little that lasts.
#pragma once

namespace kompakt {

// While one lives, freed memory stays with the process for the next allocation, instead of going back to the system and coming again page
// by page. Blocks made under `Lasting` lie apart from the rest, so that what stays leaves no holes between what goes, on which the heap
// would grow. At the end all that is free goes back. One at a time in a process; `Lasting` alone, or without glibc, does nothing.
class ReusedMemory {
 public:
  ReusedMemory();
  ~ReusedMemory();
  ReusedMemory(const ReusedMemory&) = delete;
  ReusedMemory& operator=(const ReusedMemory&) = delete;

  class Lasting {
   public:
    Lasting();
    ~Lasting();
    Lasting(const Lasting&) = delete;
    Lasting& operator=(const Lasting&) = delete;
  };
};

}  // namespace kompakt
