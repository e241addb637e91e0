"""What GPTQModel's rules for single layers say of each layer.

    make_dynamic.py CONFIG.PY > dynamic.json

CONFIG.PY is `gptqmodel/quantization/config.py`, of which the functions that match rules are run, with
Python's `re` in the place of its `pcre`. Rules are written as text, because their order counts.
"""

import ast
import json
import re
import sys
import typing
from pathlib import Path

NAMES = {
    "DYNAMIC_FIELD_SYNONYMS",
    "_DYNAMIC_NO_MATCH",
    "_DYNAMIC_PATTERN_CACHE",
    "_DYNAMIC_OVERRIDE_CACHE",
    "_DYNAMIC_EXACT_LOOKUP_CACHE",
    "_DYNAMIC_ALL_EXACT_CACHE",
    "_DYNAMIC_REGEX_PATTERN_CACHE",
    "_extract_literal_regex_pattern",
    "_get_dynamic_patterns",
    "_resolve_dynamic_override",
    "dynamic_get",
}

CASES = [
    {"model.layers.0": {"bits": 8}, "model": {"bits": 2}},
    {"model": {"bits": 2}, "model.layers.0": {"bits": 8}},
    {r"+:.*mlp": {"bits": 8, "group_size": 16}, r"-:.*down_proj": {}},
    {r".*\.(?!down|up)\w+_proj$": {"sym": False}},
    {r"layers\.0": {"bits": 8}, r".*(?<=q)_proj": {"group_size": -1}},
    {r"+:^model\.layers\.1\.mlp\.up_proj$": {"bits": 3}, r".*up_proj": {"bits": 8}},
    {r".*up_proj": {"bits": 8}, r"+:^model\.layers\.1\.mlp\.up_proj$": {"bits": 3}},
    {r"^model\.layers\.1\.mlp\.up$": {"bits": 3}, r"-:^model\.layers\.0\.mlp\.up_proj$": {}},
    {r"+:.*v_proj": {}, r".*[kv]_proj": {"bits": 8, "sym": False, "group_size": 32}},
    {r".*o_proj": {"desc_act": True, "mse": 2.4, "damp_percent": 0.05}},
    {r"-:model\.layers\.1\.": {}, r"+:.*\.(\d+)\.(?i:SELF_attn)": {"bits": 2}},
]

LAYERS = [
    f"model.layers.{block}.{name}_proj"
    for block in range(2)
    for name in [
        *(f"self_attn.{part}" for part in "qkvo"),
        *(f"mlp.{part}" for part in ("gate", "up", "down")),
    ]
]


def functions(source: str) -> dict:
    def is_wanted(node: ast.stmt) -> bool:
        match node:
            case ast.FunctionDef(name=name):
                return name in NAMES
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                return name in NAMES
        return False

    module = ast.parse(source)
    module.body = [node for node in module.body if is_wanted(node)]
    assert len(module.body) == len(NAMES)
    scope = {"pcre": re} | vars(typing)
    exec(compile(module, "config.py", "exec"), scope)
    return scope


def main() -> None:
    scope = functions(Path(sys.argv[1]).read_text())
    cases, kept = [], []
    for rules in CASES:
        # As QuantizeConfig does when it is made. Kept, because caches go by identity.
        first = {k: v for k, v in rules.items() if k.startswith("-")}
        ordered = first | {k: v for k, v in rules.items() if not k.startswith("-")}
        kept.append(ordered)
        layers = {layer: scope["dynamic_get"](ordered, layer) for layer in LAYERS}
        cases.append({"dynamic": json.dumps(rules), "layers": layers})
    json.dump(cases, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
