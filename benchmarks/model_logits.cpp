// Logits of a model or an artifact for fixed token ids, for comparison with other programs: model_logits MODEL IDS OUT.safetensors
// IDS: a text file of whole numbers, one row of a batch per line, rows of equal length. OUT holds "logits" [B,T,V] float32.
// scripts/check_compressed_tensors.py calls it.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cstdio>
#include <sstream>

#include "core/error.h"
#include "core/files.h"
#include "export/exporters.h"
#include "formats/safetensors.h"
#include "model/checkpoint.h"

int main(int count, char** arguments) try {
  using namespace kompakt;
  if (count != 4) throw Error("usage: model_logits MODEL IDS OUT.safetensors");
  const at::NoGradGuard no_grad;
  const auto model = open_any_model(arguments[1]);
  std::vector<std::int64_t> ids;
  std::int64_t rows = 0;
  std::istringstream text(read_text(arguments[2]));
  for (std::string line; std::getline(text, line);) {
    std::istringstream numbers(line);
    const std::size_t before = ids.size();
    for (std::int64_t id = 0; numbers >> id;) {
      if (id < 0 || id >= model->config().vocab) throw Error("a token outside of the vocabulary").at(arguments[2]).given(std::to_string(id));
      ids.push_back(id);
    }
    rows += ids.size() > before;
  }
  if (rows == 0 || ids.size() % static_cast<std::size_t>(rows) != 0) throw Error("rows of equal length are needed").at(arguments[2]);
  const at::Tensor logits = model->forward({at::tensor(at::ArrayRef<std::int64_t>(ids), at::kLong).reshape({rows, -1}), {}, {}, {}});
  write_safetensors(arguments[3], {as_data("logits", logits.to(at::kFloat))});
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
