#!/usr/bin/env python3
"""Golden files of tests/model from Hugging Face transformers (tried with 5.24, torch 2.15, CPU float32).

usage: make_goldens_model.py [--minilm FOLDER] [--smollm2 FILE.gguf]
Writes tests/goldens/model_<case>.safetensors: random weights of a tiny model, token ids and the logits that transformers computes;
config.json stands in the metadata. With --minilm / --smollm2 it also writes the small goldens of the real models.
"""
import argparse
import json
import pathlib
import tempfile

import torch
import transformers
from safetensors.torch import save_file

GOLDENS = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens"
VOCAB = 67
SMALL = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BERT = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=24, pad_token_id=0)
LLAMA3 = dict(rope_theta=500000.0, rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(rope_theta=10000.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LINEAR = dict(rope_theta=10000.0, rope_type="linear", factor=4.0)

# name: (config class, model class, config keys). T = 20 exceeds every window, so that its edge is inside.
CASES = {
    "bert": ("BertConfig", "BertModel", BERT),
    "bert_classifier": ("BertConfig", "BertForSequenceClassification", BERT | dict(id2label={0: "no", 1: "maybe", 2: "yes"}, label2id={"no": 0, "maybe": 1, "yes": 2})),
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL | dict(tie_word_embeddings=True, rope_parameters=dict(rope_theta=100000.0, rope_type="default"))),
    "llama_scaled": ("LlamaConfig", "LlamaForCausalLM", SMALL | dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True, head_dim=12, rope_parameters=LLAMA3)),
    "llama_yarn": ("LlamaConfig", "LlamaForCausalLM", SMALL | dict(tie_word_embeddings=False, rope_parameters=YARN)),
    "llama_linear": ("LlamaConfig", "LlamaForCausalLM", SMALL | dict(tie_word_embeddings=False, rope_parameters=LINEAR)),
    "mistral": ("MistralConfig", "MistralForCausalLM", SMALL | dict(sliding_window=5, tie_word_embeddings=False)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SMALL | dict(tie_word_embeddings=True)),
    "qwen2_window": ("Qwen2Config", "Qwen2ForCausalLM", SMALL | dict(tie_word_embeddings=False, use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", SMALL | dict(head_dim=16, tie_word_embeddings=True)),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", SMALL | dict(num_hidden_layers=4, no_rope_layer_interval=2, tie_word_embeddings=True)),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", SMALL | dict(head_dim=12, sliding_window=5, query_pre_attn_scalar=20,
               layer_types=["sliding_attention", "sliding_attention", "full_attention"])),
}


def randomize(model, generator):
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 and name.endswith("weight"):
                base = 0.0 if type(model).__name__.startswith("Gemma") else 1.0
                parameter.copy_(base + 0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)


def saved_config(model):
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    config.pop("transformers_version", None)
    return config


def tiny_case(name, config_class, model_class, keys):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    config = getattr(transformers, config_class)(**keys, attn_implementation="eager")
    model = getattr(transformers, model_class)(config).eval().float()
    randomize(model, generator)
    ids = torch.randint(3, VOCAB, (2, 20), generator=generator)
    lengths = torch.tensor([20, 13])
    tensors = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    if getattr(config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    with torch.no_grad():
        if name.startswith("bert"):
            mask = (torch.arange(20)[None] < lengths[:, None]).long()
            out = model(ids, attention_mask=mask)
            values = out.logits if name.endswith("classifier") else out.last_hidden_state
            tensors["golden.lengths"] = lengths
        else:
            values = model(ids).logits
    tensors["golden.ids"] = ids
    tensors["golden.output"] = values.float().contiguous()
    path = GOLDENS / f"model_{name}.safetensors"
    save_file(tensors, str(path), metadata={"config": json.dumps(saved_config(model), sort_keys=True)})
    print(f"{path.name}: {path.stat().st_size} bytes, |output| max {values.abs().max():.3f}")


SENTENCES = ["my card has not arrived yet", "the quick brown fox jumps over the lazy dog",
             "can i change the pin of my card in another country?", "hello"]


def minilm(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval().float()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).float()
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    save_file({"ids": batch["input_ids"].contiguous(), "lengths": batch["attention_mask"].sum(1), "hidden_first": hidden[0].contiguous(),
               "pooled": pooled.contiguous()}, str(GOLDENS / "model_minilm.safetensors"))


def smollm2(path):
    path = pathlib.Path(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = torch.tensor([[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]])
    with torch.no_grad():
        logits = model(prompt).logits[0]
        tokens = prompt
        cache, step = None, prompt
        for _ in range(200):
            out = model(step, past_key_values=cache, use_cache=True)
            cache, step = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, step], 1)
    top = logits.topk(16, -1)
    save_file({"prompt": prompt[0], "last_logits": logits[-1].contiguous(), "top_values": top.values.contiguous(), "top_ids": top.indices.contiguous(),
               "greedy": tokens[0, prompt.shape[1]:].contiguous()}, str(GOLDENS / "model_smollm2.safetensors"))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minilm")
    parser.add_argument("--smollm2")
    options = parser.parse_args()
    GOLDENS.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, (config_class, model_class, keys) in CASES.items():
        tiny_case(name, config_class, model_class, keys)
    if options.minilm:
        minilm(options.minilm)
    if options.smollm2:
        smollm2(options.smollm2)


if __name__ == "__main__":
    main()
