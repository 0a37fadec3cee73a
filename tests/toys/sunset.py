"""A variant: local causal attention whose heads forget at learned rates, and remember a segment's first tokens."""

import torch
from torch import Tensor, nn

import flexjag as fj


class Sunset(nn.Module):
    """Attention of ``[T, H, D]`` over the last `window` tokens and the first `kept`, minus ``rate[h] * (i - j)``.

    Args:
        heads: H.
        window: Number of earlier tokens a query may attend.
        kept: Number of tokens at a segment's start that all may attend.
    """

    def __init__(self, heads: int, window: int, kept: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.linspace(0.01, 0.1, heads))
        self.mask = fj.Causal() & (fj.Window(window, 0) | fj.Prefix(kept))

    def forward(self, q: fj.Jagged, k: fj.Jagged, v: fj.Jagged) -> fj.Jagged:
        return fj.attention(q, k, v, mask=self.mask, score=fj.Alibi(self.rate))


def sunset_by_formula(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, window: int, kept: int) -> Tensor:
    """The same for one segment ``[n, H, D]``, as the formula reads: what the test compares with."""
    n = q.shape[0]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    s = torch.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5 - rate[:, None, None] * distance
    allowed = (distance >= 0) & ((distance <= window) | (torch.arange(n) < kept))
    return torch.einsum("hij,jhd->ihd", s.masked_fill(~allowed, -torch.inf).softmax(2), v)
