// Named intermediate values of a forward pass. LibTorch has no forward hooks; the transformer offers its values to a sink.
//
// Names ({i} = layer from 0): "embedding" [B,T,d], "layer.{i}.input" [B,T,d], "layer.{i}.output" [B,T,d],
// "layer.{i}.query" [B,H,T,hd], "layer.{i}.key" and "layer.{i}.value" [B,Hkv,T,hd] (before rotary),
// "layer.{i}.cached_key" [B,Hkv,T,hd] (after rotary, as a key/value cache holds it, before any rounding),
// "layer.{i}.context" [B,T,H*hd] (input of the output projection), "layer.{i}.ffn" [B,T,f] (input of the down projection),
// "final" [B,T,d] (after the last norm), "pooled" [B,d]; for every Linear "input:<name>" [.., in], "output:<name>" [.., out].
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <set>
#include <string>

namespace kompakt {

class TapSink {
 public:
  virtual ~TapSink() = default;
  virtual bool wants(const std::string& name) const = 0;
  // The tensor that flows on: retain_grad() on it gives its gradient after backward.
  virtual void put(const std::string& name, const at::Tensor& value) = 0;
};

// Keeps what was asked for.
class TapMap final : public TapSink {
 public:
  TapMap() = default;
  explicit TapMap(std::set<std::string> wanted) : wanted_(std::move(wanted)) {}
  void request(const std::string& name) { wanted_.insert(name); }
  bool empty() const { return wanted_.empty(); }
  const std::set<std::string>& wanted() const { return wanted_; }
  bool wants(const std::string& name) const override { return wanted_.count(name) > 0; }
  void put(const std::string& name, const at::Tensor& value) override { values_[name] = value; }
  const at::Tensor& at(const std::string& name) const { return values_.at(name); }
  const std::map<std::string, at::Tensor>& values() const { return values_; }
  void clear() { values_.clear(); }

 private:
  std::set<std::string> wanted_;
  std::map<std::string, at::Tensor> values_;
};

}  // namespace kompakt
