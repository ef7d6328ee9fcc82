// Grids whose codes are stored by their entropy: the codes come back, the size is near the entropy, the steps are those of the theory,
// and a whole model under a byte budget keeps to it.
#include "quantize/entropy_code.h"

#include <ATen/ATen.h>

#include <catch2/catch.hpp>

#include <cmath>

#include "core/files.h"
#include "core/json.h"
#include "core/random.h"
#include "quantize/grids.h"
#include "quantize/methods.h"
#include "tests/support.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

at::Tensor entropy_normal(std::int64_t rows, std::int64_t columns, const char* stream) {
  const CounterRandom random(5, stream);
  at::Tensor out = at::empty({rows, columns});
  for (std::int64_t i = 0; i < out.numel(); ++i) out.data_ptr<float>()[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)));
  return out;
}

at::Tensor entropy_back(const at::Tensor& codes) { return entropy_decode(entropy_encode(codes), codes.size(0), codes.size(1), -127, 127, "here"); }

// Bits a code of an ideal coder that knows the frequencies.
double ideal_bits(const at::Tensor& codes) {
  const at::Tensor p = at::bincount(codes.flatten().to(at::kLong) + 128).to(at::kDouble) / static_cast<double>(codes.numel());
  return -(p * p.clamp_min(1e-300).log2()).sum().item<double>();
}

}  // namespace

TEST_CASE("entropy-coded codes come back: pairs, single codes, far codes, odd numbers, nothing", "[quantize][entropy]") {
  for (const double spread : {0.3, 1.0, 3.0, 30.0})
    for (const auto& [rows, columns] : {std::pair<std::int64_t, std::int64_t>{1, 1}, {3, 5}, {64, 96}, {7, 333}}) {
      const at::Tensor codes = (entropy_normal(rows, columns, "codes") * spread).round().clamp(-127, 127).to(at::kChar);
      CAPTURE(spread, rows, columns);
      CHECK(at::equal(entropy_back(codes), codes));
    }
  at::Tensor far = at::zeros({8, 1001}, at::kChar);
  far[0][0] = 127, far[3][500] = -127, far[7][1000] = 8;  // the last stands alone in its symbol
  CHECK(entropy_encode(far)[0] == std::byte{2});
  CHECK(at::equal(entropy_back(far), far));
  CHECK(at::equal(entropy_back(at::zeros({4, 0}, at::kChar)), at::zeros({4, 0}, at::kChar)));
}

TEST_CASE("rows that spread differently are coded side by side with their like", "[quantize][entropy]") {
  const at::Tensor spread = (at::arange(256) * 97 % 256).to(at::kFloat) / 32 + 0.1, codes = (entropy_normal(256, 1024, "mixed") * spread.unsqueeze(1)).round().to(at::kChar);
  const std::vector<std::byte> bytes = entropy_encode(codes);
  CHECK(std::to_integer<int>(bytes[0]) >= 4);
  CHECK(at::equal(entropy_decode(bytes, 256, 1024, -127, 127, "here"), codes));
  CHECK(8.0 * static_cast<double>(bytes.size()) / static_cast<double>(codes.numel()) < ideal_bits(codes) - 0.1);  // below what one table for all can do
}

TEST_CASE("the layout of entropy-coded codes, by hand", "[quantize][entropy]") {
  // Pairs (1,-1) (0,9) (2,.): (1+7)+16*(-1+7) = 104, (0+7)+16*15 = 247 and far 9+128 = 137, (2+7)+16*7 = 121. A stored DEFLATE block (RFC 1951, 3.2.4).
  const unsigned char stored[] = {2, 1, 4, 0, 0xfb, 0xff, 104, 247, 121, 137};
  const at::Tensor codes = entropy_decode(std::as_bytes(std::span(stored)), 1, 5, -127, 127, "here");
  CHECK(at::equal(codes, at::tensor({1, -1, 0, 9, 2}, at::kChar).unsqueeze(0)));
  const unsigned char single[] = {1, 1, 2, 0, 0xfd, 0xff, 1, 255};
  CHECK(at::equal(entropy_decode(std::as_bytes(std::span(single)), 2, 1, -127, 127, "here"), at::tensor({-127, 127}, at::kChar).unsqueeze(1)));
  const unsigned char ordered[] = {5, 1, 0, 0, 0, 1, 2, 0, 0xfd, 0xff, 1, 255};  // row 1 stands first
  CHECK(at::equal(entropy_decode(std::as_bytes(std::span(ordered)), 2, 1, -127, 127, "here"), at::tensor({127, -127}, at::kChar).unsqueeze(1)));
}

