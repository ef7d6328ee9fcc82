// A model whose weights lie in a file and are in memory only while somebody uses them: for work that goes block by block.
// Everything works on it as on any other; training would write the file over and over.
#pragma once

#include <filesystem>
#include <memory>

#include "model/transformer.h"

namespace kompakt {

// As load_model on the CPU. `folder` holds the file, which has no name and is gone with the last weight.
std::unique_ptr<Transformer> load_model_paged(const std::filesystem::path& path, const std::filesystem::path& folder);
bool is_paged(const at::Tensor& weight);
void release_pages(const at::Tensor& weight);  // out of memory until it is touched; nothing for other tensors
void release_pages(const Transformer& model);

}  // namespace kompakt
