"""Print the table of methods into README.md, between its two marks: `python scripts/readme.py`."""

import json
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- methods -->\n", "<!-- /methods -->"


def table() -> str:
    run = [sys.executable, "-m", "regard.cli", "list", "--markdown"]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout


def main() -> None:
    text = README.read_text(encoding="utf8")
    before, rest = text.split(START)
    README.write_text(before + START + table() + END + rest.split(END)[1], encoding="utf8")
    print(json.dumps({"written": str(README.name)}))


if __name__ == "__main__":
    main()
