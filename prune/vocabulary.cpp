// Vocabulary pruning: which ids stay, and the embedding, head and config cut to them. The tokenizer cuts itself.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <stdexcept>

#include "core/error.h"
#include "core/text.h"
#include "prune/stage.h"

namespace kompakt {
namespace {

// New id of an old one, or -1.
std::int64_t vocabulary_new_id(const std::vector<std::int64_t>& kept, std::int64_t id) {
  const auto found = std::lower_bound(kept.begin(), kept.end(), id);
  return found != kept.end() && *found == id ? found - kept.begin() : -1;
}

// config.json keeps ids under keys of its own, single or as lists (several end-of-text tokens): none may point to an old row.
void vocabulary_rewrite_source(Json& source, const std::vector<std::int64_t>& kept) {
  if (!source.is_object()) return;
  for (auto& [key, value] : source.items()) {
    if (!ends_with(key, "_token_id")) continue;
    if (value.is_number_integer()) {
      const std::int64_t id = vocabulary_new_id(kept, value.get<std::int64_t>());
      value = id < 0 ? Json() : Json(id);
    } else if (value.is_array()) {
      Json list = Json::array();
      for (const Json& item : value) {
        const std::int64_t id = item.is_number_integer() ? vocabulary_new_id(kept, item.get<std::int64_t>()) : -1;
        if (id >= 0) list.push_back(id);
      }
      value = list.empty() ? Json() : list;
    }
  }
}

}  // namespace

std::vector<std::int64_t> kept_vocabulary(const Tokenizer& tokenizer, const std::vector<std::vector<std::int64_t>>& texts, const VocabularyOptions& options) {
  const std::int64_t size = tokenizer.vocab_size();
  if (options.first_ids < 0 || options.first_ids > size) throw Error(str("first_ids asks for more tokens than the vocabulary has")).at("vocabulary.first_ids").given(str(options.first_ids)).allowed(str("0 to ", size));
  std::vector<bool> keep(static_cast<std::size_t>(size), false);
  const auto add = [&](std::int64_t id, const char* what) {
    if (id < 0 || id >= size) throw std::logic_error(str("kept_vocabulary: ", what, " holds id ", id, " of a vocabulary of ", size));
    keep[static_cast<std::size_t>(id)] = true;
  };
  for (std::int64_t id = 0; id < options.first_ids; ++id) add(id, "first_ids");
  for (const auto& text : texts)
    for (const std::int64_t id : text) add(id, "a text");
  for (const std::int64_t id : tokenizer.indispensable()) add(id, "the indispensable set");
  const SpecialTokens& special = tokenizer.special();
  for (const std::int64_t id : {special.bos, special.eos, special.pad, special.unk, special.cls, special.sep, special.mask})
    if (id >= 0) add(id, "a special token");
  // Real pieces, not empty rows: what a vocabulary is filled up with can be of use.
  auto missing = std::count(keep.begin(), keep.end(), true) % options.multiple_of;
  if (missing > 0) missing = options.multiple_of - missing;
  for (std::int64_t id = 0; id < size && missing > 0; ++id)
    if (!keep[static_cast<std::size_t>(id)]) keep[static_cast<std::size_t>(id)] = true, --missing;
  std::vector<std::int64_t> kept;
  for (std::int64_t id = 0; id < size; ++id)
    if (keep[static_cast<std::size_t>(id)]) kept.push_back(id);
  if (kept.empty()) throw Error("no token of the vocabulary would stay").at("vocabulary").hint("give training texts, or first_ids");
  return kept;
}

void restrict_vocabulary(Transformer& model, const std::vector<std::int64_t>& kept) {
  const at::NoGradGuard no_grad;
  ModelConfig& config = model.config();
  if (kept.empty()) throw std::logic_error("restrict_vocabulary: nothing is kept");
  for (std::size_t i = 0; i < kept.size(); ++i)
    if (kept[i] < 0 || kept[i] >= config.vocab || (i > 0 && kept[i] <= kept[i - 1])) throw std::logic_error(str("restrict_vocabulary: id ", kept[i], " is out of order or of range"));
  if (model.tokens.compacted()) throw std::logic_error("restrict_vocabulary: the embedding is compacted for training");
  if (model.tokens.transform || model.lm_head.transform) throw std::logic_error("restrict_vocabulary: a weight transform is attached");
  const at::Tensor rows = at::tensor(at::ArrayRef<std::int64_t>(kept), at::kLong).to(model.device());
  model.tokens.weight = model.tokens.weight.detach().index_select(0, rows);
  if (model.lm_head.weight.defined()) {
    model.lm_head.weight = model.lm_head.weight.detach().index_select(0, rows);
    if (model.lm_head.bias.defined()) model.lm_head.bias = model.lm_head.bias.detach().index_select(0, rows);
  }
  vocabulary_rewrite_source(config.source, kept);
  for (std::int64_t* id : {&config.bos, &config.eos, &config.pad})
    if (*id >= 0) *id = vocabulary_new_id(kept, *id);
  config.vocab = static_cast<std::int64_t>(kept.size());
}

void restrict_positions(Transformer& model, std::int64_t count) {
  const at::NoGradGuard no_grad;
  if (count == 0) return;
  ModelConfig& config = model.config();
  if (!model.positions.defined()) throw Error("this model has no learned position embeddings that could be cut").at("vocabulary.max_positions").given(str(count)).hint("remove max_positions: rotary positions take no space");
  if (count < 1 || count > config.max_positions) throw Error(str("the model has ", config.max_positions, " positions")).at("vocabulary.max_positions").given(str(count)).allowed(str("1 to ", config.max_positions));
  model.positions = model.positions.detach().narrow(0, 0, count).clone();
  config.max_positions = count;
}

}  // namespace kompakt
