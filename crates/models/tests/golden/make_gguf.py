#!/usr/bin/env python3
"""Makes the files of `gguf/`: small GGUF models of random numbers, with the values and logits of references.

Needs gguf 0.19, transformers 5.24, torch, sentencepiece; `make_gguf.py OUT`, about a minute.

* `blocks.gguf`: a tensor of 2 x 512 values in each block type that is read, from random bytes, and `blocks.json`
  with the values of `gguf.quants.dequantize`.
* `llama.gguf`, `qwen2.gguf`: models of two blocks with tensors in several types, converted as llama.cpp's
  `convert_hf_to_gguf.py` does (rows of queries and keys of `llama` permuted). `logits.json` has the logits of
  transformers for models with the dequantized values, and the tokens of some texts: of the byte-level BPE of
  `qwen2.gguf` by `tokenizers`, of the SentencePiece BPE of `llama.gguf` by sentencepiece itself.
"""
import io, json, pathlib, sys

import gguf, numpy as np, sentencepiece, torch
from gguf import GGMLQuantizationType as T
from gguf import quants
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

TYPES = [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K]
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces, 12345 numbers and it's we'll don't",
    "newlines\n\n and\ttabs; naïve café, Straße, 日本語 \U0001f600!",
    "def f(x):\n    return x * 2  # comment",
    "x",
]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind it's being jumped over.",
    "A model of language is quantized, tuned and merged; the merged model is the tuned model.",
    "def merge(weights): return [weight * scale + zero for weight in weights] # it's 12 or 345 lines",
] * 40


def random_blocks(rng, of, n):
    block, size = gguf.GGML_QUANT_SIZES[of]
    raw = rng.integers(0, 256, (n // block, size), dtype=np.uint8)
    # Scales are f16 of a sensible size, at the places where the block has them.
    half = lambda: np.frombuffer(rng.normal(0, 0.05, n // block).astype(np.float16).tobytes(), np.uint8).reshape(-1, 2)
    places = {T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q2_K: [80, 82],
              T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}[of]
    for place in places:
        raw[:, place : place + 2] = half()
    return raw


def make_blocks(out):
    rng = np.random.default_rng(1)
    writer, values = gguf.GGUFWriter(out / "blocks.gguf", "llama"), {}
    writer.add_uint32("test.number", 7)
    writer.add_array("test.texts", ["a", "", "ü"])
    for of in TYPES:
        if of in (T.F32, T.F16, T.BF16):
            data = quants.quantize(rng.normal(0, 1, (2, 32)).astype(np.float32), of)
        else:
            data = random_blocks(rng, of, 2 * 256).reshape(2, -1)
        writer.add_tensor(of.name, data, raw_dtype=of)
        values[of.name] = [float(f"{x:.9g}") for x in quants.dequantize(data, of).astype(np.float32).ravel().tolist()]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (out / "blocks.json").write_text(json.dumps(values))


def permute(w, heads):
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def name_of(hf):
    path, kind = hf.rsplit(".", 1)
    plain = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if path in plain:
        return f"{plain[path]}.{kind}"
    _, _, block, part = path.split(".", 3)
    return f"blk.{block}.{NAMES[part]}.{kind}"


def write_model(path, arch, model, types, tokenizer):
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    tokenizer(writer)
    state = model.state_dict()
    for at, (name, value) in enumerate(state.items()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = value.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        permuted = arch == "llama" and part in heads
        stored = permute(value, heads[part]) if permuted else value
        of = T.F32 if value.ndim == 1 else types[at % len(types)]
        if name.startswith("model.embed"):
            of = T.Q8_0
        data = quants.quantize(np.ascontiguousarray(stored), of)
        writer.add_tensor(name_of(name), data, raw_dtype=of)
        back = quants.dequantize(data, of).reshape(value.shape)
        if permuted:
            # The inverse of the permutation: (h, d/2, 2) -> (h, 2, d/2).
            n = heads[part]
            back = back.reshape(n, value.shape[0] // n // 2, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        state[name].copy_(torch.from_numpy(np.ascontiguousarray(back)))
    model.load_state_dict(state)
    model.tie_weights()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model, tokens):
    with torch.no_grad():
        return [float(f"{x:.7g}") for x in model(torch.tensor([tokens])).logits[0].flatten().tolist()]


def qwen_tokenizer():
    regex = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(regex), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=352, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def add_qwen_tokenizer(tokenizer):
    def add(writer):
        model = json.loads(tokenizer.to_str())["model"]
        tokens = sorted(model["vocab"], key=model["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)
        writer.add_add_bos_token(False)
        writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")

    return add


def sentence_piece():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=352, byte_fallback=True,
        character_coverage=0.9999, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=True, split_digits=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        hard_vocab_limit=False, allow_whitespace_only_pieces=True,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def add_sentence_piece(spm):
    def add(writer):
        ids = range(spm.vocab_size())
        kind = lambda i: 2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([spm.id_to_piece(i) for i in ids])
        writer.add_token_scores([spm.get_score(i) for i in ids])
        writer.add_token_types([kind(i) for i in ids])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)
        writer.add_add_space_prefix(True)

    return add


def main():
    out = pathlib.Path(sys.argv[1]) / "gguf"
    out.mkdir(parents=True, exist_ok=True)
    make_blocks(out)
    expected = {}
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5)
    torch.manual_seed(2)
    spm = sentence_piece()
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=spm.vocab_size(), tie_word_embeddings=False, **sizes)).eval()
    torch.manual_seed(3)
    tokenizer = qwen_tokenizer()
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=tokenizer.get_vocab_size(), tie_word_embeddings=True, **sizes)).eval()
    for model in (llama, qwen):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    write_model(out / "llama.gguf", "llama", llama, [T.Q4_1, T.Q8_0, T.Q5_1, T.Q4_0], add_sentence_piece(spm))
    write_model(out / "qwen2.gguf", "qwen2", qwen, [T.Q4_1, T.F16, T.Q5_0, T.BF16], add_qwen_tokenizer(tokenizer))
    tokens = list(range(3, 13))
    expected["llama"] = {"logits": logits(llama, tokens), "texts": [[t, spm.encode(t)] for t in TEXTS]}
    expected["qwen2"] = {"logits": logits(qwen, tokens), "texts": [[t, tokenizer.encode(t).ids] for t in TEXTS]}
    (out / "logits.json").write_text(json.dumps(expected))


main()
