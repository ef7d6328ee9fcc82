// The activations of a calibration set in front of one point of the model: one tensor a batch, in memory or in a file.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <filesystem>
#include <memory>
#include <vector>

namespace kompakt {

class Activations {
 public:
  // `folder`: where the file lies, without a name and gone with the object; empty = in memory.
  explicit Activations(std::filesystem::path folder = {});
  ~Activations();
  Activations(Activations&&) noexcept;
  Activations& operator=(Activations&&) noexcept;

  void resize(std::size_t batches);  // keeps what is there
  std::size_t size() const { return values_.size(); }
  // From several threads for different batches. A tensor of float32 or bfloat16 on the CPU goes to the file, others stay in memory.
  void put(std::size_t batch, const at::Tensor& value);
  at::Tensor get(std::size_t batch) const;  // undefined when there is none
  void drop(std::size_t batch);             // its room in the file is kept for the next value of the same size

 private:
  struct File;
  std::vector<at::Tensor> values_;  // the values, or what stands for them: meta tensors of their shapes
  std::unique_ptr<File> file_;
};

}  // namespace kompakt
