#include "train/mask.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cstring>
#include <stdexcept>

#include "core/error.h"
#include "core/hash.h"
#include "core/text.h"
#include "formats/hdf5_file.h"

namespace kompakt {
namespace {

constexpr const char* mask_file_name = "masks.h5";

// [N,K] bool -> rows of whole bytes.
std::vector<std::byte> mask_bits(const at::Tensor& mask) {
  const at::Tensor dense = mask.to(at::kCPU, at::kBool).contiguous();
  const std::int64_t rows = dense.size(0), columns = dense.size(1), width = (columns + 7) / 8;
  std::vector<std::byte> out(static_cast<std::size_t>(rows * width), std::byte{0});
  const bool* values = dense.const_data_ptr<bool>();
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t k = 0; k < columns; ++k)
      if (values[r * columns + k]) out[static_cast<std::size_t>(r * width + k / 8)] |= std::byte{1} << (k % 8);
  return out;
}

class MaskConstraint final : public Constraint {
 public:
  explicit MaskConstraint(WeightMasks masks) : masks_(std::move(masks)) {
    Sha256 hash;
    for (const auto& [name, mask] : masks_) hash.update(name).update(std::span<const std::byte>(mask_bits(mask)));
    name_ = "mask " + hash.hex().substr(0, 16);
  }
  std::string name() const override { return name_; }  // part of a saved state's identity
  void attach(Transformer& model) override {
    apply_masks(model, masks_);
    zeros_.clear();
    for (const auto& [name, mask] : masks_) zeros_.emplace_back(name, mask.to(model.device()).logical_not());
  }
  void detach(Transformer& model) override {
    zero(model);
    zeros_.clear();
  }
  void after_step(Transformer& model) override { zero(model); }

 private:
  void zero(Transformer& model) const {
    const at::NoGradGuard no_grad;
    for (const auto& [name, zeros] : zeros_) model.find_linear(name)->weight.masked_fill_(zeros, 0);
  }
  WeightMasks masks_;
  std::string name_;
  std::vector<std::pair<std::string, at::Tensor>> zeros_;  // true = set to zero, on the model's device
};

}  // namespace

std::shared_ptr<Constraint> mask_constraint(WeightMasks masks) { return std::make_shared<MaskConstraint>(std::move(masks)); }

void apply_masks(Transformer& model, const WeightMasks& masks) {
  const at::NoGradGuard no_grad;
  for (const auto& [name, mask] : masks) {
    Linear* linear = model.find_linear(name);
    if (!linear) throw std::logic_error(str("mask: the model has no linear ", name));
    if (linear->weight.sizes() != mask.sizes()) throw std::logic_error(str("mask: ", name, " has another shape than its mask"));
    // Multiplying would keep the sign of a zero, and a NaN.
    linear->weight.masked_fill_(mask.to(linear->weight.device()).logical_not(), 0);
  }
}

void save_masks(const WeightMasks& masks, const std::filesystem::path& folder) {
  if (masks.empty()) return;
  Hdf5File file(folder / mask_file_name, Hdf5File::Mode::create);
  for (const auto& [name, mask] : masks) {
    file.write("bits/" + name, make_tensor(name, DType::u8, {mask.size(0), (mask.size(1) + 7) / 8}, mask_bits(mask)));
    const std::int64_t columns = mask.size(1);
    std::vector<std::byte> bytes(sizeof columns);
    std::memcpy(bytes.data(), &columns, sizeof columns);
    file.write("columns/" + name, make_tensor(name, DType::i64, {1}, std::move(bytes)));
  }
  file.close();
}

WeightMasks load_masks(const std::filesystem::path& folder) {
  WeightMasks masks;
  const std::filesystem::path path = folder / mask_file_name;
  if (!std::filesystem::exists(path)) return masks;
  const Hdf5File file(path, Hdf5File::Mode::read);
  for (const std::string& dataset : file.list("bits")) {
    const std::string name = dataset.substr(std::string_view("bits/").size());
    const TensorData bits = file.read(dataset), width = file.read("columns/" + name);
    std::int64_t columns = 0;
    if (width.dtype == DType::i64 && width.elements() == 1) std::memcpy(&columns, width.bytes.data(), sizeof columns);
    if (bits.dtype != DType::u8 || bits.shape.size() != 2 || columns < 1 || bits.shape[1] != (columns + 7) / 8)
      throw Error("the mask \"" + name + "\" has an impossible shape").at(path.string()).hint("the file is damaged: run the prune stage again");
    at::Tensor mask = at::empty({bits.shape[0], columns}, at::kBool);
    bool* values = mask.mutable_data_ptr<bool>();
    for (std::int64_t r = 0; r < bits.shape[0]; ++r)
      for (std::int64_t k = 0; k < columns; ++k)
        values[r * columns + k] = std::to_integer<int>(bits.bytes[static_cast<std::size_t>(r * bits.shape[1] + k / 8)] >> (k % 8) & std::byte{1}) != 0;
    masks[name] = std::move(mask);
  }
  return masks;
}

void check_masks_fit(const WeightMasks& masks, Transformer& model, const std::filesystem::path& folder) {
  if (masks.empty()) return;
  std::map<std::string, at::IntArrayRef> shapes;
  for (const Linear* linear : model.linears()) shapes[linear->name] = linear->weight.sizes();
  for (const auto& [name, mask] : masks)
    if (const auto found = shapes.find(name); found == shapes.end() || found->second != mask.sizes())
      throw Error("the mask \"" + name + "\" fits no linear layer of the model").at((folder / mask_file_name).string()).given(str("[", mask.size(0), ", ", mask.size(1), "]"))
          .allowed(found == shapes.end() ? str("names such as ", shapes.begin()->first) : str("[", found->second[0], ", ", found->second[1], "]")).hint("the file belongs to another model: delete it to go on without masks");
}

void refuse_masks(const StageContext& context, const char* what) {
  if (context.masks.empty()) return;
  throw Error(str(what, ", and the masks of an earlier prune stage are made for the present shapes")).at(context.title).hint("put prune: {unstructured: ...} behind the stages that change shapes");
}

}  // namespace kompakt
