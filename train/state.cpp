// Saving and restoring the state of a training run.
#include "train/state.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "core/error.h"
#include "core/text.h"
#include "formats/safetensors.h"
#include "model/checkpoint.h"

namespace kompakt {
namespace {

constexpr const char* state_key = "state";

DType state_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kLong: return DType::i64;
    case at::kByte: return DType::u8;
    default: throw std::logic_error("save_state: unexpected tensor type");
  }
}

void state_differences(const Json& saved, const Json& wanted, const std::string& prefix, std::vector<std::string>& out) {
  if (saved.is_object() && wanted.is_object()) {
    for (const auto& [key, value] : wanted.items()) state_differences(saved.contains(key) ? saved.at(key) : Json(), value, prefix.empty() ? key : prefix + "." + key, out);
    for (const auto& [key, value] : saved.items()) {
      if (!wanted.contains(key)) state_differences(value, Json(), prefix.empty() ? key : prefix + "." + key, out);
    }
    return;
  }
  const auto brief = [](const Json& json) {
    const std::string text = json.dump();
    return text.size() > 40 ? text.substr(0, 40) + "..." : text;
  };
  if (saved != wanted) out.push_back(str(prefix, ": ", brief(saved), " then, ", brief(wanted), " now"));
}

}  // namespace

void save_state(const std::filesystem::path& file, const NamedTensors& tensors, const Json& json) {
  std::vector<TensorData> out;
  for (const auto& [name, tensor] : tensors) {
    // CPU tensors are written from where they lie: no second copy of weights and moments.
    auto flat = std::make_shared<at::Tensor>(tensor.detach().to(at::kCPU).contiguous());
    TensorData data{name, state_dtype(flat->scalar_type()), flat->sizes().vec(), {}, flat};
    data.bytes = {static_cast<const std::byte*>(flat->const_data_ptr()), flat->nbytes()};
    out.push_back(std::move(data));
  }
  write_safetensors(file, std::move(out), {{state_key, json.dump()}});
}

Json read_state_json(const std::filesystem::path& file) {
  if (!std::filesystem::exists(file)) return nullptr;
  const SafetensorsFile opened = SafetensorsFile::open(file);
  const auto found = opened.metadata().find(state_key);
  if (found == opened.metadata().end()) throw Error("the file is not a state of a training run").at(file.string()).hint("delete it and start the stage again");
  return parse_json(found->second, file.string());
}

void load_state(const std::filesystem::path& file, const NamedTensors& tensors) {
  const SafetensorsFile opened = SafetensorsFile::open(file);
  at::NoGradGuard no_grad;
  Problems problems;
  for (const auto& [name, tensor] : tensors) {
    const TensorData* data = opened.find(name);
    if (!data || data->shape != tensor.sizes().vec() || data->dtype != state_dtype(tensor.scalar_type())) {
      problems.add(Error(str("tensor \"", name, "\" is ", data ? "of another shape" : "missing")).at(file.string()).allowed(shape_text(tensor.sizes().vec())).given(data ? shape_text(data->shape) : "nothing"));
    }
  }
  if (opened.tensors().size() != tensors.size() && problems.empty()) problems.add(Error(str(opened.tensors().size(), " tensors in the file, ", tensors.size(), " in the run")).at(file.string()));
  problems.throw_if_any("the saved state does not fit this run; start the stage without --resume");
  for (const auto& [name, tensor] : tensors) {
    at::Tensor target = tensor.detach();  // shares memory
    target.copy_(as_tensor(*opened.find(name)));
  }
}

void check_identity(const Json& saved, const Json& wanted, const std::filesystem::path& file) {
  std::vector<std::string> differences;
  state_differences(saved, wanted, "", differences);
  if (differences.empty()) return;
  throw Error("the saved state belongs to another run: " + join(differences, "; ")).at(file.string()).allowed("the same options, data, model and seed").hint("undo the change, or start the stage without --resume");
}

}  // namespace kompakt
