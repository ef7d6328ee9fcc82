#!/usr/bin/env python3
"""Writes tests/goldens/train_bert/: a tiny random BERT and the losses of six AdamW steps taken by PyTorch's own optimizer on a
classifier with mean pooling, so that the training loop is checked against an independent one. Needs torch and transformers.

usage: scripts/make_goldens_train.py
"""

import json
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "train_bert"
TEXTS = [[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 10, 11, 2], [1, 12, 13, 2], [1, 14, 2], [1, 15, 16, 17, 2], [1, 18, 19, 2], [1, 20, 21, 22, 23, 2]]
LABELS = [0, 1, 2, 0, 1, 2, 1, 0]
STEPS, WARMUP, RATE, HEAD_RATE, DECAY, CLIP, SMOOTHING = 6, 2, 3e-3, 1e-2, 0.05, 0.5, 0.1


def main():
    torch.manual_seed(3)
    torch.set_num_threads(1)
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=12,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-12, initializer_range=0.3)
    model = BertModel(config, add_pooling_layer=False)
    model.save_pretrained(FOLDER)
    head = torch.nn.Linear(16, 3)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)

    model.embeddings.position_embeddings.weight.requires_grad_(False)
    groups = {"decay": [], "plain": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["decay" if parameter.dim() == 2 and "embeddings" not in name else "plain"].append(parameter)
    optimizer = torch.optim.AdamW([
        {"params": groups["decay"], "lr": RATE, "weight_decay": DECAY}, {"params": groups["plain"], "lr": RATE, "weight_decay": 0.0},
        {"params": [head.weight], "lr": HEAD_RATE, "weight_decay": DECAY}, {"params": [head.bias], "lr": HEAD_RATE, "weight_decay": 0.0},
    ], betas=(0.9, 0.98), eps=1e-6)
    peaks = [group["lr"] for group in optimizer.param_groups]

    width = max(map(len, TEXTS))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in TEXTS])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in TEXTS])
    labels = torch.tensor(LABELS)
    losses, norms = [], []
    for step in range(STEPS):
        factor = (step + 1) / WARMUP if step < WARMUP else 1 - (step - WARMUP) / (STEPS - WARMUP)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = (hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
        loss = torch.nn.functional.cross_entropy(head(pooled), labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        everything = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.clip_grad_norm_(everything, CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    golden = {"texts": TEXTS, "labels": LABELS, "losses": losses, "gradient_norms": norms, "classifier_bias": head.bias.tolist(),
              "query_row": model.encoder.layer[1].attention.self.query.weight[3].tolist(), "word_row": model.embeddings.word_embeddings.weight[5].tolist()}
    (FOLDER / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
