"""Makes `patterns.json`: what Python's `re` matches, and the layers that PEFT 0.21.2 chooses.

python make_patterns.py
"""

import json
import pathlib
import re

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

# Accepted by Python and refused by name.
REFUSED = [
    r"(?a)\w+", r"(?a:\w+)", r"(q)?(?(1)x|y)", r"\N{LATIN SMALL LETTER Q}_proj", r"(?=q)*q_proj", r"(?:)*q_proj",
    "(" * 61 + "q_proj" + ")" * 61,
]
TEXTS = [
    "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.10.mlp.down_proj",
    "model.vision_tower.layers.0.self_attn.q_proj", "lm_head", "q_proj", "Q_PROJ", "fooq_proj", "aa", "abab", "a{", "a{}",
    "a{x}", "a-b", "a]", "a&&b", "[", "a b", "a#b", "\\d", "1", "x1y", "a.b", "", "aaa", "b", "ab", "q_proj.0.extra",
]
PATTERNS = [
    r"^(?!.*(?:vision|visual|lm_head)).*\.(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$",
    r"(?=.*self_attn).*q_proj", r".*(?<!vision_tower)\.layers.*", r".*(?<=self_attn\.)[qk]_proj", r".*(?<!self_attn\.)q_proj",
    r"(?s:.*)", r"(?i)q_proj", r"(?i:Q)_proj", r"(?-i:Q)_proj", r"(?i)(?-i:q)_PROJ", r"q_proj(?i)", r"x(?i)q", r"(?i)(?s).*proj",
    r"(?im).*PROJ", r"(?x) q _ proj # the query", r"(?x: q _ proj )", r"(?x)a\ b", r"(?x)a[ ]b", r"(?x)a\#b", r"(?-x: a)", r"(?x)(?-x:a b)",
    r"(?i-i:a)", r"(?-:a)", r"(?i-s:A)b", r"(?u)q_proj", r"(?u:q)_proj", r"(?L)a", r"(?z)a", r"(?iz:a)",
    r"model\.layers\.(\d+)\.self_attn\.(q|k)_proj", r"model\.layers\.[01]\..*", r"model\.layers\.1\d*\..*", r".*\.\d{2}\..*", r".*\.\d{2,}\..*",
    r".*\.\d{,1}\..*", r"a{2}", r"a{,2}", r"a{2,}", r"a{,}", r"a{1,2}", r"a{2,1}", r"a{", r"a{}", r"a{x}", r"a{1", r"a{1,x}", r"a{99999999999}",
    r"a**", r"a*?", r"a*+", r"a++a", r"a?+a", r"a{1,2}+a", r"a+?b", r"a*??", r"*a", r"+", r"?", r"{2}a", r"^*", r"$*", r"\b+q", r"\bq_proj\b", r"\b{x}",
    r"(a)\1", r"(a)\1+", r"(?P<x>a)(?P=x)", r"(?P<x>a)(?P=y)", r"(?P<x>a)(?P<x>b)", r"(?P<1>a)", r"(?P<x>", r"(?P>x)", r"(?<x>a)", r"(?'x'a)",
    r"\1(a)", r"(a\1)", r"(a)(b)\2", r"(ab)\1", r"(a)|b\1", r"()\10", r"\01", r"\061", r"\61", r"\161_proj", r"\400", r"\777", r"(a)\g<1>", r"\k<x>",
    r"(?>a+)a", r"(?>a|ab)b", r"(?:a|ab)b", r"(?#comment)q_proj", r"q(?#a)_proj", r"a(?#c)*", r"(?#", r"(?#x)*a",
    r"[a-c]+", r"[c-a]", r"[]a]+", r"[^]a]+", r"[a", r"[]", r"[^]", r"a[]]", r"[a-]b", r"a[-]b", r"[-a]+b", r"[\w.]+", r"[\w-]+", r"[\d-x]", r"[a-\d]",
    r"[[]", r"[[:alpha:]]", r"[[a-z]+", r"a[&&b]+", r"[a&&b]+", r"[a--b]+", r"[a~~b]+", r"[a||b]+", r"[\[\]]", r"[^\n]+", r"[\b]", r"[\B]", r"[\A]", r"[\x61]+", r"[\141]+", r"[\8]",
    r"\x61+", r"\x6", r"\u0061a", r"\U00000061a", r"\u61", r"\x{61}", r"\p{L}+", r"\pL", r"\h", r"\H", r"\R", r"\X", r"\K", r"\G", r"\O", r"\e", r"\Q", r"\z", r"a\z", r"aa\Z",
    r"\Aaa", r"a\Aa", r"\<q", r"\>", r"\_proj", r"q\_proj", r"\-", r"a\-b", r"a\ b", r"\\d", "\\", r"a\.b", r"a.b", r"a\&\&b", r"a\{\}",
    r"q_proj$", r"q_proj^", r"^q_proj", r"a^a", r"a$a", r"(?m)a$", r"$", r"", r"|", r"|a", r"a|", r"a||b", r"(a|)b", r"()", r"(", r")", r"a)", r"(a", r"a)|(b", r"(a))|((b)",
    r"(?=a)aa", r"(?!a)aa", r"(?<=a)b", r"a(?<=a)b", r"a(?<!a)b", r"(?<=a*)b", r"(?<=a|bb)b", r"a(?<=a|b)b", r"a(?<=(a))b", r"a(?<=(a)\1)b", r"(a)(?<=\1)b", r"(?<=^)aa", r"(?<=(?:a){0}a)b", r"a(?<=(?:b*){0}a)b",
    r"(?P<q>q)_(?P<p>proj)", r"(?:q_proj|lm_head)", r"lm_head|q_proj", r"model.*\.(?:q|k)_proj", r"(?s).*", r"\D+", r"\S+", r"\W", r"\w\d\w", r"x\dy", r"(((q)))_proj", r"(?", r"(?:", r"(?<", r"(?P", r"(?i", r"(??", r"(?P=", r"(?P<a",
]


