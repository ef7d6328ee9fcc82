// The autograd function that runs another function twice.
#include "model/recompute.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <memory>

namespace kompakt {
namespace {

using RecomputedFunction = std::function<at::Tensor(const at::Tensor&)>;

// What autocast was like, put back for the second run. Casts of weights are not kept: the forward pass has dropped its own.
struct RecomputeAutocast {
  explicit RecomputeAutocast(at::DeviceType device) : type(device), enabled(at::autocast::is_autocast_enabled(device)), dtype(at::autocast::get_autocast_dtype(device)) {}
  at::DeviceType type;
  bool enabled;
  at::ScalarType dtype;
};
class RecomputeGuard {
 public:
  explicit RecomputeGuard(const RecomputeAutocast& state) : before_(state.type), cache_(at::autocast::is_autocast_cache_enabled()) {
    at::autocast::set_autocast_cache_enabled(false);
    set(state);
  }
  ~RecomputeGuard() {
    set(before_);
    at::autocast::set_autocast_cache_enabled(cache_);
  }
  RecomputeGuard(const RecomputeGuard&) = delete;
  RecomputeGuard& operator=(const RecomputeGuard&) = delete;

 private:
  static void set(const RecomputeAutocast& state) {
    at::autocast::set_autocast_enabled(state.type, state.enabled);
    at::autocast::set_autocast_dtype(state.type, state.dtype);
  }
  RecomputeAutocast before_;
  bool cache_;
};

struct RecomputeCall : torch::CustomClassHolder {
  RecomputeCall(RecomputedFunction f, RecomputeAutocast a) : function(std::move(f)), autocast(a) {}
  RecomputedFunction function;
  RecomputeAutocast autocast;
};

struct RecomputeFunction : torch::autograd::Function<RecomputeFunction> {
  // `trigger` requires a gradient even where x does not, so that the result does.
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& trigger, const c10::intrusive_ptr<RecomputeCall>& call) {
    (void)trigger;
    context->save_for_backward({x});
    context->saved_data["call"] = c10::IValue::make_capsule(call);
    return call->function(x);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context, torch::autograd::variable_list gradients) {
    const auto call = c10::static_intrusive_pointer_cast<RecomputeCall>(context->saved_data["call"].toCapsule());
    const at::Tensor saved = context->get_saved_variables().at(0);
    const bool to_x = saved.requires_grad();
    const at::Tensor x = saved.detach().requires_grad_(to_x);
    at::Tensor y;
    {
      const at::AutoGradMode on(true);
      const RecomputeGuard autocast(call->autocast);
      y = call->function(x);
    }
    torch::autograd::backward({y}, {gradients.at(0)});
    return {to_x ? x.grad() : at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor recompute(const RecomputedFunction& function, const at::Tensor& x) {
  if (!at::GradMode::is_enabled()) return function(x);
  const at::Tensor trigger = at::empty({0}, x.options()).requires_grad_();
  return RecomputeFunction::apply(x, trigger, c10::make_intrusive<RecomputeCall>(function, RecomputeAutocast(x.device().type())));
}

}  // namespace kompakt
