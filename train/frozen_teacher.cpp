#include "train/frozen_teacher.h"

#include <stdexcept>
#include <utility>

#include "model/checkpoint.h"

namespace kompakt {

struct FrozenTeacher::State {
  ModelConfig config;
  c10::Device device;
  std::function<std::shared_ptr<const Transformer>()> load;  // empty: the model is there for good
  std::function<std::string()> compute_fingerprint;
  std::shared_ptr<const Transformer> model;
  std::string fingerprint;
};

FrozenTeacher::FrozenTeacher(ModelConfig config, c10::Device device, std::function<std::shared_ptr<const Transformer>()> load, std::function<std::string()> fingerprint)
    : state_(std::make_shared<State>(State{std::move(config), device, std::move(load), std::move(fingerprint), nullptr, {}})) {}

FrozenTeacher::FrozenTeacher(std::shared_ptr<const Transformer> model) {
  if (model) state_ = std::make_shared<State>(State{model->config(), model->device(), {}, {}, model, {}});
}

const ModelConfig& FrozenTeacher::config() const { return state_->config; }
c10::Device FrozenTeacher::device() const { return state_->device; }
bool FrozenTeacher::loaded() const { return state_->model != nullptr; }

std::string FrozenTeacher::fingerprint() const {
  if (state_->fingerprint.empty()) state_->fingerprint = state_->compute_fingerprint ? state_->compute_fingerprint() : kompakt::fingerprint(*state_->model);
  return state_->fingerprint;
}

std::shared_ptr<const Transformer> FrozenTeacher::model() const {
  if (!state_->model) state_->model = state_->load();
  if (!state_->model) throw std::logic_error("FrozenTeacher: nothing was loaded");
  return state_->model;
}

void FrozenTeacher::release() const {
  if (state_ && state_->load) state_->model.reset();
}

}  // namespace kompakt
