// `kompakt doctor`: what this build stands on, what the machine has, and a self test of the kernels on each device present.
#include <ATen/ATen.h>

#include <cmath>
#include <new>

#include "core/files.h"
#include "core/random.h"
#include "core/system.h"
#include "core/text.h"
#include "distill/fused_linear.h"
#include "distill/losses.h"
#include "formats/hdf5_file.h"
#include "model/transformer.h"
#include "pipeline/describe.h"
#include "pipeline/device.h"
#include "pipeline/doctor_kernels.h"
#include "pipeline/plan.h"
#include "pipeline/store.h"
#include "pipeline/version.h"
#include "quantize/grids.h"

namespace kompakt {
namespace {

Json doctor_check(const std::string& name, bool passed, const std::string& note) { return Json{{"check", name}, {"passed", passed}, {"note", note}}; }

// Every grid: what is packed and unpacked decodes to the same values, and the error on normal numbers is within the row's bound.
Json doctor_grids() {
  at::Tensor w = at::empty({8, 512}, at::kFloat);
  const CounterRandom random(7, "doctor");
  for (std::int64_t i = 0; i < w.numel(); ++i) w.data_ptr<float>()[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)));
  std::vector<std::string> bad;
  for (const Grid& grid : grids()) {
    const GridSpec spec{&grid, grid.default_group};
    const Quantized q = encode(spec, w);
    Quantized back = q;
    back.codes = grid.unpack(grid.pack(q.codes), w.size(0), w.size(1));
    const at::Tensor decoded = decode(spec, q);
    const double error = ((decoded - w).square().sum() / w.square().sum()).item<double>();
    if (!at::equal(decoded, decode(spec, back)) || !(error <= grid.gaussian_error)) bad.emplace_back(grid.name);
  }
  return doctor_check(str(grids().size(), " grids: pack, unpack, error bound"), bad.empty(), bad.empty() ? "cpu" : "wrong: " + join(bad, ", "));
}

Json doctor_losses(const c10::Device device) {
  const at::Tensor student = at::randn({5, 17}, at::kFloat).to(device), teacher = at::randn({5, 17}, at::kFloat).to(device);
  std::vector<std::string> bad;
  for (const LogitLoss& loss : logit_losses()) {
    const double same = logit_loss(loss, teacher, teacher).item<double>();
    const double other = logit_loss(loss, student, teacher).item<double>(), reference = logit_loss(loss, student.cpu().to(at::kDouble), teacher.cpu().to(at::kDouble)).item<double>();
    if (std::abs(same) > 1e-5 || std::abs(other - reference) > 1e-4 * std::max(1.0, std::abs(reference))) bad.emplace_back(loss.name);
  }
  return doctor_check(str(logit_losses().size(), " losses against double precision"), bad.empty(), bad.empty() ? device.str() : "wrong: " + join(bad, ", "));
}

// Output projection and loss in one on the device, where kernels take it when they are compiled in, against double precision on the CPU:
// several chunks of tokens, an odd vocabulary.
Json doctor_fused(const c10::Device device) {
  at::manual_seed(7);  // some losses jump where ranks change: the same numbers every time
  const at::Tensor hidden = at::randn({37, 24}, at::kFloat), weight = at::randn({301, 24}, at::kFloat), other = at::randn({37, 16}, at::kFloat), head = at::randn({301, 16}, at::kFloat);
  std::vector<std::string> bad;
  for (const LogitLoss& loss : logit_losses()) {
    LogitLossOptions options;
    options.temperature = 2;
    const auto run = [&](const c10::Device where, at::ScalarType type) {
      const auto leaf = [&](const at::Tensor& x) { return x.to(where, type, /*non_blocking=*/false, /*copy=*/true).requires_grad_(); };
      const at::Tensor h = leaf(hidden), w = leaf(weight);
      const at::Tensor value = fused_linear_loss(loss, h, w, {}, {{}, other.to(where, type), head.to(where, type), {}, nullptr}, options, 16);
      value.backward();
      return std::vector<at::Tensor>{value.detach().cpu().to(at::kDouble), h.grad().cpu().to(at::kDouble), w.grad().cpu().to(at::kDouble)};
    };
    const std::vector<at::Tensor> found = run(device, at::kFloat), expected = run(c10::Device(c10::kCPU), at::kDouble);
    for (std::size_t i = 0; i < found.size(); ++i)
      if (!((found[i] - expected[i]).norm() <= 5e-3 * expected[i].norm() + 1e-7).item<bool>()) {  // TF32 products, where they are switched on, keep 10 bits
        bad.emplace_back(loss.name);
        break;
      }
  }
  return doctor_check(str(logit_losses().size(), " losses with the output projection, against the CPU"), bad.empty(), bad.empty() ? device.str() : "wrong: " + join(bad, ", "));
}

