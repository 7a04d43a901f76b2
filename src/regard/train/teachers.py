"""A pupil beside a model's own attention, in every module: what a mechanism learns from softmax before it acts.

The model answers as it does; each call of an attention module is a step's loss for the parts of that layer alone.
"""

import torch
from torch import Tensor

from regard.attaching.actors import AttentionCall
from regard.attaching.function import native
from regard.attaching.ledger import LedgerLayer
from regard.attaching.replacement import Replacement, has_own_mask, without
from regard.attaching.unrotated import unrotated
from regard.core import Method, Unsupported
from regard.core.call import Call
from regard.kinds.mechanism import run
from regard.ops import lower_right, masked_softmax, scores
from regard.ops.blocks import largest_weights, placed

TINY = 1e-9  # a weight counts as at least this in the cross-entropy
# the share of a text whose blocks of queries teach no gate: they have few blocks to tell apart
SKIPPED = 0.25


class Teacher(Replacement):
    """Softmax as it is, and beside it a pupil in every attention module: each call is a step's loss for one layer."""

    layer = LedgerLayer

    def __init__(self, method: Method, target: str, seed: int) -> None:
        super().__init__()
        self.name = method.name
        self.method, self.target, self.seed = method, target, seed
        self.params: dict[str, dict[str, Tensor]] = {}
        self.losses: dict[str, float] = {}
        self.teaching = False

    def compute(self, call: AttentionCall) -> Tensor:
        out = native(call)[0].transpose(1, 2)
        if call.name not in self.params:
            self.params[call.name] = self.start(call)
        if self.teaching:
            with torch.enable_grad():
                loss = self.loss(call, out)
                # of this layer's parameters only
                loss.backward()
            self.losses[call.name] = loss.item()
        return out

    def start(self, call: AttentionCall) -> dict[str, Tensor]:
        q, k, v = call.q, call.k, call.v
        dims = {"heads": q.shape[1], "kv_heads": k.shape[1], "key": q.shape[3], "value": v.shape[3]}
        dims["width"] = layer_input(call).shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            params = self.method.page.init(self.method.config, dims)
        return {n: p.to(q.device).requires_grad_(p.is_floating_point()) for n, p in params.items()}

    def loss(self, call: AttentionCall, out: Tensor) -> Tensor:
        there = call.token_mask(False)
        rows = None if there is None else there.transpose(2, 3)  # [B, 1, N, 1]
        v = call.v
        # the weights of a mechanism are its outputs for the unit vectors
        if self.target == "weights":
            n = v.shape[2]
            v = torch.eye(n, device=v.device).expand(*v.shape[:2], n, n)
        x = layer_input(call).float() if self.method.page.reads_x(self.method.config) else None
        q, k, v = call.scaled().float(), call.k.float(), v.float()
        result = run(self.method, q, k, v, mask=there, params=self.params[call.name], x=x)[0]
        if self.target == "output":
            error, size = (result - out.float()).square(), out.float().square()
            if rows is not None:
                error, size = error * rows, size * rows
            return error.sum() / size.sum().clamp(min=TINY)
        sees = lower_right(result.shape[2], result.shape[3], q.device)[None, None]
        sees = sees if there is None else sees & there
        wanted = masked_softmax(
            scores(call.q.float(), k, call.options.get("scaling") or q.shape[-1] ** -0.5), sees
        )
        each = -(wanted * result.clamp(min=TINY).log()).sum(-1, keepdim=True)
        return each.mean() if rows is None else (each * rows).sum() / (rows.sum() * each.shape[1])


class GateTeacher(Teacher):
    """For a page with a gate over blocks: KL of the largest weight of each, rows made to sum to one, from the gate.

    Layers with a mask of their own keep it when such a page is attached, and have nothing to learn.
    """

    def __init__(self, method: Method, seed: int) -> None:
        super().__init__(method, "blocks", seed)
        self.needs_rotary = method.page.needs_unrotated

    def check_call(self, call: AttentionCall) -> None:
        if not has_own_mask(call):
            # a learned sink takes the same share of every block's weights
            super().check_call(without(call, "s_aux"))

    def compute(self, call: AttentionCall) -> Tensor:
        return native(call)[0].transpose(1, 2) if has_own_mask(call) else super().compute(call)

    def loss(self, call: AttentionCall, out: Tensor) -> Tensor:
        page, cfg = self.method.page, self.method.config
        q, k = call.scaled().float(), call.k.float()
        raw = unrotated(self.name, call, call.k) if self.needs_rotary else (call.q, call.k)
        there = call.token_mask(False)
        asked = Call(
            key_mask=None if there is None else there[:, :, 0], params=self.params[call.name],
            unrotated=(raw[0].float(), raw[1].float()),
        )  # fmt: skip
        with torch.no_grad():
            at = placed(q, k, k, asked, cfg.block_q)
            wanted = largest_weights(at, cfg.block_q, cfg.block_k)
            wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=TINY)
            skipped = (SKIPPED * at.length / cfg.block_q).long()[:, None]
            taught = at.first(cfg.block_q)[:, 0, :, 0] < at.length[:, None]
            taught &= torch.arange(taught.shape[1], device=q.device) >= skipped
        given = page.gate(at, cfg, asked).log_softmax(-1).masked_fill(wanted == 0, 0.0)
        each = (wanted * (wanted.clamp(min=TINY).log() - given)).sum(-1)  # [B, H, I]
        return (each * taught[:, None]).sum() / (taught.sum() * each.shape[1]).clamp(min=1)


def layer_input(call: AttentionCall) -> Tensor:
    if call.x is None:
        raise Unsupported(f"{call.where} hands over no layer input, which a conversion reads")
    return call.x
