"""A backend from outside the package: dense attention over the whole batch, by the recipe's mods."""

import torch
from torch import Tensor

from flexjag import Softmax
from flexjag.extend import Backend, Case, Promises, Recipe

MOST = 2**24  # scores of a head


def run(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, scale: float, need_rest: bool) -> tuple[Tensor, Tensor]:
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    recipe = recipe.learning_in(wide)
    q, k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (q, k, v))
    s = q @ k.transpose(1, 2) * scale
    zero, *at = (torch.arange(n, device=q.device) for n in (1, *s.shape))
    b, h, i, j = zero[0], at[0][:, None, None], at[1][None, :, None], at[2][None, None]
    if recipe.score_mod is not None:
        s = recipe.score_mod(s, b, h, i, j).to(wide)
    allowed = recipe.mask_mod(b, h, i, j) & (s != -torch.inf)
    some = allowed.any(2, keepdim=True)
    s = torch.where(allowed, s, torch.where(some, -torch.inf, 0.0))
    out, lse = torch.softmax(s, 2) @ v, torch.logsumexp(s, 2)
    lse = lse.masked_fill(~some[..., 0], -torch.inf)
    return out.masked_fill(~some, 0.0).transpose(0, 1).to(dtype), lse.transpose(0, 1)


def refuse(case: Case) -> str | None:
    size = case.layout.num_q * case.layout.num_kv
    return f"it holds at most {MOST} scores of a head, not {size}" if size > MOST else None


PROMISES = Promises(normalizers=(Softmax,), second_order=True, wide=(Softmax,))
TOY = Backend("toy", "dense over the whole batch", "any mask, any score", run, refuse, PROMISES)
