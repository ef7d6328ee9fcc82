// What training changes about a model besides its weights.
#pragma once

#include <memory>
#include <vector>

#include "train/constraint.h"
#include "train/context.h"

namespace kompakt {

// Sorted unique ids that training and scoring can meet, padding included; undefined for text, which may meet all.
at::Tensor used_ids(const TaskData& data);

// Installed by the constructor, undone in reverse order on every way out.
class Attachment {
 public:
  // `used_ids`: rows of the token embedding that training meets (the table is compacted to them), or undefined.
  Attachment(Transformer& model, const std::vector<std::shared_ptr<Constraint>>& constraints, const at::Tensor& used_ids, double dropout, bool recompute);
  ~Attachment();
  Attachment(const Attachment&) = delete;
  Attachment& operator=(const Attachment&) = delete;
  void undo();

 private:
  Transformer& model_;
  const std::vector<std::shared_ptr<Constraint>>& constraints_;
  double dropout_;
  std::size_t attached_ = 0;
  bool undone_ = false;
};

}  // namespace kompakt
