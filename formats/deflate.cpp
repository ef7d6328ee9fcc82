#include "formats/deflate.h"

#include <zlib.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {
namespace {

constexpr int deflate_raw = -15;  // window bits below zero: neither header nor checksum around the stream

// zlib counts in unsigned int: long buffers are handed over in pieces.
uInt deflate_piece(std::size_t left) { return static_cast<uInt>(std::min<std::size_t>(left, std::numeric_limits<uInt>::max() / 2)); }

Bytef* deflate_pointer(const std::byte* at) { return reinterpret_cast<Bytef*>(const_cast<std::byte*>(at)); }

}  // namespace

std::vector<std::byte> huffman_compress(std::span<const std::byte> symbols) {
  z_stream stream = {};
  if (deflateInit2(&stream, 6, Z_DEFLATED, deflate_raw, 9, Z_HUFFMAN_ONLY) != Z_OK) throw std::runtime_error("zlib: deflateInit2 failed");
  const std::unique_ptr<z_stream, int (*)(z_stream*)> end(&stream, deflateEnd);
  std::vector<std::byte> out;
  std::size_t read = 0;
  int code = Z_OK;
  while (code != Z_STREAM_END) {
    if (stream.avail_in == 0 && read < symbols.size()) {
      stream.next_in = deflate_pointer(symbols.data() + read), stream.avail_in = deflate_piece(symbols.size() - read);
      read += stream.avail_in;
    }
    const std::size_t written = out.size();
    out.resize(written + std::max<std::size_t>(1024, symbols.size() / 8));
    stream.next_out = deflate_pointer(out.data() + written), stream.avail_out = deflate_piece(out.size() - written);
    const uInt room = stream.avail_out;
    code = deflate(&stream, read == symbols.size() ? Z_FINISH : Z_NO_FLUSH);
    if (code != Z_OK && code != Z_STREAM_END && code != Z_BUF_ERROR) throw std::runtime_error(str("zlib: deflate gives ", code));
    out.resize(written + (room - stream.avail_out));
  }
  return out;
}

std::vector<std::byte> huffman_decompress(std::span<const std::byte> data, std::size_t least, std::size_t most, const std::string& place) {
  const auto damaged = [&](const std::string& why) { return Error(str("the Huffman codes are damaged: ", why)).at(place).given(str(data.size(), " bytes")); };
  z_stream stream = {};
  if (inflateInit2(&stream, deflate_raw) != Z_OK) throw std::runtime_error("zlib: inflateInit2 failed");
  const std::unique_ptr<z_stream, int (*)(z_stream*)> end(&stream, inflateEnd);
  // No more than the caller expects is allocated, and one symbol that tells a longer stream.
  std::vector<std::byte> out(std::min(most, least + 65536) + 1);
  std::size_t read = 0, written = 0;
  int code = Z_OK;
  while (code != Z_STREAM_END) {
    if (stream.avail_in == 0 && read < data.size()) {
      stream.next_in = deflate_pointer(data.data() + read), stream.avail_in = deflate_piece(data.size() - read);
      read += stream.avail_in;
    }
    if (written == out.size()) out.resize(std::min(most, 2 * out.size()) + 1);
    stream.next_out = deflate_pointer(out.data() + written), stream.avail_out = deflate_piece(out.size() - written);
    const uInt room = stream.avail_out, given = stream.avail_in;
    code = inflate(&stream, Z_NO_FLUSH);
    if (code != Z_OK && code != Z_STREAM_END && code != Z_BUF_ERROR) throw damaged(stream.msg ? stream.msg : "not a stream");
    written += room - stream.avail_out;
    if (written > most) throw damaged(str("there are more than the ", most, " symbols that this tensor can have"));
    if (code != Z_STREAM_END && stream.avail_out == room && stream.avail_in == given) throw damaged("the stream ends too early");
  }
  if (written < least) throw damaged(str("there are ", written, " symbols of at least ", least));
  if (stream.avail_in != 0 || read != data.size()) throw damaged("there are bytes behind the stream");
  out.resize(written);
  return out;
}

}  // namespace kompakt
