// A model with rows of 256 from the stage to a GGUF file and a packed folder of super-blocks, reopened bit for bit.
#include <ATen/ATen.h>

#include <utility>

#include "core/files.h"
#include "core/json.h"
#include "export/exporters.h"
#include "formats/gguf.h"
#include "model/families.h"
#include "quantize/stage.h"
#include "tests/catch_torch.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

namespace kompakt {

TEST_CASE("super-blocks go from the stage into GGUF and the packed folder without loss", "[export][kquant]") {
  const Json json = {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"vocab_size", 50}, {"hidden_size", 256}, {"num_hidden_layers", 1}, {"num_attention_heads", 4},
                     {"num_key_value_heads", 2}, {"intermediate_size", 512}, {"hidden_act", "silu"}, {"max_position_embeddings", 64}, {"rms_norm_eps", 1e-5}, {"tie_word_embeddings", true}};
  Transformer model(config_from_json(json, "tiny"), 5);
  testing::stir(model, 5);
  const TaskData data = testing::tiny_text(3);
  StageContext context;
  context.data = &data, context.title = "quantize";
  QuantizeOptions options;
  options.weights = "q4_k", options.embedding = "q6_k", options.method = "trifit";
  const QuantizedModel result = quantize(model, options, {}, context);
  QuantizedTensors quantized;
  std::map<std::string, GridSpec> plan = result.plan.tensors;
  for (const auto& [name, q] : result.tensors) quantized[name] = {plan.at(name), q};
  for (const char* format : {"gguf", "kompakt", "safetensors"}) {
    CAPTURE(format);
    const Exporter& exporter = *find_exporter(format);
    REQUIRE(exporter.obstacles(model.config(), plan).empty());
    const TemporaryFolder folder;
    exporter.write({model, quantized, "test", {}}, folder.path());
    const auto reopened = exporter.reopen(folder.path());
    const auto left = std::as_const(model).parameters(), right = std::as_const(*reopened).parameters();
    REQUIRE(left.size() == right.size());
    for (std::size_t i = 0; i < left.size(); ++i) {
      CAPTURE(left[i].first);
      CHECK(at::equal(left[i].second, right[i].second));
    }
    if (exporter.file_bytes) CHECK(exporter.file_bytes({model, plan, "test", false, {}}) == static_cast<std::int64_t>(bytes_on_disk(folder.path())));
    if (std::string(format) != "gguf") continue;
    const GgufFile file = GgufFile::open(folder.path() / "model.gguf");
    CHECK(file.find("token_embd.weight")->type->name == "Q6_K");
    CHECK(file.find("blk.0.ffn_down.weight")->type->name == "Q4_K");
  }
  plan["model.layers.0.mlp.down_proj"] = {find_grid("q4_k"), 32};
  std::string why;
  CHECK(!find_exporter("gguf")->holds(plan["model.layers.0.mlp.down_proj"], 576, why));
  CHECK(testing::contains_all(why, {"576", "super-blocks of 256", "Q4_K"}));
}

}  // namespace kompakt
