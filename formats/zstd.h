// Zstandard frames with a checksum of their content. The only door to libzstd.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace kompakt {

std::vector<std::byte> zstd_compress(std::span<const std::byte> bytes, int level = 3);
// The content of one frame that must hold exactly `size` bytes. Error at `place` when it is damaged or of another size.
std::vector<std::byte> zstd_decompress(std::span<const std::byte> frame, std::size_t size, const std::string& place);

}  // namespace kompakt
