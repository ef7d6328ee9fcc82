// Masks that outlive the stage that made them: the constraint that keeps weights at exact zero, and the file they lie in.
#pragma once

#include <filesystem>
#include <memory>

#include "train/constraint.h"
#include "train/context.h"

namespace kompakt {

// attach() sets the masked weights to zero; after every optimizer step they are set to exact zero again. Works beside fake
// quantization: a zero stays zero on every grid that has one. train() installs it by itself for context.masks.
std::shared_ptr<Constraint> mask_constraint(WeightMasks masks);

// Sets the masked weights to zero, in place. std::logic_error when a mask fits no linear of the model.
void apply_masks(Transformer& model, const WeightMasks& masks);

// masks.h5 of a stage folder: for every mask "bits/NAME", bytes [out, ceil(in / 8)] whose lowest bit is the first column, and
// "columns/NAME", the number `in`. No file when there are no masks.
void save_masks(const WeightMasks& masks, const std::filesystem::path& folder);
WeightMasks load_masks(const std::filesystem::path& folder);  // empty without the file

// Error when a mask fits no linear of `model`: the folder holds the masks of another one.
void check_masks_fit(const WeightMasks& masks, Transformer& model, const std::filesystem::path& folder);

// A stage that changes shapes cannot carry masks along: Error that says so and names the order that works.
void refuse_masks(const StageContext& context, const char* what);

}  // namespace kompakt
