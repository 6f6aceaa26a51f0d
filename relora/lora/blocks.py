"""Adapters of any rank: k blocks of W that train by themselves.

W's rows are cut into k bands, and its columns too. Each band of rows has one block that trains, and
each band of columns: B (k, out/k, in/k) beside A (k,), which holds the band of columns of each
band of rows. So 1/k of W's entries are trained at a time, in a matrix ΔW that may have any rank,
where A and B of as many numbers have rank in/2k; and a gradient of B takes 2mn/k products a token.
A restart moves all blocks on by one band (`draws.draw_a`): after k cycles every entry has trained.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_blocks(weight: Tensor, shrink: float, bands: Tensor, blocks: Tensor) -> Tensor:
    """d·W (out, in) with its blocks added, each entry rounded once to W's dtype: a new matrix.

    Args:
        bands: (k,), of columns; blocks: (k, out/k, in/k).
    """
    whole = weight.mul(shrink).contiguous()
    count, height, width = blocks.shape
    cut = whole.view(count, height, count, width)
    places = torch.arange(count, device=bands.device), slice(None), bands.long()
    exact = torch.promote_types(whole.dtype, blocks.dtype)
    old = weight.reshape(cut.shape)[places].to(exact)
    cut[places] = (old * shrink + blocks).to(whole.dtype)
    return whole


def gradient_of_blocks(gradient: Tensor, x: Tensor, bands: Tensor, shape: torch.Size) -> Tensor:
    """(k, out/k, in/k) from rows (T, out) of the output's gradient and x (T, in)."""
    count, height, width = shape
    rows = gradient.view(-1, count, height).permute(1, 2, 0)
    columns = x.view(-1, count, width).index_select(1, bands.long()).transpose(0, 1)
    return torch.bmm(rows, columns)


def rows_of_blocks(bands: Tensor, blocks: Tensor, first: int, last: int) -> Tensor:
    """Rows first..last of the matrix (out, in) that holds the blocks, and 0 elsewhere."""
    count, height, width = blocks.shape
    rows = blocks.new_zeros(last - first, count * width)
    for index, band in enumerate(bands.long().tolist()):
        start, stop = max(first, index * height), min(last, (index + 1) * height)
        if start < stop:
            part = blocks[index, start - index * height : stop - index * height]
            rows[start - first : stop - first, band * width : (band + 1) * width] = part
    return rows
