// Losses between a student's and a teacher's outputs: logits, hidden states, relations. Pure functions of tensors.
//
// Logit losses work in float32 (float64 stays float64) from one log_softmax per side and give value and gradient in closed
// form, so that the plain and the fused (chunked) path share the mathematics. They do not know of models, taps or recipes.
// All values are nats; all losses are zero with zero gradient where student equals teacher.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "train/row_loss_math.h"

namespace kompakt {

struct LogitLossOptions {
  double temperature = 1;       // T > 0: both distributions are softmax(logits / T)
  bool scale_gradient = true;   // times T^2, so that the gradient does not shrink when mixed with hard labels
  double beta = 0.5;            // generalized JSD: 0 = forward KL, 1 = reverse KL (the convention of GKD, not a limit of the formula)
  double lambda = 0.1;          // skewed losses: share of the other distribution in the mixture, [0, 1)
  std::int64_t top = 8;         // ranking: the teacher's likeliest tokens, whose order the student must keep
  double margin = 1;            // ranking: no larger gap of scaled logits is asked for than this
  std::int64_t vocabulary = 0;  // only the first so many columns are real (padded vocabularies); 0 = all columns
  double count = 0;             // divisor of the sum over positions; 0 = number of valid positions
  at::Tensor mask;              // bool, shape of the logits without the last dimension: valid positions; undefined = all
};

// Scaled logits u of both sides, [n, V] without autograd. Log-probabilities and probabilities are computed when first asked for
// and then shared by all losses of the same temperature; nobody writes into them.
class LogitPair {
 public:
  LogitPair(at::Tensor student, at::Tensor teacher) : student_(std::move(student)), teacher_(std::move(teacher)) {}
  const at::Tensor& student() const { return student_; }
  const at::Tensor& teacher() const { return teacher_; }
  const at::Tensor& log_q() const;  // of the student
  const at::Tensor& log_p() const;  // of the teacher
  const at::Tensor& q() const;
  const at::Tensor& p() const;
  const at::Tensor& forward_kl() const;  // [n] KL(p || q)
  const at::Tensor& reverse_kl() const;  // [n] KL(q || p)

