// A student made of some of the teacher's layers, and which teacher layer each of them answers for.
#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "core/error.h"
#include "core/text.h"
#include "distill/stage.h"
#include "model/depth.h"

namespace kompakt {
namespace {

void student_check(const std::vector<std::int64_t>& keep, std::int64_t layers) {
  for (std::size_t i = 0; i < keep.size(); ++i) {
    if (keep[i] < 0 || keep[i] >= layers) throw Error(str("keep_layers names layer ", keep[i], ", which the teacher does not have")).given(str(keep[i])).allowed(str("0 to ", layers - 1));
    if (i > 0 && keep[i] <= keep[i - 1]) throw Error("keep_layers must rise: each layer once, in order").given(str(keep[i - 1], ", ", keep[i])).hint("sort the list and remove repeated layers");
  }
}

std::vector<std::int64_t> student_layers(const std::vector<std::int64_t>& keep, std::int64_t layers) {
  if (!keep.empty()) return keep;
  std::vector<std::int64_t> all(static_cast<std::size_t>(layers));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

}  // namespace

std::vector<std::int64_t> default_layer_map(const std::vector<std::int64_t>& keep_layers, std::int64_t teacher_layers) {
  student_check(keep_layers, teacher_layers);
  const std::vector<std::int64_t> keep = student_layers(keep_layers, teacher_layers);
  std::vector<std::int64_t> map(keep.size());
  for (std::size_t i = 0; i < keep.size(); ++i) map[i] = i + 1 < keep.size() ? keep[i + 1] - 1 : teacher_layers - 1;
  return map;
}

void check_layer_map(const std::vector<std::int64_t>& map, std::int64_t student_layers, std::int64_t teacher_layers) {
  if (static_cast<std::int64_t>(map.size()) != student_layers)
    throw Error(str("layer_map has ", map.size(), " entries for ", student_layers, " student layers")).at("student.layer_map").given(str(map.size(), " entries")).allowed(str(student_layers, " teacher layers, one for each student layer"));
  for (const std::int64_t layer : map)
    if (layer < 0 || layer >= teacher_layers) throw Error(str("layer_map names layer ", layer, ", which the teacher does not have")).at("student.layer_map").given(str(layer)).allowed(str("0 to ", teacher_layers - 1));
}

std::vector<std::int64_t> even_layer_map(std::int64_t student_layers, std::int64_t teacher_layers) {
  std::vector<std::int64_t> map;
  for (std::int64_t i = 0; i < student_layers; ++i) map.push_back(std::max<std::int64_t>(0, (i + 1) * teacher_layers / student_layers - 1));
  return map;
}

std::vector<std::int64_t> student_layer_map(const StudentOptions& options, std::int64_t teacher_layers) {
  std::vector<std::int64_t> map = default_layer_map(options.keep_layers, teacher_layers);
  if (options.layer_map.empty()) return map;
  check_layer_map(options.layer_map, static_cast<std::int64_t>(map.size()), teacher_layers);
  return options.layer_map;
}

std::unique_ptr<Transformer> make_student(const Transformer& teacher, const StudentOptions& options) {
  const std::int64_t layers = teacher.config().layers;
  student_check(options.keep_layers, layers);
  std::unique_ptr<Transformer> student = teacher.clone();
  keep_blocks(*student, student_layers(options.keep_layers, layers));
  return student;
}

}  // namespace kompakt
