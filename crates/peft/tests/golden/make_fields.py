"""Makes `fields.json`: the fields of the configurations of PEFT 0.21.2 with their defaults.

python make_fields.py
"""

import dataclasses
import json
import pathlib

from peft import LoraConfig, VeraConfig


def default(field):
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        value = field.default
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


fields = {
    name: {field.name: default(field) for field in dataclasses.fields(config)}
    for name, config in [("LORA", LoraConfig), ("VERA", VeraConfig)]
}
out = pathlib.Path(__file__).parent / "fields.json"
out.write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")
