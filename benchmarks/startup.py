"""How long `dlmconvert --help` takes, and which imports it spends that time on.

    python benchmarks/startup.py
    python benchmarks/startup.py --words "recipes" --repeats 9
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

TARGET_SECONDS = 0.5
HEAVY = ("torch", "transformers", "numpy", "pydantic", "datasets", "huggingface_hub", "peft", "matplotlib", "deepspeed")


def seconds_of(command: list[str], repeats: int) -> list[float]:
    """Wall times; a first, untimed call fills the file cache and writes the byte code."""
    found = []
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        if repeat:
            found.append(time.perf_counter() - began)
    return found


def imports_of(words: list[str]) -> list[tuple[str, int, int]]:
    """(module, own microseconds, microseconds with all that it imports), as `python -X importtime` tells."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dlmconvert", *words], stdin=subprocess.DEVNULL, capture_output=True, check=True, text=True
    )
    rows = []
    for line in done.stderr.splitlines():
        columns = line.removeprefix("import time:").split("|")
        if len(columns) == 3 and columns[0].strip().isdigit():
            rows.append((columns[2].strip(), int(columns[0]), int(columns[1])))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--words", default="--help", help="what to type after dlmconvert")
    arguments = parser.parse_args()
    words = arguments.words.split()

    script = Path(sys.executable).with_name("dlmconvert")
    installed = str(script) if script.is_file() else shutil.which("dlmconvert")
    command = [installed, *words] if installed else [sys.executable, "-m", "dlmconvert", *words]
    shown = " ".join(["dlmconvert" if installed else "python -m dlmconvert", *words])
    bare = seconds_of([sys.executable, "-c", "pass"], arguments.repeats)
    found = seconds_of(command, arguments.repeats)
    target = f"   target < {TARGET_SECONDS} s" if words == ["--help"] else ""
    print(f"{shown}: best {min(found):.3f} s, median {statistics.median(found):.3f} s of {arguments.repeats}{target}")
    print(f"an empty Python: best {min(bare):.3f} s, median {statistics.median(bare):.3f} s")

    imports = imports_of(words)
    loaded = {name.split(".")[0] for name, _, _ in imports}
    print(f"{len(imports)} imports; heavy ones among them: {', '.join(name for name in HEAVY if name in loaded) or 'none'}\n")
    for title, column in (("own time", 1), ("with what they import", 2)):
        print(f"slowest imports, {title} (ms; tracing itself slows them down)")
        for row in sorted(imports, key=lambda row: -row[column])[:10]:
            print(f"  {row[column] / 1000:7.1f}  {row[0]}")


if __name__ == "__main__":
    main()