// Logits and gradients of small models, forward and backward in float32, against the CPU.
Json doctor_models(const c10::Device device) {
  const Json decoder = {{"model_type", "llama"}, {"hidden_size", 64}, {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"intermediate_size", 96},
                        {"vocab_size", 131}, {"max_position_embeddings", 64}, {"hidden_act", "silu"}, {"rms_norm_eps", 1e-5}, {"tie_word_embeddings", true}};
  const Json encoder = {{"model_type", "bert"}, {"hidden_size", 64}, {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"intermediate_size", 96},
                        {"vocab_size", 131}, {"max_position_embeddings", 64}, {"type_vocab_size", 2}, {"hidden_act", "gelu"}, {"pad_token_id", 0}};
  std::vector<std::string> bad;
  for (const Json& shape : {decoder, encoder}) {
    const std::string name = shape.at("model_type").get<std::string>();
    std::vector<at::Tensor> results[2];
    for (const c10::Device where : {c10::Device(c10::kCPU), device}) {
      Transformer model(config_from_json(shape, "doctor"), 7);
      if (name == "bert") model.add_classifier({"a", "b", "c"}, "mean");
      model.to(where);
      model.requires_grad(true);
      ModelInput input;
      input.ids = (at::arange(3 * 40, at::kLong) * 37 % 131).reshape({3, 40}).to(where);
      input.lengths = at::tensor({40, 23, 31}, at::kLong);
      const at::Tensor logits = model.forward(input).to(at::kFloat);
      logits.square().mean().backward();
      std::vector<at::Tensor>& out = results[where.is_cpu() ? 0 : 1];
      out.push_back(logits.detach().cpu());
      for (const NamedParameter& parameter : model.parameters())
        if (parameter.value->grad().defined()) out.push_back(parameter.value->grad().cpu());
    }
    bool same = results[0].size() == results[1].size();
    for (std::size_t i = 0; same && i < results[0].size(); ++i) {
      const at::Tensor reference = results[0][i].to(at::kDouble);
      same = ((results[1][i].to(at::kDouble) - reference).norm() <= 1e-3 * reference.norm() + 1e-7).item<bool>();  // TF32 products, where they are switched on, keep 10 bits
    }
    if (!same) bad.push_back(name);
  }
  return doctor_check("models, forward and backward, against the CPU", bad.empty(), bad.empty() ? device.str() : "wrong: " + join(bad, ", "));
}

}  // namespace

std::string version_text() {
  return str("kompakt ", kompakt_version, " (stages revision ", stage_revision, ")\ntorch ", torch_version(), "\nHDF5 ", hdf5_version(), "\nCUDA ", cuda_available() ? "available" : "not available", "\n");
}

std::pair<std::string, ExitCode> describe_failure(const std::exception& error) {
  if (const auto* torch_error = dynamic_cast<const c10::Error*>(&error)) {
    const std::string text = torch_error->what_without_backtrace();
    if (text.find("out of memory") != std::string::npos || text.find("can't allocate memory") != std::string::npos || text.find("not enough memory") != std::string::npos)
      return {"out of memory\n  to do:   a smaller batch_size, or `kompakt plan` to see what a recipe needs", ExitCode::resource};
    return {str("this is a bug in kompakt: ", text), ExitCode::bug};
  }
  return {str("this is a bug in kompakt: ", error.what()), ExitCode::bug};
}

Json doctor() {
  Json out{{"version", kompakt_version}, {"torch", torch_version()}, {"processor", processor_name()}, {"cores", core_count()}, {"memory_bytes", physical_memory_bytes()}};
  const std::filesystem::path store = store_folder("", ".");
  std::error_code code;
  std::filesystem::path existing = store;
  while (!existing.empty() && !std::filesystem::exists(existing, code)) existing = existing.parent_path();
  out["store"] = store.string();
  out["free_disk_bytes"] = free_disk_bytes(existing);
  out["gigaflops_float32"] = measure_gigaflops();
  Json devices = Json::array({"cpu"});
  if (cuda_available()) devices.push_back("cuda");
  out["devices"] = devices;
  Json checks = Json::array();
  checks.push_back(doctor_grids());
  checks.push_back(doctor_losses(c10::Device(c10::kCPU)));
  checks.push_back(doctor_fused(c10::Device(c10::kCPU)));
  if (cuda_available()) {
    const c10::Device gpu(c10::kCUDA, 0);
    checks.push_back(doctor_losses(gpu));
    checks.push_back(doctor_fused(gpu));
    checks.push_back(doctor_models(gpu));
  }
  for (Json& check : doctor_kernels()) checks.push_back(std::move(check));
  bool healthy = true;
  for (const Json& check : checks) healthy = healthy && (check.at("passed").is_null() || check.at("passed").get<bool>());
  out["checks"] = checks;
  out["healthy"] = healthy;
  return out;
}

std::string doctor_text(const Json& f) {
  std::string out = str("kompakt ", f.at("version").get<std::string>(), " with torch ", f.at("torch").get<std::string>(), "\n", f.at("processor").get<std::string>(), ", ", f.at("cores").get<int>(), " cores, ",
                        human_bytes(f.at("memory_bytes").get<double>()), " memory, ", fixed(f.at("gigaflops_float32").get<double>(), 0), " GFLOP/s in float32\nstore ", f.at("store").get<std::string>(), ", ",
                        human_bytes(f.at("free_disk_bytes").get<double>()), " free\n");
  for (const Json& check : f.at("checks")) {
    const Json& passed = check.at("passed");
    out += str(passed.is_null() ? "  not run  " : passed.get<bool>() ? "  ok       " : "  FAILED   ", check.at("check").get<std::string>(), "  (", check.at("note").get<std::string>(), ")\n");
  }
  return out;
}

}  // namespace kompakt
