#!/usr/bin/env bash
# DuckDB: probabilities behind whole numbers are rounded to 0 and 1, in parquet, JSON and CSV, where other readers raise.
#
# Packages: duckdb 2.0.1, polars 2.1.0, pyarrow 26.0.1. Seen there, and checked by this script:
#   Hard labels, 0 and 1, in a first file and a teacher's probabilities in a second, both parquet with types of their own, are read as one table with
#   the first file's type: 0.73 is 1, and the list [0.73, 0.27] is [1, 0]. In the opposite order they are right, so a listing's order decides, and
#   union_by_name=true takes the type that holds both. polars and pyarrow raise for the same files.
#   In one file of JSON or CSV the first 20480 rows decide (in CSV the header is one of them): probabilities behind so many hard labels are rounded,
#   also in lists. polars raises here, too, and pyarrow reads them right. A half becomes 1 from CSV and 0 from JSON. NaN, 1e30 and text raise an
#   error that names the row, so conversion is checked, only not for fractions. Nothing warns.
#   Right is union_by_name=true for parquet, and sample_size=-1 or a given type for JSON and CSV.
# Printed: for each way and reader, the type and the last row, or the error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q duckdb==2.0.1 polars==2.1.0 polars-runtime-32==2.1.0 pyarrow==26.0.1
cd "$folder"
cat > see.py <<'PY'
import json

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq


def seen(read):
    try:
        result = read()
        if isinstance(result, pl.DataFrame):
            result = result.to_arrow()
        if isinstance(result, pa.Table):
            return str(result.schema.field("p").type), result["p"].to_pylist()[-1]
        return str(result.types[0]), result.fetchall()[-1][0]
    except (duckdb.Error, pl.exceptions.PolarsError, pa.ArrowInvalid) as error:
        return type(error).__name__


def sql(source):
    return seen(lambda: duckdb.sql(f"select p from {source}"))


pq.write_table(pa.table({"p": pa.array([0, 1])}), "hard.parquet")
pq.write_table(pa.table({"p": pa.array([0.2, 0.73])}), "soft.parquet")
pq.write_table(pa.table({"p": pa.array([[0, 1], [1, 0]])}), "hard_lists.parquet")
pq.write_table(pa.table({"p": pa.array([[0.2, 0.8], [0.73, 0.27]])}), "soft_lists.parquet")
two, lists = ["hard.parquet", "soft.parquet"], ["hard_lists.parquet", "soft_lists.parquet"]


def write(name, count, end):
    rows = [{"p": number % 2} for number in range(count)] + [{"p": end}]
    if name.endswith("csv"):
        lines = ["p"] + [str(row["p"]) for row in rows]
    else:
        lines = [json.dumps(row) for row in rows]
    with open(name, "w") as file:
        file.write("\n".join(lines) + "\n")
    return f"'{name}'"


checks = {
    "parquet, hard labels first": (sql(f"read_parquet({two})"), ("BIGINT", 1)),
    "parquet, soft labels first": (sql(f"read_parquet({two[::-1]})"), ("DOUBLE", 1.0)),
    "parquet, union_by_name": (sql(f"read_parquet({two}, union_by_name=true)"), ("DOUBLE", 0.73)),
    "parquet by polars": (seen(lambda: pl.read_parquet(two)), "SchemaError"),
    "parquet by pyarrow": (seen(lambda: pq.read_table(two)), "ArrowInvalid"),
    "parquet of lists, hard labels first": (sql(f"read_parquet({lists})"), ("BIGINT[]", [1, 0])),
    "parquet of lists by pyarrow": (seen(lambda: pq.read_table(lists)), "ArrowInvalid"),
    "JSON, 20479 hard labels": (sql(write("a.jsonl", 20479, 0.73)), ("DOUBLE", 0.73)),
    "JSON, 20480 hard labels": (sql(write("b.jsonl", 20480, 0.73)), ("BIGINT", 1)),
    "JSON, sample_size=-1": (sql("read_json('b.jsonl', sample_size=-1)"), ("DOUBLE", 0.73)),
    "JSON by polars": (seen(lambda: pl.read_ndjson("b.jsonl")), "ComputeError"),
    "JSON by pyarrow": (seen(lambda: pa.json.read_json("b.jsonl")), ("double", 0.73)),
    "CSV, 20478 hard labels": (sql(write("a.csv", 20478, 0.73)), ("DOUBLE", 0.73)),
    "CSV, 20479 hard labels": (sql(write("b.csv", 20479, 0.73)), ("BIGINT", 1)),
    "CSV, sample_size=-1": (sql("read_csv('b.csv', sample_size=-1)"), ("DOUBLE", 0.73)),
    "CSV by polars": (seen(lambda: pl.read_csv("b.csv")), "ComputeError"),
    "CSV by pyarrow": (seen(lambda: pa.csv.read_csv("b.csv")), ("double", 0.73)),
    "JSON, a half": (sql(write("c.jsonl", 20480, 0.5)), ("BIGINT", 0)),
    "CSV, a half": (sql(write("c.csv", 20480, 0.5)), ("BIGINT", 1)),
    "CSV, NaN": (sql(write("d.csv", 20480, "nan")), "ConversionException"),
    "CSV, text": (sql(write("e.csv", 20480, "high")), "ConversionException"),
    "CSV, 1e30": (sql(write("f.csv", 20480, 1e30)), "ConversionException"),
}
for name, (got, _) in checks.items():
    print(f"{name}: {got}")
rows = [{"p": [number % 2, 1 - number % 2]} for number in range(20480)] + [{"p": [0.73, 0.27]}]
with open("lists.jsonl", "w") as file:
    file.write("\n".join(json.dumps(row) for row in rows) + "\n")
got = sql("'lists.jsonl'")
print(f"JSON of lists, 20480 hard labels: {got}")
assert got == ("BIGINT[]", [1, 0]), "behavior has changed"
for name, (got, expected) in checks.items():
    assert got == expected, f"behavior has changed: {name}"
PY
venv/bin/python -W error see.py
