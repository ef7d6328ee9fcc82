// Every row of the table of families against transformers (goldens), and the properties that hold for all of them.
#include "../catch_torch.h"

#include <ATen/core/grad_mode.h>

#include "../support.h"
#include "core/files.h"
#include "fixtures.h"
#include "model/checkpoint.h"
#include "model/families.h"
#include "model/generate.h"
#include "model/transformer.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

at::Tensor family_output(const Transformer& model, const ModelInput& input) {
  return model.config().family->encoder && !model.config().is_classifier() ? model.hidden(input) : model.forward(input);
}

}  // namespace

TEST_CASE("logits of every family equal those of transformers", "[model]") {
  for (const std::string& name : golden_names()) {
    DYNAMIC_SECTION(name) {
      const TemporaryFolder folder;
      const GoldenModel golden = open_golden(name, folder.path());
      const at::NoGradGuard no_grad;
      const auto model = load_model(folder.path());
      ModelInput input;
      input.ids = golden.ids;
      input.lengths = golden.lengths;
      at::Tensor ours = family_output(*model, input), theirs = golden.output;
      if (name == "bert") {  // padding positions are nobody's business
        ours = ours.clone();
        theirs = theirs.clone();
        ours[1].narrow(0, 13, 7).zero_();
        theirs[1].narrow(0, 13, 7).zero_();
      }
      CHECK(relative_error(ours, theirs) < 1e-5);
    }
  }
}

TEST_CASE("every family has a golden", "[model]") {
  for (const Family& row : families()) {
    bool found = false;
    for (const std::string& name : golden_names()) found |= name == row.name;
    CHECK(found);
  }
}

TEST_CASE("golden models survive load, save, load byte for byte", "[model]") {
  for (const std::string& name : golden_names()) {
    DYNAMIC_SECTION(name) {
      const TemporaryFolder folder, first, second;
      const GoldenModel golden = open_golden(name, folder.path());
      const auto a = load_model(folder.path());
      save_model(*a, first.path());
      const auto b = load_model(first.path());
      save_model(*b, second.path());
      CHECK(read_text(first.path() / "model.safetensors") == read_text(second.path() / "model.safetensors"));
      CHECK(read_text(first.path() / "config.json") == read_text(second.path() / "config.json"));
      CHECK(fingerprint(*a) == fingerprint(*b));
      const at::NoGradGuard no_grad;
      ModelInput input;
      input.ids = golden.ids;
      CHECK(family_output(*a, input).equal(family_output(*b, input)));
    }
  }
}

TEST_CASE("the parameter count of a shape is what is allocated", "[model]") {
  const auto check = [](ModelConfig config) {
    const Transformer model(config, 0, c10::Device(c10::kMeta));
    std::int64_t total = 0;
    for (const auto& [name, value] : model.parameters()) total += value.numel();
    CHECK(count_parameters(config).total == total);
  };
  for (const Family& row : families()) {
    DYNAMIC_SECTION(row.name) {
      ModelConfig config = tiny_config(std::string(row.name));
      check(config);
      config.tied = !config.tied;
      config.qkv_bias = config.out_bias = config.mlp_bias = true;
      config.head_dim = 6;  // heads * head_dim differs from hidden
      check(config);
      if (row.encoder) {
        for (const char* pooling : {"mean", "pooler"}) {
          config.labels = {"a", "b", "c"};
          config.pooling = pooling;
          check(config);
        }
      }
    }
  }
}

TEST_CASE("the forward pass names no device: it runs on meta", "[model]") {
  for (const Family& row : families()) {
    DYNAMIC_SECTION(row.name) {
      ModelConfig config = tiny_config(std::string(row.name));
      config.tied = false;
      Transformer model(config, 0, c10::Device(c10::kMeta));
      model.requires_grad(true);
      model.tokens.weight.requires_grad_(false);  // the lookup's backward has no meta kernel
      ModelInput input;
      input.ids = at::zeros({2, 9}, at::TensorOptions().dtype(at::kLong).device(at::kMeta));
      if (row.encoder) input.lengths = at::zeros({2}, at::TensorOptions().dtype(at::kLong).device(at::kMeta));
      const at::Tensor out = model.forward(input);
      CHECK(out.is_meta());
      CHECK(out.size(-1) == (row.encoder ? 32 : 67));
      out.sum().backward();
      CHECK(model.blocks[0].attention.query.weight.grad().is_meta());
    }
  }
}

