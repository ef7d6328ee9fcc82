// Properties of all block types: pack and unpack are inverse, encoding does not lose more than its step, weights help.
#include "formats/ggml_blocks.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "core/random.h"
#include "formats/ggml_pack.h"
#include "formats/tensor_data.h"

namespace kompakt {
namespace {

struct Draws {
  CounterRandom random{11, "blocks"};
  std::uint64_t at = 0;
  template <class T>
  void fill(T* values, int count, int low, int high) {
    for (int i = 0; i < count; ++i) values[i] = static_cast<T>(low + static_cast<int>(random.below(at++, static_cast<std::uint64_t>(high - low + 1))));
  }
  std::uint16_t half() { return static_cast<std::uint16_t>(random.bits(at++)); }
};

template <int Count, int Bytes, auto Pack, auto Unpack>
void check_symmetric(int low, int high) {
  Draws draws;
  for (int round = 0; round < 200; ++round) {
    std::int8_t codes[Count], back[Count];
    std::byte bytes[Bytes], again[Bytes];
    draws.fill(codes, Count, low, high);
    const std::uint16_t d = draws.half();
    std::uint16_t d_back;
    Pack(codes, d, bytes);
    Unpack(bytes, back, &d_back);
    REQUIRE(std::memcmp(codes, back, Count) == 0);
    REQUIRE(d == d_back);
    Pack(back, d_back, again);
    REQUIRE(std::memcmp(bytes, again, Bytes) == 0);
  }
  if (low > -128) {
    std::int8_t codes[Count] = {};
    std::byte bytes[Bytes];
    codes[Count - 1] = static_cast<std::int8_t>(high + 1);
    CHECK_THROWS_AS(Pack(codes, 0, bytes), std::logic_error);
  }
}

template <class Block, int Bytes, auto Pack, auto Unpack, class Fill>
void check_super(const Fill& fill) {
  Draws draws;
  for (int round = 0; round < 200; ++round) {
    Block block, back;
    std::byte bytes[Bytes], again[Bytes];
    std::memset(&block, 0, sizeof block);
    std::memset(&back, 0, sizeof back);
    fill(draws, block);
    Pack(block, bytes);
    Unpack(bytes, back);
    REQUIRE(std::memcmp(&block, &back, sizeof block) == 0);
    // Any bytes unpack, and pack to the same bytes: no bit of the layout is lost.
    draws.fill(reinterpret_cast<std::uint8_t*>(bytes), Bytes, 0, 255);
    Unpack(bytes, back);
    Pack(back, again);
    REQUIRE(std::memcmp(bytes, again, Bytes) == 0);
  }
}

std::vector<float> normal_values(std::int64_t count, std::uint64_t seed) {
  const CounterRandom random(seed, "values");
  std::vector<float> x(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(0.02 * random.normal(i));
  return x;
}

double weighted_error(const std::vector<float>& x, const std::vector<float>& y, const std::vector<float>& w) {
  double error = 0;
  for (std::size_t i = 0; i < x.size(); ++i) error += w[i] * (x[i] - y[i]) * (x[i] - y[i]);
  return error;
}

}  // namespace

TEST_CASE("pack and unpack are inverse for blocks with one scale") {
  check_symmetric<32, 34, pack_q8_0, unpack_q8_0>(-128, 127);
  check_symmetric<32, 18, pack_q4_0, unpack_q4_0>(-8, 7);
  check_symmetric<32, 22, pack_q5_0, unpack_q5_0>(-16, 15);
  check_symmetric<32, 18, pack_iq4_nl, unpack_iq4_nl>(0, 15);
  check_symmetric<256, 54, pack_tq1_0, unpack_tq1_0>(-1, 1);
  check_symmetric<256, 66, pack_tq2_0, unpack_tq2_0>(-1, 2);
  check_symmetric<64, 18, pack_q2_0, unpack_q2_0>(-1, 2);
}

TEST_CASE("pack and unpack are inverse for Q4_1, Q5_1 and MXFP4") {
  Draws draws;
  for (int round = 0; round < 200; ++round) {
    std::int8_t codes[32], back[32];
    std::byte bytes[24];
    std::uint16_t d, m;
    std::uint8_t e;
    draws.fill(codes, 32, 0, 15);
    pack_q4_1(codes, 0x1234, 0x5678, bytes);
    unpack_q4_1(bytes, back, &d, &m);
    REQUIRE((std::memcmp(codes, back, 32) == 0 && d == 0x1234 && m == 0x5678));
    pack_mxfp4(codes, 200, bytes);
    unpack_mxfp4(bytes, back, &e);
    REQUIRE((std::memcmp(codes, back, 32) == 0 && e == 200));
    draws.fill(codes, 32, 0, 31);
    pack_q5_1(codes, 0x1234, 0x5678, bytes);
    unpack_q5_1(bytes, back, &d, &m);
    REQUIRE((std::memcmp(codes, back, 32) == 0 && d == 0x1234 && m == 0x5678));
  }
}

TEST_CASE("pack and unpack are inverse for super-blocks") {
  check_super<Q2KBlock, 84, pack_q2_k, unpack_q2_k>([](Draws& r, Q2KBlock& b) { r.fill(b.codes, 256, 0, 3), r.fill(b.scales, 16, 0, 15), r.fill(b.mins, 16, 0, 15), b.d = r.half(), b.dmin = r.half(); });
  check_super<Q3KBlock, 110, pack_q3_k, unpack_q3_k>([](Draws& r, Q3KBlock& b) { r.fill(b.codes, 256, -4, 3), r.fill(b.scales, 16, -32, 31), b.d = r.half(); });
  check_super<Q4KBlock, 144, pack_q4_k, unpack_q4_k>([](Draws& r, Q4KBlock& b) { r.fill(b.codes, 256, 0, 15), r.fill(b.scales, 8, 0, 63), r.fill(b.mins, 8, 0, 63), b.d = r.half(), b.dmin = r.half(); });
  check_super<Q5KBlock, 176, pack_q5_k, unpack_q5_k>([](Draws& r, Q5KBlock& b) { r.fill(b.codes, 256, 0, 31), r.fill(b.scales, 8, 0, 63), r.fill(b.mins, 8, 0, 63), b.d = r.half(), b.dmin = r.half(); });
  check_super<Q6KBlock, 210, pack_q6_k, unpack_q6_k>([](Draws& r, Q6KBlock& b) { r.fill(b.codes, 256, -32, 31), r.fill(b.scales, 16, -128, 127), b.d = r.half(); });
  check_super<Iq4XsBlock, 136, pack_iq4_xs, unpack_iq4_xs>([](Draws& r, Iq4XsBlock& b) { r.fill(b.codes, 256, 0, 15), r.fill(b.scales, 8, -32, 31), b.d = r.half(); });
}

TEST_CASE("any bytes of TQ1_0 decode to trits, also those that no encoder writes") {
  Draws draws;
  for (int round = 0; round < 50; ++round) {
    std::byte bytes[54];
    std::int8_t codes[256];
    std::uint16_t d;
    draws.fill(reinterpret_cast<std::uint8_t*>(bytes), 54, 0, 255);
    unpack_tq1_0(bytes, codes, &d);
    for (const int code : codes) REQUIRE((code >= -1 && code <= 1));
  }
}

TEST_CASE("rows of the table are sound and found by number and name in any case") {
  for (const GgmlType& type : ggml_types()) {
    CAPTURE(type.name);
    CHECK(type.decode);
    CHECK(find_ggml_type(type.id) == &type);
    CHECK(find_ggml_type(type.name) == &type);
    CHECK(ggml_tensor_bytes(type, type.block * 3, 5) == type.bytes * 15);
    if (type.block > 1) CHECK_FALSE(ggml_tensor_bytes(type, type.block + 1, 5));
    CHECK_FALSE(ggml_tensor_bytes(type, type.block, INT64_MAX / 2 + 1).has_value() != (type.bytes < 2));
    CHECK_FALSE(ggml_tensor_bytes(type, -type.block, 1));
  }
  CHECK(find_ggml_type(std::string_view("q4_k"))->id == 12);
  CHECK(find_ggml_type(std::string_view("q4_2")) == nullptr);
  CHECK(find_ggml_type(5u) == nullptr);
}

// Largest error allowed as a share of the block's largest magnitude, for normal values: half a step and the rounding of scales.
TEST_CASE("encoding loses no more than the type's step") {
  struct Limit {
    const char* type;
    double relative_rms;  // root mean square error over that of the values
  };
  // 0.02 N(0,1); bounds are a little above what a correct encoder gives, and far below a wrong layout (about 1.4).
  const Limit limits[] = {{"F32", 0}, {"F16", 4e-4}, {"BF16", 3e-3}, {"Q8_0", 0.008}, {"Q6_K", 0.025}, {"Q5_K", 0.045}, {"Q5_1", 0.05}, {"Q5_0", 0.06}, {"Q4_K", 0.085},
                          {"Q4_1", 0.1}, {"IQ4_XS", 0.09}, {"IQ4_NL", 0.09}, {"Q4_0", 0.12}, {"MXFP4", 0.15}, {"Q3_K", 0.18}, {"Q2_K", 0.35}, {"TQ1_0", 1.0}, {"TQ2_0", 1.0}, {"Q2_0", 1.0}};
  const auto x = normal_values(4096, 1);
  double norm = 0;
  for (const float v : x) norm += v * v;
  for (const Limit& limit : limits) {
    CAPTURE(limit.type);
    const GgmlType& type = *find_ggml_type(std::string_view(limit.type));
    std::vector<std::byte> bytes(static_cast<std::size_t>(type.bytes));
    std::vector<float> y(x.size());
    for (std::int64_t i = 0; i < 4096 / type.block; ++i) {
      type.encode(x.data() + i * type.block, bytes.data());
      type.decode(bytes.data(), y.data() + i * type.block);
    }
    const double rms = std::sqrt(weighted_error(x, y, std::vector<float>(x.size(), 1)) / norm);
    CHECK(rms <= limit.relative_rms);
    if (limit.relative_rms > 0) CHECK(rms > limit.relative_rms / 4);  // the bound means something
  }
}

TEST_CASE("importance lowers the weighted error") {
  const auto x = normal_values(8192, 2);
  const CounterRandom random(5, "importance");
  std::vector<float> w(x.size());
  for (std::size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(std::exp(2 * random.normal(i)));
  int tested = 0;
  for (const GgmlType& type : ggml_types()) {
    if (!type.encode_weighted) continue;
    CAPTURE(type.name);
    std::vector<std::byte> bytes(static_cast<std::size_t>(type.bytes));
    std::vector<float> plain(x.size()), weighted(x.size());
    for (std::int64_t i = 0; i < 8192 / type.block; ++i) {
      type.encode(x.data() + i * type.block, bytes.data());
      type.decode(bytes.data(), plain.data() + i * type.block);
      type.encode_weighted(x.data() + i * type.block, w.data() + i * type.block, bytes.data());
      type.decode(bytes.data(), weighted.data() + i * type.block);
    }
    CHECK(weighted_error(x, weighted, w) < 0.98 * weighted_error(x, plain, w));
    ++tested;
  }
  CHECK(tested == 11);
}

TEST_CASE("blocks of zeros, constants, single spikes and tiny numbers encode to finite values") {
  for (const GgmlType& type : ggml_types()) {
    if (!type.encode) continue;
    CAPTURE(type.name);
    const auto count = static_cast<std::size_t>(type.block);
    std::vector<std::byte> bytes(static_cast<std::size_t>(type.bytes));
    std::vector<float> x(count, 0.0f), y(count), w(count, 1.0f);
    const auto round_trip = [&](bool weighted) {
      weighted ? type.encode_weighted(x.data(), w.data(), bytes.data()) : type.encode(x.data(), bytes.data());
      type.decode(bytes.data(), y.data());
      for (const float value : y) REQUIRE(std::isfinite(value));
    };
    for (const bool weighted : {false, true}) {
      if (weighted && !type.encode_weighted) continue;
      std::fill(x.begin(), x.end(), 0.0f);
      round_trip(weighted);
      for (const float value : y) CHECK(value == 0.0f);
      for (const float constant : {1.0f, -1.0f, 1e-30f, -1e-42f}) {
        std::fill(x.begin(), x.end(), constant);
        round_trip(weighted);
        for (const float value : y) CHECK(std::fabs(value - constant) <= 0.13f * std::fabs(constant) + 1e-7f);
      }
      std::fill(x.begin(), x.end(), 0.0f);
      x.back() = -3.0f;
      round_trip(weighted);
      CHECK(std::fabs(y.back() + 3.0f) < 0.4f);
    }
  }
}

TEST_CASE("ternary and two-bit values on the grid are kept exactly") {
  for (const char* name : {"TQ1_0", "TQ2_0", "Q2_0"}) {
    CAPTURE(name);
    const GgmlType& type = *find_ggml_type(std::string_view(name));
    Draws draws;
    std::vector<std::int8_t> codes(static_cast<std::size_t>(type.block));
    draws.fill(codes.data(), static_cast<int>(type.block), -1, 1);
    codes[0] = 1;
    std::vector<float> x, y(codes.size());
    for (const auto code : codes) x.push_back(0.125f * code);
    std::vector<std::byte> bytes(static_cast<std::size_t>(type.bytes));
    type.encode(x.data(), bytes.data());
    type.decode(bytes.data(), y.data());
    CHECK(x == y);
  }
}

}  // namespace kompakt
