// Taking blocks out of a transformer.
#include "model/depth.h"

#include <stdexcept>

#include "core/text.h"

namespace kompakt {
namespace {

// The names of a block's parts carry its number: those of the block that stood at the new place are the right ones.
void depth_rename(Block& block, const Block& place) {
  const auto take = [](auto& part, const auto& from) { part.name = from.name; };
  take(block.attention_norm, place.attention_norm);
  take(block.mlp_norm, place.mlp_norm);
  take(block.post_attention_norm, place.post_attention_norm);
  take(block.post_mlp_norm, place.post_mlp_norm);
  take(block.attention.query, place.attention.query);
  take(block.attention.key, place.attention.key);
  take(block.attention.value, place.attention.value);
  take(block.attention.output, place.attention.output);
  take(block.attention.query_norm, place.attention.query_norm);
  take(block.attention.key_norm, place.attention.key_norm);
  take(block.attention.sub_norm, place.attention.sub_norm);
  take(block.mlp.sub_norm, place.mlp.sub_norm);
  take(block.mlp.gate, place.mlp.gate);
  take(block.mlp.up, place.mlp.up);
  take(block.mlp.down, place.mlp.down);
}

void depth_pick(std::vector<std::int64_t>& list, const std::vector<std::int64_t>& keep) {
  if (list.empty()) return;
  std::vector<std::int64_t> picked;
  for (const std::int64_t i : keep) picked.push_back(list.at(static_cast<std::size_t>(i)));
  list = std::move(picked);
}

}  // namespace

void keep_blocks(Transformer& model, const std::vector<std::int64_t>& keep) {
  ModelConfig& config = model.config();
  if (keep.empty()) throw std::logic_error("keep_blocks: no layer would stay");
  for (std::size_t i = 0; i < keep.size(); ++i)
    if (keep[i] < 0 || keep[i] >= config.layers || (i > 0 && keep[i] <= keep[i - 1])) throw std::logic_error(str("keep_blocks: layer ", keep[i], " of ", config.layers));
  std::vector<Block> blocks;
  for (std::size_t i = 0; i < keep.size(); ++i) {
    blocks.push_back(model.blocks.at(static_cast<std::size_t>(keep[i])));
    depth_rename(blocks.back(), model.blocks[i]);
  }
  model.blocks = std::move(blocks);
  depth_pick(config.sliding_window, keep);
  depth_pick(config.no_rope, keep);
  config.layers = static_cast<std::int64_t>(keep.size());
}

}  // namespace kompakt
