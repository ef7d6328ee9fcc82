#include "model/paged.h"

#include <ATen/ATen.h>

#include "core/paging.h"
#include "model/checkpoint_source.h"

namespace kompakt {

std::unique_ptr<Transformer> load_model_paged(const std::filesystem::path& path, const std::filesystem::path& folder) {
  auto [config, source] = open_checkpoint(path);
  const auto room = [](std::int64_t elements) {
    const std::size_t page = page_bytes(), bytes = static_cast<std::size_t>(elements) * sizeof(float);
    return (bytes + page - 1) / page * page;  // every weight begins a page: what one lets go touches no other
  };
  std::size_t total = 0;
  const Transformer shape(config, 0, c10::Device(c10::kMeta));
  for (const auto& [name, value] : shape.parameters()) total += room(value.numel());
  const auto memory = std::make_shared<PagedMemory>(folder, total);
  std::size_t used = 0;
  return build_from_source(std::move(config), source, c10::Device(c10::kCPU), [&](const std::string&, const at::Tensor& value) {
    at::Tensor out = at::from_blob(memory->bytes().data() + used, value.sizes(), [memory](void*) {}, at::TensorOptions().dtype(at::kFloat));
    used += room(value.numel());
    out.copy_(value);
    release_pages(out);
    return out;
  });
}

bool is_paged(const at::Tensor& weight) { return weight.defined() && weight.device().is_cpu() && is_paged(weight.const_data_ptr()); }

void release_pages(const at::Tensor& weight) {
  if (weight.defined() && weight.device().is_cpu() && weight.is_contiguous()) release_pages(weight.const_data_ptr(), weight.nbytes());
}

void release_pages(const Transformer& model) {
  for (const auto& [name, value] : model.parameters()) release_pages(value);
}

}  // namespace kompakt
