// A frozen model whose weights are in memory only while somebody needs them. Its shape, its device and its fingerprint are known
// without: whoever finds all outputs of the teacher in a cache never loads it.
#pragma once

#include <c10/core/Device.h>

#include <concepts>
#include <functional>
#include <memory>
#include <string>

#include "model/transformer.h"

namespace kompakt {

// A handle: copies stand for the same model, and what one of them loads or releases, all have.
class FrozenTeacher {
 public:
  FrozenTeacher() = default;  // none
  // `load` gives the model on `device`, as often as it is asked for; `fingerprint` tells its weights apart from others (model/checkpoint.h).
  FrozenTeacher(ModelConfig config, c10::Device device, std::function<std::shared_ptr<const Transformer>()> load, std::function<std::string()> fingerprint);
  // A model that is in memory anyway; null: none.
  FrozenTeacher(std::shared_ptr<const Transformer> model);
  template <class Model>
    requires(!std::same_as<Model, std::shared_ptr<const Transformer>> && std::convertible_to<Model, std::shared_ptr<const Transformer>>)
  FrozenTeacher(Model model) : FrozenTeacher(std::shared_ptr<const Transformer>(std::move(model))) {}

  explicit operator bool() const { return state_ != nullptr; }
  const ModelConfig& config() const;
  c10::Device device() const;
  std::string fingerprint() const;     // computed once
  std::shared_ptr<const Transformer> model() const;  // loads it when it is not there
  bool loaded() const;
  void release() const;  // out of memory, as far as this handle and its copies hold it; nothing for a model that came without `load`

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace kompakt
