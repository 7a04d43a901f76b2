"""Wrong input ends at once: the rule and the value, exit status 2, no traceback, nothing left behind.

The table is run by two processes, which say what each input gave; one of them must not have imported torch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# command, what the error says; {tmp} is an empty folder, {file} a file, {closed} a folder that cannot be written to
WORDS = {
    "compare --model smolm2": "near names: smollm2",
    "compare --model shipped:lmm": "near names: lm",
    "compare --model {tmp}/absent": "the model path is there (path='{tmp}/absent')",
    "compare --model {tmp}": "a model folder holds a config.json",
    "compare --model {tmp}/no.gguf": "the GGUF file is there",
    "compare --model {bare}": "a model folder holds weights: *.safetensors",
    "compare --methods snapkvv": "no method is called 'snapkvv'; near names: snapkv",
    "compare --methods snapkv+adakvv": "no method is called 'adakvv'; near names: adakv",
    "compare --methods ,": "at least one method is named",
    "compare --methods {tmp}/absent.py": "the file of a method is there (path='{tmp}/absent.py')",
    "compare --tasks needel": "no task is called 'needel'; near names: needle",
    "compare --tasks rulr": "near names: ruler",
    "compare --tasks {tmp}/mine.jsonl": "the file of a task is there",
    "compare --lengths abc": "--lengths are whole numbers with commas between (lengths='abc'",
    "compare --lengths 1k": "wrong='1k'",
    "compare --lengths ,": "wrong=''",
    "compare --workers 0": "--workers is 1 or more (workers=0)",
    "compare --samples 0": "--samples is 1 or more (samples=0)",
    "compare --limit 0.001": "--limit is 1 second or more (limit=0.001)",
    "compare --device cudaa": "the device is cpu, cuda, cuda:N or mps (device='cudaa')",
    "compare --dtype float8": "--dtype is one of float32, bfloat16, float16 (dtype='float8')",
    "compare --out {file}": "--out is a folder (out='{file}')",
    "compare --out {file}/deeper": "the output folder can be written to (out='{file}/deeper'",
    "compare --budget 0.5": "No such option: --budget",
    "compare --samples many": "'--samples': Input should be a valid integer",
    "compar": "No such command 'compar'",
    "list --kind cachee": "near names: cache",
    "show snapkvv": "no method is called 'snapkvv'; near names: snapkv",
    "new cachee mine": "near names: cache",
    "report {tmp}/absent": "results.jsonl",
    "board {tmp}": "results.jsonl",
}
VALUES = {
    "compare --device cuda": "a GPU of this number is there, as torch finds them (device='cuda', gpus=0)",
    "compare --budgets 2.5": "a fractional budget lies in (0, 1] (budget=2.5)",
    "compare --budgets ,": "there is at least one budget",
    "compare --budgets 10x": 'a byte budget reads like "64MB"',
    "compare --lengths 256,-1": "lengths are whole numbers, at least 2 tokens",
    "compare --lengths 1": "lengths are whole numbers, at least 2 tokens",
    "compare --lengths 9000": "lengths are within the model's positions; extrapolate=True, --extrapolate asks",
    "compare --methods snapkv:windw=3": "near names: window",
    "compare --methods snapkv:budget=3": "budgets are asked of all methods, with budgets= (method='snapkv', budget=3)",
    "compare --methods snapkv:window": "settings are written name=value",
    "compare --methods gla": "gla is a mechanism page; here stand cache pages",
    "compare --tasks needle:digits=0": "1 <= digits <= 20",
    "compare --tasks {lines}": "line 1: a line is a JSON object",
    "compare --text {tmp}/absent.txt": "the text file exists (path='{tmp}/absent.txt')",
    "compare --text {file}": "at least 200 characters of text (path='{file}', got=5)",
    "compare --text {latin}": "a text file is UTF-8",
    "compare --executor lokal": "no executor is called 'lokal'; near names: local",
    "compare --images {tmp}": "images= is for tasks of images",
    "list --pattern causal": "near names: causal_self",
}
if os.geteuid() != 0:  # who may write everywhere
    WORDS["compare --out {closed}/run"] = "the output folder can be written to (out='{closed}/run'"
RUN = """
import importlib, io, json, sys, time
from contextlib import redirect_stderr, redirect_stdout
from regard.cli import main
import regard.cli.console as console
from rich.console import Console
for name in sys.argv[2:]:
    importlib.import_module(name)
found, waited = {}, None
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    console.err.file = said
    sys.argv = ["regard", *words.split()]
    start = time.process_time()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            main()
        status = None
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        status = f"{type(error).__name__}: {error}"
    console.err.file = None
    found[words] = [status, said.getvalue(), time.process_time() - start]
    if "torch" in sys.modules and waited is None:
        waited = words
print(json.dumps({"found": found, "waited": waited}))
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """What the inputs name."""
    folder = tmp_path_factory.mktemp("places")
    made = {name: folder / name for name in ("tmp", "file", "closed", "bare", "lines", "latin")}
    for name in ("tmp", "closed", "bare"):
        made[name].mkdir()
    made["lines"] = made["lines"].with_suffix(".jsonl")
    made["file"].write_text("short")
    made["lines"].write_text("{")
    made["latin"].write_bytes("é".encode("latin-1") * 300)
    (made["bare"] / "config.json").write_text('{"model_type": "llama"}')
    made["closed"].chmod(0o500)
    return made


def run(table: dict[str, str], places: dict[str, Path], *imported: str) -> dict:
    """What the inputs of a table give, asked one after the other by one process, once it has imported what is named."""
    asked = [words.format(**places) for words in table]
    started = {path: sorted(path.rglob("*")) for path in places.values()}
    environment = {**os.environ, "COLUMNS": "400", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUN, json.dumps(asked), *imported]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=environment, cwd=places["tmp"], check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path: sorted(path.rglob("*")) for path in places.values()} == started, "nothing is left behind"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def words(places) -> dict:
    return run(WORDS, places)


@pytest.fixture(scope="module")
def values(places) -> dict:
    return run(VALUES, places, "regard.bench.compare")


def check(asked: str, wanted: str, found: dict, places: dict[str, Path]) -> None:
    status, said, took = found["found"][asked.format(**places)]
    assert wanted.format(**places) in " ".join(said.split()), said
    assert status == 2 and "Traceback" not in said
    assert took < 3, f"{took:.1f} s of the processor"


@pytest.mark.parametrize("asked", WORDS)
def test_a_wrong_word_is_found_at_once(asked, words, places):
    check(asked, WORDS[asked], words, places)


@pytest.mark.parametrize("asked", VALUES)
def test_a_wrong_value_is_found_before_the_work(asked, values, places):
    check(asked, VALUES[asked], values, places)


def test_no_word_waits_for_torch(words, values):
    assert words["waited"] is None and values["waited"] is not None
    assert len(WORDS) + len(VALUES) >= 40
