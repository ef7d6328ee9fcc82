// Post-processors of tokenizer.json reduced to what a single text needs: ids before it and ids after it.
#include "core/error.h"
#include "core/text.h"
#include "data/decoder.h"

namespace kompakt {
namespace {

std::int64_t pair_id(const Json& json, const char* key, const std::string& place) {
  const Json pair = json_get<Json>(json, key, place);
  if (!pair.is_array() || pair.size() != 2 || !pair[1].is_number_integer()) throw Error(str("\"", key, "\" of the post-processor is not a pair of token and id")).at(place).given(pair.dump());
  return pair[1].get<std::int64_t>();
}

SpecialFrame template_frame(const Json& json, const std::string& place) {
  SpecialFrame frame;
  const Json tokens = json_get<Json>(json, "special_tokens", place);
  bool text_seen = false;
  for (const Json& piece : json_get<Json>(json, "single", place)) {
    if (piece.contains("Sequence")) {
      if (text_seen) throw Error("the post-processor's template repeats the text").at(place).given(json_get<Json>(json, "single", place).dump());
      text_seen = true;
      continue;
    }
    const auto name = json_get<std::string>(json_get<Json>(piece, "SpecialToken", place), "id", place);
    const auto ids = json_get<std::vector<std::int64_t>>(json_get<Json>(tokens, name, place), "ids", place);
    auto& side = text_seen ? frame.after : frame.before;
    side.insert(side.end(), ids.begin(), ids.end());
  }
  if (!text_seen) throw Error("the post-processor's template leaves out the text").at(place);
  return frame;
}

}  // namespace

SpecialFrame make_frame(const Json& description, const std::string& place) {
  if (description.is_null()) return {};
  const auto type = json_get<std::string>(description, "type", place);
  if (type == "ByteLevel") return {};  // changes offsets only
  if (type == "BertProcessing" || type == "RobertaProcessing") return {{pair_id(description, "cls", place)}, {pair_id(description, "sep", place)}};
  if (type == "TemplateProcessing") return template_frame(description, place);
  if (type == "Sequence") {
    SpecialFrame frame;
    for (const Json& part : json_get<Json>(description, "processors", place)) {
      const SpecialFrame outer = make_frame(part, place);
      frame.before.insert(frame.before.begin(), outer.before.begin(), outer.before.end());
      frame.after.insert(frame.after.end(), outer.after.begin(), outer.after.end());
    }
    return frame;
  }
  throw Error(str("the post-processor \"", type, "\" of the tokenizer is not supported")).at(place).allowed("BertProcessing, ByteLevel, RobertaProcessing, Sequence, TemplateProcessing");
}

Json renumber_post_processor(const Json& description, const std::function<std::int64_t(std::int64_t)>& new_id, const std::string& place) {
  if (description.is_null()) return description;
  Json out = description;
  const auto renew = [&](Json& value) {
    const std::int64_t id = new_id(value.get<std::int64_t>());
    if (id < 0) throw Error(str("the token ", value.dump(), " that the post-processor adds is not among the kept ones")).at(place);
    value = id;
  };
  const auto type = json_get<std::string>(description, "type", place);
  if (type == "Sequence") {
    for (Json& part : out["processors"]) part = renumber_post_processor(part, new_id, place);
  } else if (type == "TemplateProcessing") {
    for (auto& [name, token] : out["special_tokens"].items())
      for (Json& id : token["ids"]) renew(id);
  } else if (type == "BertProcessing" || type == "RobertaProcessing") {
    for (const char* key : {"cls", "sep"}) renew(out[key][1]);
  }
  return out;
}

}  // namespace kompakt