TEST_CASE("damaged entropy-coded codes are refused", "[quantize][entropy]") {
  const auto refusal = [](std::vector<unsigned char> bytes, std::int64_t columns, int low = -127, int high = 127) {
    return error_text([&] { entropy_decode(std::as_bytes(std::span(bytes)), 1, columns, low, high, "file: tensor"); });
  };
  CHECK(contains_all(refusal({}, 5), {"first byte", "nothing", "1, 2, 5 or 6", "file: tensor"}));
  CHECK(contains_all(refusal({2, 1, 4, 0, 0xfb, 0xff, 104, 247, 121, 137}, std::int64_t{1} << 60), {"so few bytes", "9 bytes"}));
  CHECK(contains_all(refusal({5, 0}, 5), {"order of the rows is not whole"}));
  CHECK(contains_all(refusal({5, 1, 0, 1, 2, 0, 0xfd, 0xff, 1, 255}, 2), {"row twice, or one that there is not"}));
  CHECK(contains_all(refusal({3, 1, 0, 0, 0xff, 0xff}, 5), {"first byte", "3"}));
  CHECK(contains_all(refusal({2, 1, 3, 0, 0xfc, 0xff, 104, 247, 121}, 5), {"missing behind the symbols"}));
  CHECK(contains_all(refusal({2, 1, 5, 0, 0xfa, 0xff, 104, 247, 121, 137, 137}, 5), {"bytes behind the codes"}));
  CHECK(contains_all(refusal({2, 1, 4, 0, 0xfb, 0xff, 104, 247, 121, 137}, 5, -7, 7), {"outside of the grid", "-7 to 7"}));
  CHECK(contains_all(refusal({1, 1, 2, 0, 0xfd, 0xff, 0, 255}, 2), {"outside of the grid"}));
}

TEST_CASE("entropy-coded grids against goldens from Python", "[quantize][entropy][golden]") {
  const Json goldens = read_json(source_folder() / "tests" / "goldens" / "entropy.json");
  for (const Json& entry : goldens.at("cases")) {
    const auto rows = entry.at("rows").get<std::int64_t>(), columns = entry.at("columns").get<std::int64_t>();
    CAPTURE(entry.at("grid").get<std::string>(), rows, columns);
    const GridSpec spec{find_grid(entry.at("grid").get<std::string>()), 0};
    const at::Tensor weight = at::tensor(entry.at("weight").get<std::vector<double>>(), at::kFloat).reshape({rows, columns});
    const at::Tensor scales = at::tensor(entry.at("scales").get<std::vector<double>>(), at::kFloat).unsqueeze(1);
    const at::Tensor codes = at::tensor(entry.at("codes").get<std::vector<std::int64_t>>(), at::kLong).to(at::kChar).reshape({rows, columns});
    const Quantized q = encode(spec, weight);
    CHECK(at::equal(q.scales, scales));
    CHECK(at::equal(q.codes, codes));
    std::size_t smallest = 1 << 30;
    for (const auto& [kind, hex] : entry.at("layouts").items()) {
      CAPTURE(kind);
      const std::string text = hex.get<std::string>();
      std::vector<std::byte> bytes;
      for (std::size_t i = 0; i < text.size(); i += 2) bytes.push_back(static_cast<std::byte>(std::stoi(text.substr(i, 2), nullptr, 16)));
      CHECK(std::to_integer<int>(bytes[0]) == std::stoi(kind));
      CHECK(at::equal(entropy_decode(bytes, rows, columns, -127, 127, "golden"), codes));
      smallest = std::min(smallest, bytes.size());
    }
    CHECK(entropy_encode(codes).size() <= smallest + 4);  // other versions of zlib may lay out their tables differently
  }
}