 private:
  void compare() const;
  at::Tensor student_, teacher_;
  mutable at::Tensor log_q_, log_p_, q_, p_, forward_, reverse_;
};

// What a divergence gives for n positions: u = logits / T.
struct Divergence {
  at::Tensor value;     // [n]
  at::Tensor gradient;  // [n, V] dL/du of the student; undefined unless asked for
};

// Rows of the table of logit losses.
struct LogitLoss {
  std::string_view name;
  std::string_view summary;
  // Which options it reads.
  bool uses_beta = false, uses_lambda = false, uses_top = false;
  bool shift_invariant = false;  // adding a constant to all logits of a position changes nothing
  // Defined on probabilities alone, so that it also compares the likeliest tokens and the rest as one: what a teacher cache holds.
  bool partition = false;
  bool linear_in_teacher = false;  // its gradient is linear in the teacher's probabilities: an unbiased sample of those suffices
  bool by_rows = false;  // evaluate_kl_rows() computes it too
  rows::RowLoss row = rows::RowLoss::none;  // the same loss in the kernels of train/row_losses.h
  // Masked columns hold a large negative finite number in both sides.
  Divergence (*evaluate)(const LogitPair& pair, const LogitLossOptions& options, bool gradient) = nullptr;
};
std::span<const LogitLoss> logit_losses();
const LogitLoss* find_logit_loss(std::string_view name);
std::vector<std::string> logit_loss_names();

// Mean over valid positions; differentiable in `student` (first order). student, teacher [.., V].
// A column that is -inf in one of the two is removed from both distributions of that position.
// No valid position: 0 with zero gradient.
at::Tensor logit_loss(const LogitLoss& loss, const at::Tensor& student, const at::Tensor& teacher, const LogitLossOptions& options = {});

at::Tensor forward_kl(const at::Tensor& student, const at::Tensor& teacher, const LogitLossOptions& options = {});
at::Tensor reverse_kl(const at::Tensor& student, const at::Tensor& teacher, const LogitLossOptions& options = {});
at::Tensor generalized_jsd(const at::Tensor& student, const at::Tensor& teacher, const LogitLossOptions& options = {});
at::Tensor skew_forward_kl(const at::Tensor& student, const at::Tensor& teacher, const LogitLossOptions& options = {});
at::Tensor skew_reverse_kl(const at::Tensor& student, const at::Tensor& teacher, const LogitLossOptions& options = {});
at::Tensor adaptive_kl(const at::Tensor& student, const at::Tensor& teacher, const LogitLossOptions& options = {});
at::Tensor total_variation(const at::Tensor& student, const at::Tensor& teacher, const LogitLossOptions& options = {});
at::Tensor logits_mse(const at::Tensor& student, const at::Tensor& teacher, const LogitLossOptions& options = {});
at::Tensor ranking_hinge(const at::Tensor& student, const at::Tensor& teacher, const LogitLossOptions& options = {});

// A weighted loss of a sum. The options' vocabulary, count and mask are those of the whole sum and stand elsewhere.
struct LogitTerm {
  const LogitLoss* loss = nullptr;
  LogitLossOptions options;
  double weight = 1;
};
// Sums over n positions. `values` [terms + 2] float64: every term (T^2 included, unweighted), then forward and reverse KL at
// temperature 1, which are logged whatever is minimised. `gradient` [n, V]: dL/dlogits of the weighted sum (T included).
struct LogitSums {
  at::Tensor values, gradient;
};
// Used by the plain and the fused path. student, teacher [n, V] of any float type; vocabulary as in LogitLossOptions.
// The log-probabilities of a temperature are computed once for all terms.
LogitSums evaluate_terms(std::span<const LogitTerm> terms, const at::Tensor& student, const at::Tensor& teacher, std::int64_t vocabulary, bool gradient);

at::Tensor weighted_total(std::span<const LogitTerm> terms, const at::Tensor& values);
double gradient_factor(const LogitLossOptions& options);  // T^2, or 1

// `total`: weighted sum of means over valid positions, differentiable in the student; `values`: the means, as in LogitSums.
struct LogitMeans {
  at::Tensor total, values;
};
// As logit_loss, for several losses at once. Of `frame` only vocabulary, count and mask are read.
LogitMeans logit_terms(std::span<const LogitTerm> terms, const at::Tensor& student, const at::Tensor& teacher, const LogitLossOptions& frame = {});

// Hidden states [.., d] over the positions where `mask` (shape without d; undefined = all) is true; a projection [d_s, d_t]
// maps the student's width to the teacher's (undefined: equal widths).
// MSE: mean over valid positions and channels. `normalize`: divided by the variance of the teacher's states of this batch, so
// that layers with large channels do not drown the others.
at::Tensor hidden_mse(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& mask = {}, const at::Tensor& projection = {}, bool normalize = false);
// 1 - mean cosine; positions where one of the two is the zero vector count as cosine 0, where both are as 1.
at::Tensor hidden_cosine(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& mask = {}, const at::Tensor& projection = {});

// argmin_P |H_s P - H_t|^2 + ridge * mean diag(H_s'H_s) |P|^2, solved in float64. student [n, d_s], teacher [n, d_t] -> [d_s, d_t] float32.
at::Tensor least_squares_projection(const at::Tensor& student, const at::Tensor& teacher, double ridge = 1e-4);
// Semi-orthogonal [rows, columns] from CounterRandom(seed, stream): deterministic start of a learned projection.
at::Tensor orthogonal_projection(std::int64_t rows, std::int64_t columns, std::uint64_t seed, std::string_view stream);

// Losses between the pooled vectors of the texts of a batch, [B, d] each (encoders).
// contrastive: KL between softmax_j(cos(t_i, t_j) / T) and softmax_j(cos(s_i, t_j) / T): the student's vector must be as near to the
// teacher's vectors of all texts of the batch as the teacher's own is (SEED, Fang et al. 2021, without its queue). Same widths,
// or a projection [d_s, d_t].
at::Tensor embedding_contrastive(const at::Tensor& student, const at::Tensor& teacher, double temperature, const at::Tensor& projection = {});
// similarity: the same among the student's own vectors, a text not compared with itself: any two widths. 0 for a single text.
at::Tensor embedding_similarity(const at::Tensor& student, const at::Tensor& teacher, double temperature);

struct RelationOptions {
  std::int64_t relation_heads = 0;  // the concatenated heads are split again into so many; 0 = greatest common divisor of both head counts
  bool normalize = false;           // rows of unit length, no 1/sqrt(d) (BitDistill); false: scaled dot products (MiniLMv2)
  double temperature = 1;           // of the softmax over keys
};
// Error with the nearest divisors when queries, keys or values of `width` numbers cannot be split into so many heads.
void check_relation_heads(std::int64_t width, std::int64_t heads, const char* whose);

// MiniLMv2: KL between softmax(X X' / sqrt(d_r)) of teacher and student, averaged over relation heads and valid rows.
// student [B,H_s,T,hd_s], teacher [B,H_t,T,hd_t]; lengths [B] (undefined = no padding), documents [B,T] (undefined = one a row).
// Padding takes no part, as row or as column; packed documents see only themselves. Error when heads do not divide.
at::Tensor relation_loss(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& lengths, const at::Tensor& documents, const RelationOptions& options = {});

}  // namespace kompakt
