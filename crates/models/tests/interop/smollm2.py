"""References of transformers for SmolLM2 in `DIR/hf`, whose weights are those of a GGUF file: logits, greedy
continuations, tokens and the perplexity of a text, as JSON. `smollm2.py DIR TEXT LINES OUT`."""
import json, math, pathlib, sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at", "The meaning of life",
           "1 + 1 =", "In 1969, humans", "A list of fruits:\n-", "Dear Sir or Madam,", "La vie est"]
dir, text, lines, out = map(pathlib.Path, sys.argv[1:5])
torch.set_num_threads(2)
tokenizer = AutoTokenizer.from_pretrained(dir / "hf")
model = AutoModelForCausalLM.from_pretrained(dir / "hf", dtype=torch.float32).eval()
encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
text = text.read_text()
greedy = []
with torch.no_grad():
    for prompt in PROMPTS:
        ids = torch.tensor([encode(prompt)])
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        greedy.append([ids[0].tolist(), new[0, ids.shape[1]:].tolist()])
    tokens = encode(text[:60000])
    windows = [tokens[i : i + 512] for i in range(0, len(tokens) - 511, 512)]
    losses = [model(torch.tensor([w]), labels=torch.tensor([w])).loss.item() for w in windows]
    logits = model(torch.tensor([windows[0][:32]])).logits[0].flatten().tolist()
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

# That of the model, `smollm`, which transformers does not take over from GGUF.
of_transformers = [encode(line) for line in lines.read_text().splitlines() if line.strip()][:1000]
tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(True), ByteLevel(add_prefix_space=False)])
lines = [line for line in lines.read_text().splitlines() if line.strip()][:1000]
json.dump({
    "prompt": windows[0][:32],
    "logits": logits,
    "greedy": greedy,
    "lines": [[line, encode(line)] for line in lines],
    "of_transformers": of_transformers,
    "text": text[:60000],
    "tokens": len(tokens),
    "windows": len(windows),
    "perplexity": math.exp(sum(losses) / len(losses)),
}, out.open("w"))
