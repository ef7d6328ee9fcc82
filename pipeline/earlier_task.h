// Going on from an earlier run: where its model lies, which labels stay, and the task that it did before.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "data/dataset.h"

namespace kompakt {

struct Recipe;

// What must be added to the path of a folder to name the model in it: "/artifact" or "/04-quantize" of a run folder, "/model.gguf" of an
// artifact that is one file, "" of everything that is a model itself. Error: a run folder that holds no model.
std::string model_inside(const std::filesystem::path& path);

// Labels of the data in the order of their numbers: those of the model that the run begins with first, in its order, where its classifier
// stays; then those that only the data have, which stage finetune gives rows of their own. The classifier stays where data.previous is given,
// where no stage finetunes, and where it has just these labels. `names`: of the training (or test) data, sorted.
// Errors: new labels without a finetune stage before everything else; data.previous without a classifier.
std::vector<std::string> continued_labels(const Recipe& recipe, const std::vector<std::string>& names);
// Those of the model that the run begins with; Error when it has no classifier.
std::vector<std::string> earlier_labels(const Recipe& recipe);

// The same examples with the numbers of `names`. Error for a label that is not among them, which says that `who` does not know it.
ClassificationSet relabel(ClassificationSet set, const std::vector<std::string>& names, const std::string& who);

// `train` with examples of `old` (same label names) behind it, drawn by seed, so that they are `share` of the whole or as near to it as
// there are examples; share 0: all of them.
ClassificationSet with_rehearsal(ClassificationSet train, const ClassificationSet& old, double share, std::uint64_t seed);

}  // namespace kompakt
