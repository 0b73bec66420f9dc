#!/usr/bin/env bash
# nbformat 5.11.1: where jupyter-events 0.12.1 is installed too, its import takes eleven times as long.
#
# jupyter-server, and so JupyterLab, requires jupyter-events, which requires jsonschema[format-nongpl]. Since version 4.25
# that extra brings rfc3987-syntax. jsonschema 4.26.0 imports rfc3987-syntax 1.1.0 where it finds it, and that builds an
# Earley parser of IRIs from a grammar file, by lark 1.3.1, at import. nbformat imports jsonschema, and reads notebooks
# without ever asking whether a string is an IRI.
#
# Seen on CPython 3.11.7, x86-64: `import nbformat` takes 0.10 s of processor time alone and 1.14 s
# beside jupyter-events, 11 times as much and nearly what `import torch` takes. 90 % of it is rfc3987_syntax, 1 % lark itself.
# What helps: import nbformat where a notebook is read, not at the top of a command line.
#
# Fails (exit status 1) if the parser is no longer built at import, or takes less than four times as long as all the rest.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PYTHONHOME

for name in alone beside; do
    "${PYTHON:-python3}" -m venv "$folder/$name"
    packages=(nbformat==5.11.1 jsonschema==4.26.0)
    if [ "$name" = beside ]; then
        packages+=(jupyter-events==0.12.1 rfc3987-syntax==1.1.0 lark==1.3.1)
    fi
    "$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
    "$folder/$name/bin/python" -c "import nbformat"  # bytecode is compiled now, not while time is taken
done

cat > "$folder/compare.py" <<'PYTHON'
import re
import subprocess
import sys
from pathlib import Path

folder = Path(sys.argv[1])


def seconds(name: str) -> float:
    """Least processor seconds of five imports of nbformat, the start of the interpreter not counted."""
    code = "import time; start = time.process_time(); import nbformat; print(time.process_time() - start)"
    python = folder / name / "bin" / "python"
    return min(float(subprocess.check_output([python, "-c", code])) for _ in range(5))


def imported(name: str) -> dict[str, int]:
    """Modules that `import nbformat` leaves imported, each with the microseconds that it and its imports took."""
    code = "import sys, nbformat; print(*sys.modules)"
    command = [folder / name / "bin" / "python", "-X", "importtime", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = (re.fullmatch(r"import time:\s+\d+ \|\s+(\d+) \|\s+(\S+)", line) for line in ran.stderr.splitlines())
    return {line[2]: int(line[1]) for line in lines if line and line[2] in ran.stdout.split()}


alone, beside = seconds("alone"), seconds("beside")
modules = {name: imported(name) for name in ("alone", "beside")}
share = modules["beside"].get("rfc3987_syntax", 0) / modules["beside"]["nbformat"]
lark = modules["beside"].get("lark", 0) / modules["beside"]["nbformat"]
print(f"import nbformat, processor seconds: {alone:.2f} alone, {beside:.2f} beside jupyter-events")
print(f"ratio {beside / alone:.0f}; rfc3987_syntax and its imports {share:.0%} of it, importing lark {lark:.0%}")
checks = {
    "alone, jsonschema is imported": "jsonschema" in modules["alone"],
    "alone, rfc3987_syntax is not": "rfc3987_syntax" not in modules["alone"],
    "beside jupyter-events, it is": "rfc3987_syntax" in modules["beside"],
    "it takes most of the time": share > 0.5,
    "building the parser, not importing lark": lark < share / 4,
    "four times the rest, or more": beside > 5 * alone,
}
for words, holds in checks.items():
    print(f"{'holds' if holds else 'CHANGED'}: {words}")
sys.exit(not all(checks.values()))
PYTHON
"$folder/alone/bin/python" "$folder/compare.py" "$folder"
