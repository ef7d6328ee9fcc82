// Second moments of the inputs of linear layers, block by block: the prefix of the model is already quantized or pruned, one
// block and the activations in front of it are in memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/fields.h"
#include "model/transformer.h"
#include "train/activations.h"
#include "train/context.h"

namespace kompakt {

// work(0), ..., work(count - 1), on the CPU beside each other; every bit is independent of the number of threads as long as the
// pieces do not meet.
void for_each_batch(c10::Device device, std::size_t count, const std::function<void(std::size_t)>& work);

// The inputs that a method looks at, and what the report says about them.
struct CalibrationSet {
  std::vector<ModelInput> inputs;  // batches
  std::vector<at::Tensor> valid;   // per batch: flat positions of tokens that are no padding, or undefined = all
  std::int64_t sequences = 0, tokens = 0;
  std::string hash;                // SHA-256 over the token ids
};
// Training examples (classification) or calibration windows (text), at most `sequences`, the same for the same seed.
// Error when there are none, with `otherwise` as what needs none.
CalibrationSet calibration_set(const StageContext& context, std::int64_t sequences, std::string_view otherwise = "method: rtn");

// The linears of a block that see the same input, in the order in which the block computes them.
enum class BlockPart { attention, output, feed_forward, down };
constexpr std::array<BlockPart, 4> block_parts = {BlockPart::attention, BlockPart::output, BlockPart::feed_forward, BlockPart::down};
// Every parameter of a block: weights and biases of its linears, its norms.
std::vector<NamedParameter> block_parameters(Block& block);
std::vector<Linear*> part_linears(Block& block, BlockPart part);  // those that the model has

// Of the input x [K] of a part in the quantized model and x~ in the float model, over all tokens that are no padding.
struct SecondMoments {
  at::Tensor hessian;             // [K,K] E[x x^T], exactly symmetric
  at::Tensor cross;               // [K,K] E[x~ x^T], only with a teacher and CalibrationOptions::cross
  at::Tensor half;                // [K,K] E[x x^T] of the first half of the batches; undefined with a single batch
  at::Tensor square;              // [K] float64 E[x^2], and nothing else, when only squares are asked for
  at::Tensor mean, half_mean;     // [K] float64 E[x], and of the first half; only when means are asked for
  at::Tensor teacher_mean;        // [K] float64 E[x~], likewise
  std::int64_t tokens = 0, half_tokens = 0;
  double half_share = 0;          // of the first half in the weights of all tokens
};
// Covariances instead, of moments with means: E[x x^T] - E[x] E[x]^T and so on. What a layer with a bias minimises, when the bias takes the rest.
void subtract_means(SecondMoments& moments);

struct CalibrationOptions {
  bool teacher = false;         // keep the activations of the float model too
  bool cross = true;            // with a teacher: moments against it
  bool means = false;           // means of the inputs too
  bool float64 = false;         // products and sums of the moments in float64 instead of float32
  std::filesystem::path spill;  // folder for activations on disk; empty = in memory
  bool squares_only = false;    // no products: the diagonal of the moments, for a pass that costs no more than the model
  bool bf16 = false;            // passes through the blocks under autocast, products of the moments from inputs rounded to bfloat16; the residual stream and all sums stay float32. Not with float64
};
// Names and meaning of the option that switches it on: float32, or bf16, or auto = bf16 where the device multiplies it faster.
void calibration_precision_field(FieldVisitor& visitor, std::string& precision);

// Activations in front of one block of the quantized model and, with a teacher, of the float model. A block is computed once,
// part by part: what lies between its linears is kept until the next part is asked for.
class SequentialCalibration {
 public:
  // With a teacher its activations are embedded here: the model must still hold its float weights.
  SequentialCalibration(Transformer& model, const CalibrationSet& set, const CalibrationOptions& options);
  // Embeds the set with the embedding that the quantized model will have.
  void start();

  // Moments of the input of `part` in block `layer`, whose earlier parts must hold their final weights. Parts are asked for in
  // their order, any may be left out. `original` are the teacher's parameters of the block by name, put in place for
  // its pass; names that it lacks keep the present value. `layer` = the number of blocks, part attention: what the head reads, behind all
  // blocks.
  SecondMoments moments(std::int64_t layer, BlockPart part, const std::map<std::string, at::Tensor>& original);
  // The same with weighted tokens, E[w x x^T] / E[w] and so on, for several weights at once: of each, a tensor [tokens] a batch.
  std::vector<SecondMoments> moments(std::int64_t layer, BlockPart part, const std::map<std::string, at::Tensor>& original, const std::vector<const std::vector<at::Tensor>*>& weights);
  // The teacher alone moves on behind the block: its output is then what the quantized block is compared with.
  void advance_teacher(std::int64_t layer, const std::map<std::string, at::Tensor>& original);
  // Weights of the block were changed after its moments were taken: it is computed anew from its input.
  void restart_block() { quantized_.done = 0; }
  // Moves on behind block `layer`, all of whose parts hold their final weights.
  void advance(std::int64_t layer, const std::map<std::string, at::Tensor>& original);

  const CalibrationSet& set() const { return set_; }
  bool has_teacher() const { return options_.teacher; }
  // Of one batch, [B,T,d]: in front of the present block of the quantized model; of the float model, or behind the block after
  // advance_teacher.
  at::Tensor input(std::size_t batch) const { return quantized_.x.get(batch); }
  at::Tensor teacher(std::size_t batch) const { return teacher_.x.get(batch); }
  // The same by name, for a run that is killed and goes on.
  std::vector<std::pair<std::string, at::Tensor>> activations() const;
  void set_activations(const std::vector<std::pair<std::string, at::Tensor>>& values);

 private:
  struct Stream {
    Activations x;        // per batch [B,T,d] in front of the block
    Activations context;  // [B,T,H*hd] from part output on
    Activations h;        // [B,T,d] from part feed_forward on
    Activations inner;    // [B,T,f] from part down on
    int done = 0;         // parts whose input is there
  };
  Stream make_stream() const;
  void embed(Stream& stream);
  void compute(Stream& stream, std::int64_t layer, int parts);  // up to the input of part number `parts`; 4 = behind the block
  void compute_teacher(std::int64_t layer, int parts, const std::map<std::string, at::Tensor>& original);
  at::Tensor part_input(const Stream& stream, std::int64_t layer, BlockPart part, std::size_t batch) const;  // [tokens,K]
  std::vector<at::Tensor> part_inputs(const Stream& stream, std::int64_t layer, BlockPart part, std::size_t first, std::size_t end) const;
  void swap_weights(std::int64_t layer, std::map<std::string, at::Tensor>& weights);

  Transformer& model_;
  const CalibrationSet& set_;
  CalibrationOptions options_;
  Stream quantized_, teacher_;
  bool teacher_ahead_ = false;  // behind the block already
};

}  // namespace kompakt
