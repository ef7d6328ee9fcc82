#include "formats/zstd.h"

#include <zstd.h>

#include <memory>
#include <stdexcept>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {

std::vector<std::byte> zstd_compress(std::span<const std::byte> bytes, int level) {
  const std::unique_ptr<ZSTD_CCtx, std::size_t (*)(ZSTD_CCtx*)> context(ZSTD_createCCtx(), ZSTD_freeCCtx);
  ZSTD_CCtx_setParameter(context.get(), ZSTD_c_compressionLevel, level);
  ZSTD_CCtx_setParameter(context.get(), ZSTD_c_checksumFlag, 1);
  std::vector<std::byte> out(ZSTD_compressBound(bytes.size()));
  const std::size_t size = ZSTD_compress2(context.get(), out.data(), out.size(), bytes.data(), bytes.size());
  if (ZSTD_isError(size)) throw std::runtime_error(str("zstd: ", ZSTD_getErrorName(size)));
  out.resize(size);
  return out;
}

std::vector<std::byte> zstd_decompress(std::span<const std::byte> frame, std::size_t size, const std::string& place) {
  // The size that the frame claims is not trusted: what the caller expects is what is allocated.
  std::vector<std::byte> out(size);
  const std::size_t written = ZSTD_decompress(out.data(), out.size(), frame.data(), frame.size());
  if (ZSTD_isError(written)) throw Error(str("the compressed data are damaged: ", ZSTD_getErrorName(written))).at(place).given(str(frame.size(), " bytes"));
  if (written != size) throw Error("the compressed data have another size than they should").at(place).given(str(written, " bytes")).allowed(str(size, " bytes"));
  return out;
}

}  // namespace kompakt
