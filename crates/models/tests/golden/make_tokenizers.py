"""Makes `tokenizers`: small tokenizers, with the tokens and texts of transformers.

    make_tokenizers.py

Needs sentencepiece, tokenizers and transformers. Each directory has the files of a model's tokenizer as
they are published, most without a `tokenizer.json`, and `reference.json`: what `AutoTokenizer` makes of texts, and
of tokens.
"""

import io
import json
import random
import shutil
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

HERE = Path(__file__).parent / "tokenizers"

CORPUS = """The quick brown fox jumps over the lazy dog, and the dog sleeps on.
A model of a language predicts the next token of a text from the tokens before it.
She sold 48/2 = 24 clips in May; in April she sold 48, that is 72 altogether.
Übung macht den Meister, sagte der Müller, und mahlte größere Körner als zuvor.
Le garçon naïf a mangé une crêpe où l'été s'achève, n'est-ce pas ?
Быстрая коричневая лиса прыгает через ленивую собаку и убегает в лес.
速い茶色の狐がのろまな犬を飛び越える。日本語の文章には空白がない。
    def forward(self, x):
        return self.norm(x + self.attend(x))  # the residual
It's what they're doing, we've seen; I'd say you'll don't.
""".splitlines()

FIXED = [
    "",
    " ",
    "  ",
    "Hello world",
    " Hello world ",
    "  two  spaces   and\ttabs\n\nlines\r\n",
    "▁ literal ▁▁ space",
    "▁",
    "<s>in the text</s> after",
    "x<unk>y <pad> z<|endoftext|>",
    " <s> <s>a",
    "<u>user<u> defined <u>",
    "<extra>and <|im_start|>user\n",
    "it's we've I'M don't 'twas",
    "123 4567 89,01.5",
    "👩‍👩‍👧‍👦 🇩🇪 🙂é e\u0301 ﷺ ½ ① ﬁ",
    "\u200b\ufeff\u00a0\u3000\u2028|\u0000|\ufffd",
    "日本語の 文章",
    "a<0x41>b<0xFF>",
    "क्षि\u200cत्र ก็ 각 ꦏꦤ\ud7fb \U0001d4d0\U0001f3f4\U000e0067 \u0085x\u180e\u2003 y",
    "’S ſ'ſ ＡＢＣ１２３ ²³ Ⅷ ᾳ ǅ İi ß\r\r\n\n \n x  \n",
    "!?…—\u00ad\u202e.,;\u0600 @@#$%^&* 🏴\ufe0f",
]

ALPHABET = (
    list("aetno  \n.,'12▁")
    + ["é", "ü", "日", "語", "ё", "🙂", "\u200d", "\u0301", "\t", "<s>", "</s>", "<u>", "  ", "ﬁ", "①"]
)


def texts(rng):
    made = ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 14))) for _ in range(40)]
    return FIXED + made


def train(directory, **settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
        character_coverage=0.98,
        **settings,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())