def case(pattern):
    found = {"pattern": pattern, "error": None, "prefixes": [], "wholes": []}
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        found["error"] = str(error)
        return found
    found["prefixes"] = [at for at, text in enumerate(TEXTS) if compiled.match(text)]
    found["wholes"] = [at for at, text in enumerate(TEXTS) if compiled.fullmatch(text)]
    if pattern in REFUSED:
        found["refused"] = True
    return found


# The values of `rank_pattern` for the paths, in the order of the keys, of which JSON keeps the last value.
KEYS = [
    ["q_proj", "layers.1.*"], ["layers.1.*", "q_proj"], ["^model.layers.0.self_attn.q_proj", "q_proj"], ["^q_proj", "q_proj$"],
    ["z.*", ".*proj", "a.*"], ["proj", "_proj"], ["q_proj|k_proj"], ["self_attn.q_proj|down_proj", ".*"], ["b|^model.*", "q_proj"], ["a)|(.*k_proj", ".*"],
    [".*", "q_proj"], ["(?!.*vision).*q_proj", "q_proj"], [".*(?<!vision_tower).layers.0.*", "q_proj"], [r"(.)_proj"], [r"\d+.self_attn.(q|k)_proj"], [r"(q)_proj(?!\3)"], [r"(.)_p.*\1q_proj"],
    [r"(?P<x>q)_proj"], ["[qk]_proj", "[^q]_proj"], ["Q_proj", "(?i:Q)_proj"], ["", "q_proj"], ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.k_proj"],
]


def keys(names):
    pairs = [(name, at + 2) for at, name in enumerate(names)]
    text = "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in pairs) + "}"
    parsed = json.loads(text)
    return {"text": text, "values": [parsed.get(get_pattern_key(parsed.keys(), path)) for path in PATHS]}


PATHS = [text for text in TEXTS if "proj" in text or text == "lm_head"]
CHOSEN = [
    {"target_modules": ["q_proj"]}, {"target_modules": ["self_attn.q_proj"]}, {"target_modules": ["roj"]}, {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q.proj"]}, {"target_modules": [".*"]}, {"target_modules": [""]}, {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    {"target_modules": "q_proj"}, {"target_modules": r".*q_proj"}, {"target_modules": r"(?!.*vision).*\.(q|k)_proj"}, {"target_modules": r"q_proj|.*k_proj"}, {"target_modules": ""},
    {"target_modules": r".*proj", "exclude_modules": ["q_proj"]}, {"target_modules": r".*proj", "exclude_modules": r".*(?<!\.)q_proj"}, {"target_modules": r".*proj", "exclude_modules": []},
    {"target_modules": ["q_proj"], "layers_to_transform": 0}, {"target_modules": ["q_proj", "k_proj", "down_proj"], "layers_to_transform": [1, 10]}, {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "k_proj", "down_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]}, {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "(?<!tower.)layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "vision_tower.layers|layers"}, {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": []},
    {"target_modules": r".*(proj|head)", "modules_to_save": ["lm_head"]}, {"target_modules": r".*(proj|head)", "modules_to_save": ["self_attn"]}, {"target_modules": r".*(proj|head)", "modules_to_save": ["layers.1", "proj"]},
    {"target_modules": r".*(proj|head)", "modules_to_save": ["layers\\.\\d"]}, {"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]},
]


def chosen(config):
    is_target = lambda path: bool(check_target_module_exists(LoraConfig(**config), path))
    return {"config": config, "targets": [path for path in PATHS if is_target(path)]}


golden = {
    "texts": TEXTS,
    "cases": [case(pattern) for pattern in PATTERNS + REFUSED],
    "paths": PATHS,
    "keys": [keys(names) for names in KEYS],
    "chosen": [chosen(config) for config in CHOSEN],
}
# `_ExcludedModule` is false.
out = pathlib.Path(__file__).parent / "patterns.json"
rows = lambda values: "[\n" + ",\n".join("  " + json.dumps(value) for value in values) + "\n ]"
out.write_text("{\n" + ",\n".join(f" {json.dumps(key)}: {rows(value)}" for key, value in golden.items()) + "\n}\n")
