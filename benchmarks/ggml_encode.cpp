// Our encoders of ggml's block types on given weights: speed on one thread, and the blocks themselves for another decoder.
// Called by ggml_encode.py, which runs llama.cpp's quantizer beside it.
//
// usage: ggml_encode FOLDER ROWS COLUMNS [SECONDS [TYPE]]
// FOLDER holds weights.f32 [ROWS, COLUMNS] and importance.f32 [COLUMNS]; for every type, with importance and without, a line
//   TYPE plain|weighted exact|grid MILLION_WEIGHTS_PER_SECOND FILE
// goes to the standard output and the blocks to FOLDER/FILE. exact: ggml's own search, the same bytes; grid: the fit of the
// quantizer (quantize/grids.h), with its packing.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cstdio>
#include <fstream>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "core/system.h"
#include "export/gguf_blocks.h"
#include "formats/ggml_blocks.h"
#include "quantize/grids.h"

namespace {

using namespace kompakt;

at::Tensor read_floats(const std::string& path, std::vector<std::int64_t> shape) {
  at::Tensor out = at::empty(shape, at::kFloat);
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(out.data_ptr<float>()), static_cast<std::streamsize>(out.nbytes()));
  if (!file) throw std::runtime_error("cannot read " + path);
  return out;
}

struct Encoder {
  std::string how;
  std::function<std::span<const std::byte>(const at::Tensor& importance)> run;  // what it returns holds until the next run
};

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) {
    std::fprintf(stderr, "usage: ggml_encode FOLDER ROWS COLUMNS [SECONDS [TYPE]]\n");
    return 2;
  }
  at::set_num_threads(1);
  const std::string folder = arguments[1];
  const std::int64_t rows = std::stoll(arguments[2]), columns = std::stoll(arguments[3]);
  const double least = count > 4 ? std::stod(arguments[4]) : 0.3;
  const at::Tensor w = read_floats(folder + "/weights.f32", {rows, columns}), importance = read_floats(folder + "/importance.f32", {columns});
  for (const GgmlType& type : ggml_types()) {
    if (type.block == 1 || columns % type.block != 0 || (count > 5 && type.name != arguments[5])) continue;
    std::vector<Encoder> encoders;
    if (type.encode)
      encoders.push_back({"exact", [&, out = std::vector<std::byte>(static_cast<std::size_t>(rows * columns / type.block * type.bytes))](const at::Tensor& weights) mutable {
                            const float* from = w.const_data_ptr<float>();
                            const float* weight = weights.defined() ? weights.const_data_ptr<float>() : nullptr;
                            std::byte* to = out.data();
                            for (std::int64_t r = 0; r < rows; ++r)
                              for (std::int64_t b = 0; b < columns; b += type.block, from += type.block, to += type.bytes) {
                                if (weight) type.encode_weighted(from, weight + b, to);
                                else type.encode(from, to);
                              }
                            return std::span<const std::byte>(out);
                          }});
    for (const Grid& grid : grids())
      if (grid.group_fixed && grid.ggml_type == type.name) {
        const GridSpec spec{&grid, grid.default_group};
        encoders.push_back({"grid", [&w, &type, spec, out = std::vector<std::byte>()](const at::Tensor& weights) mutable {
                              out = to_ggml_blocks(type, spec, encode(spec, w, weights));
                              return std::span<const std::byte>(out);
                            }});
      }
    for (const bool weighted : {false, true})
      for (const Encoder& encoder : encoders) {
        if (weighted && encoder.how == "exact" && !type.encode_weighted) continue;
        const at::Tensor given = weighted ? importance : at::Tensor();
        const std::span<const std::byte> first = encoder.run(given);
        const std::vector<std::byte> bytes(first.begin(), first.end());
        const double start = cpu_seconds();
        int runs = 0;
        for (; cpu_seconds() - start < least; ++runs) encoder.run(given);
        const double seconds = (cpu_seconds() - start) / runs;
        const std::string file = std::string(type.name) + (weighted ? ".weighted." : ".plain.") + encoder.how;
        std::ofstream(folder + "/" + file, std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
        std::printf("%s %s %s %.3f %s\n", std::string(type.name).c_str(), weighted ? "weighted" : "plain", encoder.how.c_str(), static_cast<double>(w.numel()) / seconds * 1e-6, file.c_str());
        std::fflush(stdout);
      }
  }
  return 0;
}
