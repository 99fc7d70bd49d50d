#!/usr/bin/env bash
# polars: probabilities behind integers become 0, in the mode that promises an error.
#
# Packages: polars 2.1.0. Seen there, and checked by this script:
#   Labels of a distillation are often hard in some rows, [1, 0], and a teacher's in others, [0.7, 0.3]. strict=True, the default, is documented to
#   throw an error if a value does not match the inferred type exactly. A column of such lists is List(Int64) as soon as its first row is of ints,
#   however few rows there are: [0.7, 0.3] becomes [0, 0], without an error or a warning. pl.Series, pl.DataFrame of columns and from_dicts do this.
#   Numbers in rows (from_dicts, DataFrame of dicts or tuples) are safe while one of the first 100 rows has a float. Beyond that each float loses its
#   fraction: 0.73 is 0, and so is the string "0.73". NaN and other strings raise ComputeError. A flat column, and one list of ints and floats,
#   raise TypeError.
#   strict=False, which is documented to cast what does not match, makes floats of a column, also of lists, all of them right. Rows stay wrong.
#   Right for rows is a schema with a type, or infer_schema_length=None. read_ndjson of the same rows raises.
# Printed: for each way, the type and the last row, or the error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q polars==2.1.0 polars-runtime-32==2.1.0
cd "$folder"
cat > see.py <<'PY'
import json
import math

import polars as pl


def last(make):
    try:
        column = make()
    except (TypeError, pl.exceptions.ComputeError) as error:
        return type(error).__name__
    if isinstance(column, pl.DataFrame):
        column = column["p"]
    value = column[-1]
    return str(column.dtype), value.to_list() if isinstance(value, pl.Series) else value


def rows(count, end):
    return [{"p": 1}] * count + [{"p": end}]


lists = [[1, 0], [0.7, 0.3]]
with open("rows.jsonl", "w") as file:
    file.write("\n".join(json.dumps(row) for row in rows(100, 0.73)))
floats, ints = ("List(Float64)", [0.7, 0.3]), ("List(Int64)", [0, 0])
ways = {
    "Series of two lists": (lambda: pl.Series(lists), ints),
    "Series of two lists, strict=False": (lambda: pl.Series(lists, strict=False), floats),
    "DataFrame of a column of two lists": (lambda: pl.DataFrame({"p": lists}), ints),
    "DataFrame of a column of two lists, strict=False": (lambda: pl.DataFrame({"p": lists}, strict=False), floats),
    "from_dicts, 100 lists of ints first": (lambda: pl.from_dicts([{"p": [1, 0]}] * 100 + [{"p": [0.7, 0.3]}]), ints),
    "from_dicts, 99 ints first": (lambda: pl.from_dicts(rows(99, 0.73)), ("Float64", 0.73)),
    "from_dicts, 100 ints first": (lambda: pl.from_dicts(rows(100, 0.73)), ("Int64", 0)),
    "from_dicts, 100 ints first, strict=True": (lambda: pl.from_dicts(rows(100, 0.73), strict=True), ("Int64", 0)),
    "DataFrame of dicts, 100 ints first": (lambda: pl.DataFrame(rows(100, 0.73)), ("Int64", 0)),
    "DataFrame of tuples, 100 ints first": (lambda: pl.DataFrame([(1,)] * 100 + [(0.73,)], schema=["p"], orient="row"), ("Int64", 0)),
    "from_dicts, -2.9 after 100 ints": (lambda: pl.from_dicts(rows(100, -2.9)), ("Int64", -2)),
    "from_dicts, the string 0.73 after 100 ints": (lambda: pl.from_dicts(rows(100, "0.73")), ("Int64", 0)),
    "from_dicts, the string high after 100 ints": (lambda: pl.from_dicts(rows(100, "high")), "ComputeError"),
    "from_dicts, 100 ints first, strict=False": (lambda: pl.from_dicts(rows(100, 0.73), strict=False), ("Int64", 0)),
    "from_dicts, NaN after 100 ints": (lambda: pl.from_dicts(rows(100, math.nan)), "ComputeError"),
    "Series of numbers": (lambda: pl.Series([1, 0.73]), "TypeError"),
    "Series of numbers, strict=False": (lambda: pl.Series([1, 0.73], strict=False), ("Float64", 0.73)),
    "Series of one list of both": (lambda: pl.Series([[1, 0.73]]), "TypeError"),
    "from_dicts with a type": (lambda: pl.from_dicts(rows(100, 0.73), schema={"p": pl.Float64}), ("Float64", 0.73)),
    "from_dicts, infer_schema_length=None": (lambda: pl.from_dicts(rows(100, 0.73), infer_schema_length=None), ("Float64", 0.73)),
    "read_ndjson, 100 ints first": (lambda: pl.read_ndjson("rows.jsonl"), "ComputeError"),
}
changed = False
for name, (make, expected) in ways.items():
    got = last(make)
    print(f"{name}: {got}")
    changed |= got != expected
text = " ".join(pl.from_dicts.__doc__.split())
assert "strict : bool, default True Throw an error if any `data` value does not exactly match" in text, "documentation has changed"
assert not changed, "behavior has changed"
PY
venv/bin/python -W error see.py