TEST_CASE("packed documents give the logits of the documents alone", "[model]") {
  for (const Family& row : families()) {
    DYNAMIC_SECTION(row.name) {
      const at::NoGradGuard no_grad;
      Transformer model(tiny_config(std::string(row.name)));
      randomize(model, 5);
      const std::vector<std::int64_t> lengths = {9, 1, 7};
      const at::Tensor ids = random_ids(1, 17, 67, 3);
      ModelInput packed;
      packed.ids = ids;
      packed.documents = at::empty({1, 17}, at::kLong);
      packed.positions = at::empty({1, 17}, at::kLong);
      std::int64_t at_token = 0;
      for (std::size_t d = 0; d < lengths.size(); ++d) {
        packed.documents.narrow(1, at_token, lengths[d]).fill_(static_cast<std::int64_t>(d));
        packed.positions.narrow(1, at_token, lengths[d]).copy_(at::arange(lengths[d], at::kLong).unsqueeze(0));
        at_token += lengths[d];
      }
      const at::Tensor all = model.hidden(packed);
      at_token = 0;
      for (std::int64_t length : lengths) {
        ModelInput alone;
        alone.ids = ids.narrow(1, at_token, length);
        CHECK(relative_error(all.narrow(1, at_token, length), model.hidden(alone)) < 1e-5);
        at_token += length;
      }
    }
  }
}

TEST_CASE("generation with a cache equals full passes", "[model]") {
  for (const Family& row : families()) {
    if (row.encoder) continue;
    DYNAMIC_SECTION(row.name) {
      const at::NoGradGuard no_grad;
      Transformer model(tiny_config(std::string(row.name)));
      randomize(model, 7);
      const std::vector<std::int64_t> prompt = {3, 14, 15};
      GenerateOptions options;
      options.max_new_tokens = 12;  // crosses the windows of Mistral and Gemma
      const auto cached = generate(model, prompt, options);
      std::vector<std::int64_t> text = prompt;
      for (int i = 0; i < 12; ++i) {
        ModelInput input;
        input.ids = at::tensor(text, at::kLong).unsqueeze(0);
        text.push_back(model.forward(input).select(1, static_cast<std::int64_t>(text.size()) - 1).argmax(-1).item<std::int64_t>());
      }
      CHECK(cached == std::vector<std::int64_t>(text.begin() + 3, text.end()));

      // Logits of a prompt given in two pieces equal those of one piece.
      const at::Tensor ids = random_ids(2, 11, 67, 8);
      ModelInput whole, first, second;
      whole.ids = ids;
      first.ids = ids.narrow(1, 0, 4);
      second.ids = ids.narrow(1, 4, 7);
      KvCache cache;
      model.forward(first, nullptr, &cache);
      CHECK(relative_error(model.forward(second, nullptr, &cache), model.forward(whole).narrow(1, 4, 7)) < 1e-5);
      CHECK(cache.length == 11);
    }
  }
}

TEST_CASE("a sliding window ends exactly at its width", "[model]") {
  ModelConfig config = tiny_config("mistral");
  config.layers = 1;
  config.sliding_window = {5};
  const at::NoGradGuard no_grad;
  Transformer model(config);
  randomize(model, 2);
  const at::Tensor ids = random_ids(1, 12, 60, 4);
  ModelInput a, b;
  a.ids = ids;
  b.ids = ids.clone();
  b.ids[0][3] = 66;
  const at::Tensor change = (model.hidden(a) - model.hidden(b)).abs().amax(-1)[0];
  for (std::int64_t t = 0; t < 12; ++t) {
    const bool sees = t >= 3 && t - 3 < 5;
    CHECK((change[t].item<double>() > 1e-7) == sees);
  }
}