TEST_CASE("entropy-coded grids: steps, size and error of normal weights", "[quantize][entropy]") {
  const at::Tensor w = entropy_normal(512, 576, "weights") * 0.04;
  double above = 1;
  for (const Grid& grid : grids()) {
    if (!grid.entropy_coded()) continue;
    CAPTURE(std::string(grid.name));
    const GridSpec spec{&grid, grid.default_group};
    const Quantized q = encode(spec, w);
    const double step = (q.scales / w.square().mean(1, true).sqrt()).mean().item<double>(), error = ((decode(spec, q) - w).square().sum() / w.square().sum()).item<double>();
    // High-rate theory: a twelfth of the squared step, and an entropy of log2(sqrt(2 pi e) / step), where steps are narrow beside the distribution.
    if (grid.code_bits >= 2) CHECK(error == Approx(step * step / 12).epsilon(0.03));
    if (grid.code_bits >= 3) CHECK(ideal_bits(q.codes) == Approx(std::log2(std::sqrt(2 * M_PI * M_E) / step)).margin(0.02));
    const double bits = 8.0 * static_cast<double>(stored_bytes(spec, q) - 2 * w.size(0)) / static_cast<double>(w.numel());
    CHECK(bits > ideal_bits(q.codes));
    CHECK(bits < ideal_bits(q.codes) + 0.06);  // what a Huffman code of one or two symbols and its tables waste
    CHECK(bits < grid.code_bits);
    CHECK(bits > grid.code_bits - 0.1);
    CHECK(stored_bytes(spec, q) < spec.packed_bytes(w.size(0), w.size(1)));
    // The rate-distortion bound of a normal distribution is 2^-2R: uniform steps stay within 1.53 dB (a factor of 1.42) of it at
    // high rates, and the waste of the code; below 2.5 bits rounding to the nearest step is no longer the best of entropy-coded quantizers.
    CHECK(error < std::pow(2.0, -2 * bits) * (grid.code_bits >= 2.5 ? 1.6 : 1.9));
    CHECK(error < above);
    above = error;
  }
  CHECK(above < 0.0005);
}

TEST_CASE("at equal bytes entropy-coded grids err half as much as groups with codes of equal length", "[quantize][entropy]") {
  const at::Tensor w = entropy_normal(256, 576, "against") * 0.04;
  const auto measured = [&](const GridSpec& spec) {
    const Quantized q = encode(spec, w);
    return std::pair<double, double>{8.0 * static_cast<double>(stored_bytes(spec, q)) / static_cast<double>(w.numel()), ((decode(spec, q) - w).square().sum() / w.square().sum()).item<double>()};
  };
  const auto three = measured({find_grid("int3_asym"), 64}), coded = measured({find_grid("ecq3"), 0});
  CHECK(coded.first < three.first - 0.3);
  CHECK(coded.second < three.second);
  const auto wider = measured({find_grid("ecq3_5"), 0});
  CHECK(wider.first == Approx(three.first).margin(0.15));
  CHECK(wider.second < three.second / 2);
}

TEST_CASE("rows with a weight far from the others keep their codes inside of a byte", "[quantize][entropy]") {
  at::Tensor w = entropy_normal(4, 4096, "far") * 0.01;
  w[1][17] = 5, w[2][0] = -60000;
  const GridSpec spec{find_grid("ecq6"), 0};
  const Quantized q = encode(spec, w);
  CHECK(q.codes.to(at::kInt).abs().max().item<int>() <= 127);
  CHECK(decode(spec, q)[1][17].item<float>() == Approx(5).epsilon(0.01));
  CHECK(decode(spec, q)[2][0].item<float>() == Approx(-60000).epsilon(0.01));
  CHECK(at::equal(decode(spec, encode(spec, at::zeros({2, 64}))), at::zeros({2, 64})));
}
