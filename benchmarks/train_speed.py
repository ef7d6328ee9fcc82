"""PyTorch eager beside benchmarks/train_speed.cpp: the same shape, lengths, batch size, optimizer and threads.

usage: python train_speed.py [EXAMPLES]      needs torch and transformers
"""
import sys
import time

import torch
from transformers import BertConfig, BertModel

examples = int(sys.argv[1]) if len(sys.argv) > 1 else 640
torch.manual_seed(0)
config = BertConfig(vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
                    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
model = BertModel(config, add_pooling_layer=False).train()
head = torch.nn.Linear(384, 77)
parameters = list(model.parameters()) + list(head.parameters())
optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.98), fused=True)
lengths = sorted(int(n) for n in torch.randint(8, 25, (examples,)))
batches = [lengths[i:i + 32] for i in range(0, examples, 32)]
start, cpu, tokens = time.time(), time.process_time(), 0
for batch in batches:
    width = max(batch)
    mask = (torch.arange(width)[None, :] < torch.tensor(batch)[:, None]).long()
    ids = torch.randint(1000, 3600, (len(batch), width)) * mask
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    loss = torch.nn.functional.cross_entropy(head(pooled), torch.randint(0, 77, (len(batch),)))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    tokens += sum(batch)
seconds = time.time() - start
print(f"tokens {tokens}  seconds {seconds:.2f}  cpu seconds {time.process_time() - cpu:.2f}  tokens/s {tokens / seconds:.0f}")
