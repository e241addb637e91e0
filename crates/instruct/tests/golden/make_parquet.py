"""Writes the Parquet files of the tests, and their rows as JSON, with pyarrow."""

import json
import pathlib

import pyarrow
import pyarrow.parquet

ROWS = [
    {
        "messages": [{"role": "user", "content": "Two plus two?"}, {"role": "assistant", "content": "Four."}],
        "source": "é語",
        "n": 7,
        "score": 0.5,
        "is_kept": True,
        "tags": ["b", "a"],
    },
    {"messages": [{"role": "user", "content": None}], "source": None, "n": -1, "score": None, "is_kept": None, "tags": []},
    {"messages": [], "source": "", "n": 2**40, "score": 1e20, "is_kept": False, "tags": None},
]

here = pathlib.Path(__file__).parent
table = pyarrow.Table.from_pylist(ROWS)
for codec in ["snappy", "none", "zstd"]:
    pyarrow.parquet.write_table(table, here / f"rows_{codec}.parquet", compression=codec, store_schema=False)
(here / "rows.json").write_text(json.dumps(ROWS, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
binary = pyarrow.table({"image": [b"\x00\xff"]})
pyarrow.parquet.write_table(binary, here / "bytes.parquet", store_schema=False)
