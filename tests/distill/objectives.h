// Objectives from the list of a recipe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/node.h"
#include "distill/stage.h"

namespace kompakt::testing {

inline std::vector<std::shared_ptr<Objective>> objectives_of(const std::string& yaml, const std::vector<std::int64_t>& map, const ObjectiveShapes& shapes = {}) {
  Problems problems;
  auto objectives = build_objectives(parse_yaml(yaml, "recipe.yaml"), map, problems, shapes);
  problems.throw_if_any("mistakes");
  return objectives;
}

}  // namespace kompakt::testing
