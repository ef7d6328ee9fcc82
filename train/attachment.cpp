#include "train/attachment.h"

#include <ATen/ATen.h>

#include <set>

#include "core/log.h"
#include "core/text.h"
#include "train/step_batches.h"

namespace kompakt {

at::Tensor used_ids(const TaskData& data) {
  if (data.kind != TaskData::Kind::classification) return {};
  std::set<std::int64_t> ids = {padding_id(data)};
  for (const auto* set : {&data.train, &data.dev}) {
    for (const auto& text : set->ids) ids.insert(text.begin(), text.end());
  }
  const std::vector<std::int64_t> sorted(ids.begin(), ids.end());
  return at::tensor(at::ArrayRef<std::int64_t>(sorted), at::kLong);
}

Attachment::Attachment(Transformer& model, const std::vector<std::shared_ptr<Constraint>>& constraints, const at::Tensor& used_ids, double dropout, bool recompute)
    : model_(model), constraints_(constraints), dropout_(model.dropout) {
  if (used_ids.defined()) model_.tokens.compact(used_ids);
  model_.dropout = dropout;
  model_.recompute_blocks = recompute;
  try {
    for (; attached_ < constraints_.size(); ++attached_) constraints_[attached_]->attach(model_);
  } catch (...) {
    undo();
    throw;
  }
}

Attachment::~Attachment() {
  try {
    undo();
  } catch (const std::exception& error) {
    log_warning(str("leaving the training loop: ", error.what()));
  }
}

void Attachment::undo() {
  if (undone_) return;
  undone_ = true;
  while (attached_ > 0) constraints_[--attached_]->detach(model_);
  for (const NamedParameter& parameter : model_.parameters()) parameter.value->mutable_grad() = at::Tensor();
  model_.requires_grad(false);
  if (model_.tokens.compacted()) model_.tokens.expand();
  model_.dropout = dropout_;
  model_.recompute_blocks = false;
}

}  // namespace kompakt
