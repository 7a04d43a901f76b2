"""A Slurm of one machine, for tests: sbatch, srun, sacct and scancel as submitit calls them, by the name it is run as.

What is known of jobs lies in the folder $FAKE_SLURM: a file for each job, with its state, and one with its process.
Where $FAKE_SLURM_APART is set the jobs fail as those do that cannot see the folder they were submitted in.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

HOME = Path(os.environ.get("FAKE_SLURM", "/nowhere"))


def sbatch(script: str) -> None:
    text, number = Path(script).read_text(), str(1000 + len(list(HOME.glob("*.job"))))
    (HOME / f"{number}.job").write_text(text)
    array = re.search(r"--array=0-(\d+)%", text)
    names = [f"{number}_{k}" for k in range(int(array[1]) + 1)] if array else [number]
    for name in names:
        (HOME / f"{name}.state").write_text("FAILED" if "FAKE_SLURM_APART" in os.environ else "RUNNING")
        if "FAKE_SLURM_APART" not in os.environ:
            subprocess.Popen(
                [sys.executable, __file__, "job", script, name], start_new_session=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
    print(f"Submitted batch job {number}")


def job(script: str, name: str) -> None:
    """One job of an array, from its start to its state at the end."""
    (HOME / f"{name}.pid").write_text(str(os.getpid()))
    number, _, k = name.partition("_")
    env = {**os.environ, "SLURM_JOB_ID": number, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    if k:
        env |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": k}
    code = subprocess.run(["bash", script], env=env).returncode
    (HOME / f"{name}.state").write_text("COMPLETED" if code == 0 else "FAILED")


def srun(*words: str) -> None:
    number, k = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_TASK_ID", "")
    left, files = list(words), {}
    while left[0].startswith("--"):
        option = left.pop(0)
        if option in ("--output", "--error"):
            path = left.pop(0).replace("%A", number).replace("%a", k).replace("%j", number).replace("%t", "0")
            files[option] = path
    with open(files["--output"], "a") as out, open(files["--error"], "a") as err:
        done = subprocess.run(left, stdout=out, stderr=err)
    raise SystemExit(done.returncode != 0)


def sacct(*_: str) -> None:
    print("JobID|State|NodeList")
    for path in sorted(HOME.glob("*.state")):
        print(f"{path.stem}|{path.read_text()}|here")


def scancel(name: str) -> None:
    os.killpg(int((HOME / f"{name}.pid").read_text()), signal.SIGKILL)
    (HOME / f"{name}.state").write_text("CANCELLED")


def install(folder: Path) -> None:
    """Make the four commands in a folder that is then put on $PATH."""
    for name in ("sbatch", "srun", "sacct", "scancel"):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        (folder / name).chmod(0o755)


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "sacct": sacct, "scancel": scancel, "job": job}[sys.argv[1]](
        *sys.argv[2:]
    )
