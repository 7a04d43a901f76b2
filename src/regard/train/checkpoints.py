"""Checkpoints: what is trained, its optimizer and facts beside them in one safetensors file, moved into place whole.

`Checkpoints.fit` is `loop.fit` for a stage that may be stopped: it goes on behind the last step that was kept.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from regard.core import require
from regard.report.folder import differences
from regard.train.loop import fit


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], optimizer: Optimizer, facts: dict) -> None:
    """Tensors by name, the optimizer's state, and facts that JSON can hold."""
    kept = {f"model.{name}": t.detach().clone().contiguous() for name, t in tensors.items()}
    for i, state in optimizer.state_dict()["state"].items():
        kept |= {f"optimizer.{i}.{name}": t.clone() for name, t in state.items()}
    beside = path.with_name(path.name + ".part")
    save_file(kept, beside, metadata={"facts": json.dumps(facts)})
    os.replace(beside, path)


def facts_of(path: Path) -> dict | None:
    """The facts that a checkpoint was written with; None where there is none."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        held = file.metadata()
        return json.loads(held.get("facts") or held["row"])


@torch.no_grad()
def restore(path: Path, tensors: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Put the numbers of a checkpoint back into these tensors and this optimizer."""
    held: dict[str, Tensor] = {}
    states: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a dict)
            kind, rest = name.split(".", 1)
            if kind == "model":
                held[rest] = file.get_tensor(name)
            else:
                number, field = rest.split(".")
                states.setdefault(int(number), {})[field] = file.get_tensor(name)
    missing = sorted(set(tensors) ^ set(held))
    require(not missing, "the checkpoint holds what is trained", path=str(path), apart=missing[:5])
    for name, tensor in tensors.items():
        tensor.copy_(held[name])
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


@dataclass(frozen=True)
class Checkpoints:
    """A file for each stage in this folder, STAGE.safetensors, replaced every `every` steps; None: nothing is kept.

    about  what the stages are of; a checkpoint of anything else is refused
    """

    folder: Path | None = None
    every: int = 50
    about: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        require(self.every >= 1, "every >= 1", every=self.every)

    def path(self, stage: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{stage}.safetensors"

    def facts(self, stage: str) -> dict:
        """Those of the last step of this stage that was kept; step 0 where there is none."""
        path = self.path(stage)
        held = None if path is None else facts_of(path)
        if held is None:
            return {"step": 0, "losses": [], "seconds": 0.0}
        apart = differences(held["about"], json.loads(json.dumps(dict(self.about or {}))))
        require(not apart, "the checkpoint is of the same work", path=str(path), **apart)
        return held

    def fit(
        self, stage: str, tensors: Mapping[str, Tensor], optimizer: Optimizer, loss_at: Callable[[int], Tensor],
        steps: int, after_step: Callable[[int, float], None], more: Callable[[], dict] = dict, **options: Any,
    ) -> tuple[list[float], float]:  # fmt: skip
        """(the losses of all steps, the seconds that they took), those of an earlier start among them.

        tensors  what is trained, by name; put back from the checkpoint in place
        more     facts of the stage that a later start needs; it finds them in `facts(stage)`
        """
        before, path = self.facts(stage), self.path(stage)
        losses, began = list(before["losses"]), time.perf_counter()
        if before["step"] and path is not None:
            restore(path, tensors, optimizer)

        def kept(step: int, loss: float) -> None:
            losses.append(loss)
            done = step + 1
            if path is not None and (done % self.every == 0 or done == steps):
                facts = {"step": done, "losses": losses, "about": dict(self.about or {}),
                         "seconds": before["seconds"] + time.perf_counter() - began, **more()}  # fmt: skip
                save_checkpoint(path, tensors, optimizer, facts)
            after_step(step, loss)

        fit(optimizer, loss_at, steps, start=before["step"], after_step=kept, **options)
        return losses, before["seconds"] + time.perf_counter() - began