def train_bytes(directory, special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.model.save(str(directory))


def rules(directory):
    """A few replacements, in place of the large table of `nmt_nfkc`."""
    path = directory / "rules.tsv"
    pairs = {"ﬁ": "fi", "①": "1", "\n": " ", "\u3000": " ", "\u200b": "", "é": "e"}
    lines = (
        " ".join(f"{ord(c):X}" for c in a) + "\t" + " ".join(f"{ord(c):X}" for c in b) + "\n"
        for a, b in pairs.items()
    )
    path.write_text("".join(lines))
    return {"normalization_rule_tsv": str(path)}


LLAMA = dict(
    vocab_size=420,
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    split_digits=True,
    allow_whitespace_only_pieces=True,
)
STATED = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
}
OF_OPT = {"content": "</s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def write(directory, name, value):
    (directory / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def llama(d):
    train(d, **LLAMA)
    return "llama", STATED, None


def llama_legacy(d):
    train(d, **LLAMA, user_defined_symbols=["<u>", "▁▁▁"])
    ends = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True}
    return "llama", STATED | {"legacy": True, "add_eos_token": True, "eos_token": ends}, None


def llama_unstated(d):
    train(d, **LLAMA, user_defined_symbols=["<u>"])
    return "llama", None, None


def mistral(d):
    train(d, **LLAMA)
    write(d, "added_tokens.json", {"<extra>": 420})
    special = {"additional_special_tokens": ["<extra>"], "bos_token": dict(OF_OPT, content="<s>")}
    return "mistral", STATED, special


def normalized(d):
    train(d, vocab_size=170, model_type="bpe", **rules(d))
    return "mistral", {"bos_token": "<s>"}, None


def unigram(d):
    train(
        d,
        vocab_size=450,
        model_type="unigram",
        byte_fallback=True,
        user_defined_symbols=["<u>", "▁▁"],
        **rules(d),
    )
    return "mistral", STATED | {"legacy": False}, None


def unigram_plain(d):
    train(d, vocab_size=180, model_type="unigram", add_dummy_prefix=False, normalization_rule_name="identity")
    return "mistral", {"add_bos_token": True}, None


def gpt2(d):
    train_bytes(d, ["<|endoftext|>"])
    write(d, "added_tokens.json", {"   ": 381, "<extra>": 380, "<|im_start|>": 382})
    return "phi", {"tokenizer_class": "CodeGenTokenizer", "add_prefix_space": False}, None


def gpt2_prefix(d):
    train_bytes(d, ["<|endoftext|>"])
    return "gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "add_bos_token": True}, None


def opt(d):
    train_bytes(d, ["<s>", "<pad>", "</s>", "<unk>"])
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    names = {name: dict(OF_OPT, content=token) for name, token in names.items()}
    return "opt", {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}, names


def qwen2(d):
    train_bytes(d, [])
    plain = dict(OF_OPT, normalized=False, special=True)
    added = {"380": dict(plain, content="<|endoftext|>"), "381": dict(plain, content="<|im_start|>"),
             "382": dict(plain, content="<extra>", special=False)}
    stated = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "bos_token": None,
              "eos_token": "<|im_start|>", "pad_token": "<|endoftext|>", "unk_token": None}
    return "qwen2", stated, None


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+"]


def with_regexes(d, regexes, ignore_merges, *more):
    """A `tokenizer.json` whose pre-tokenizer splits by expressions."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, *more, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    bos = ("<|begin_of_text|>", 0)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos[0]} $A", pair="$A $B", special_tokens=[bos]),
        ]
    )
    tokenizer.save(str(d / "tokenizer.json"))
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}
    return "llama", stated | special, None


def llama3(d):
    return with_regexes(d, [LLAMA3], True)


def deepseek(d):
    return with_regexes(d, DEEPSEEK, False, pre_tokenizers.Digits(individual_digits=True))


def reference(directory, rng):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    n = len(tokenizer)
    encoded = [
        {
            "text": text,
            "tokens": tokenizer.encode(text, add_special_tokens=False),
            "with_special": tokenizer.encode(text),
        }
        for text in texts(rng)
    ]
    for case in encoded:
        case["decoded"] = tokenizer.decode(case["tokens"], skip_special_tokens=True)
    drawn = [[rng.randrange(n) for _ in range(rng.randrange(1, 9))] for _ in range(60)]
    decoded = [
        {
            "tokens": tokens,
            "text": tokenizer.decode(tokens, skip_special_tokens=True),
            "with_special": tokenizer.decode(tokens),
        }
        for tokens in drawn
    ]
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {name: getattr(tokenizer, name) for name in names}
    return {"n_tokens": n, "special": special, "encoded": encoded, "decoded": decoded}


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    made = [llama, llama_legacy, llama_unstated, mistral, normalized, unigram, unigram_plain]
    for make in [*made, gpt2, gpt2_prefix, opt, qwen2, llama3, deepseek]:
        directory = HERE / make.__name__
        directory.mkdir(parents=True)
        model_type, stated, special = make(directory)
        (directory / "rules.tsv").unlink(missing_ok=True)
        write(directory, "config.json", {"model_type": model_type})
        if stated is not None:
            write(directory, "tokenizer_config.json", stated)
        if special is not None:
            write(directory, "special_tokens_map.json", special)
        made = reference(directory, random.Random(make.__name__))
        text = json.dumps(made, ensure_ascii=True, separators=(",", ":"))
        (directory / "reference.json").write_text(text.replace('{"text"', '\n{"text"').replace('{"tokens"', '\n{"tokens"') + "\n")


if __name__ == "__main__":
    main()
