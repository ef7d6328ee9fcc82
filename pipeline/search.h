// Search for the best shape and formats under a budget: layers, feed-forward width, heads, vocabulary and the format of every
// tensor together.
//
// Predicted divergence of a candidate (nats a prediction) = removed layers + narrower feed-forward + fewer heads + smaller
// vocabulary + sum over the tensors that stay of their format's sensitivity. The terms of structure are measured, each kind alone
// on the uncut model (all layers at once, so that what adds up inside a kind is in the number); sensitivities are those of
// quantize/sensitivity.h, each times the share of the importance of its units that stays; narrower layers count with the share
// that the layers which stay have in what is lost. Shapes are enumerated, the formats of a shape are an exact knapsack: the
// optimum of the additive model. The best few are then built and measured, and the best of those is taken.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/fields.h"
#include "pipeline/latency_table.h"
#include "prune/criteria.h"
#include "prune/structured.h"
#include "quantize/budget.h"
#include "quantize/knapsack.h"
#include "quantize/stage.h"
#include "train/calibration.h"

namespace kompakt {

struct SearchBudget {
  std::int64_t bytes = 0;      // of the whole file
  std::int64_t memory = 0;     // of the file and the key/value cache of `context` tokens
  std::int64_t context = 2048;
  double latency_ms = 0;       // of one forward pass, by latency_table
  double joules = 0;           // of the same
  std::string latency_table;   // file of `kompakt doctor --latency-table`
};

struct SearchOptions {
  bool has_budget = false;
  SearchBudget budget;
  std::vector<std::int64_t> layers = {0};         // numbers of layers to remove
  std::vector<std::string> ffn = {"1"};           // shares, as in prune.structured
  std::vector<std::string> heads = {"1"};
  std::vector<std::string> vocabulary = {"all"};  // all | used
  std::vector<std::string> formats;               // as in quantize.budget
  std::string criterion = "taylor", depth = "removal_kl", compensate = "ls";
  std::int64_t samples = 256, multiple_of = 32, tokens = 2048;
  std::int64_t measure = 3;
  std::string method = "rtn";
  std::string apply = "shape";                    // shape | all
};
void fields(FieldVisitor& visitor, SearchOptions& options);
// Whether candidates are quantized by a method that feeds rounding errors back into the columns that follow: sensitivities foresee that.
bool search_feeds_back(const SearchOptions& options);
void check_search(const SearchOptions& options, const std::string& place, Problems& problems);

class BudgetProbe;

struct SearchShape {
  std::int64_t removed = 0, ffn = 0;
  HeadPlan heads;
  bool used_vocabulary = false;
  std::string text() const;
};

// All combinations of the options that are valid for the model, the uncut one first. Error where a share is not.
std::vector<SearchShape> search_shapes(const ModelConfig& config, const SearchOptions& options);
// Of a shape; `pieces`: size of the vocabulary where it is cut.
ModelConfig search_config(const ModelConfig& config, const SearchShape& shape, std::int64_t pieces);

// Tensors and formats of a shape; nothing where its rows fit none of them (`why` says so). Formats that a narrower shape cannot
// use are left out of it.
std::optional<BudgetFrame> search_frame(const ModelConfig& config, const SearchOptions& options, const BudgetTarget& target, std::string& why);

// The limit on the file's bytes that the budget leaves to a shape; negative: another budget is exceeded already.
std::int64_t search_limit(const ModelConfig& config, const SearchBudget& budget, const LatencyTable* table);
std::string search_budget_text(const SearchBudget& budget);  // for messages

struct SearchPoint {
  SearchShape shape;
  std::map<std::string, GridSpec> plan;  // by the tensor names of the cut model
  std::int64_t bytes = 0, limit = 0;
  double structure = 0, formats = 0;     // predicted divergence
  double latency_ms = 0;
  double measured = -1;                  // on the calibration tokens; < 0: not measured
  double predicted() const { return structure + formats; }
};

class BudgetSearch {
 public:
  // Exporters for a model of a shape, whose vocabulary is the whole or the used one.
  using TargetOf = std::function<BudgetTarget(const Transformer& shapes, bool used_vocabulary)>;
  // `kept`: ids of the used vocabulary, rising; empty = nothing is cut.
  BudgetSearch(Transformer& model, const SearchOptions& options, std::vector<std::int64_t> kept, TargetOf target, StageContext& context);
  ~BudgetSearch();

  // Importance, structure and sensitivities: once; `file` (may be empty) keeps them and is read when it exists.
  void measure(const std::filesystem::path& file);
  // The best formats of every shape that fits, by predicted divergence. Error when no shape fits. Fills frontier().
  std::vector<SearchPoint> solve(const LatencyTable* table);
  const std::vector<SearchPoint>& frontier() const { return frontier_; }  // no other choice has both fewer bytes and less divergence
  // Divergence that the additive model predicts for a plan of a shape.
  double predict(const SearchShape& shape, const std::map<std::string, GridSpec>& plan) const;
  double structure(const SearchShape& shape) const;
  // The model cut to a shape; its vocabulary stays.
  std::unique_ptr<Transformer> cut(const SearchShape& shape) const;
  // The same with decoded weights of the plan, and how far its predictions are from those of the uncut model.
  double divergence(const SearchPoint& point) const;
  std::vector<std::int64_t> removed(const SearchShape& shape) const;
  std::vector<KeptUnits> units(const SearchShape& shape) const;  // of every layer of the uncut model
  const UnitScores& scores() const { return scores_; }
  const CalibrationSet& set() const { return set_; }
  const std::vector<TokenBatch>& batches() const { return batches_; }
  QuantizeOptions quantize_options() const;  // of the method of the options

 private:
  // By tensor name of the cut model: its name in the uncut one, and the share of its units' importance that stays.
  std::map<std::string, std::pair<std::string, double>> origins(const SearchShape& shape) const;
  Json measured_json() const;
  // Takes over what a file of measured_json() holds; throws what is wrong with it, and takes nothing, where it is damaged.
  void recall(const std::filesystem::path& file);

  Transformer& model_;
  const SearchOptions& options_;
  std::vector<std::int64_t> kept_;
  TargetOf target_;
  StageContext& context_;
  std::vector<SearchShape> shapes_;
  CalibrationSet set_;
  std::vector<TokenBatch> batches_;
  std::unique_ptr<BudgetProbe> probe_;
  UnitScores scores_;
  std::vector<std::int64_t> order_;                    // layers in the order of removal
  std::map<std::int64_t, double> depth_kl_, ffn_kl_, heads_kl_;
  double vocabulary_kl_ = 0;
  std::map<std::string, std::map<std::string, double>> sensitivities_;  // tensor -> format -> nats
  std::vector<SearchPoint> frontier_;
};

struct StageRun;
struct PlanInput;
struct PlannedModel;
void plan_search(const Node& node, const PlanInput& input, PlannedModel& model);
void run_search(const Node& node, StageRun& run);

}  // namespace kompakt
