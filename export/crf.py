"""The dense CRF's factorised backend as one ONNX graph, for the GPU.

Inputs are ``tiles`` uint8 (N, H, W, C), ``scores`` float32 (N, K, H, W), probabilities, and for
each tile the slide's ``landmarks`` float32 (N, L, C) and their ``whitening`` (N, L, L), which
`find_landmarks` and `whiten` of ``runtime/crf/factorised.py`` return. Output is ``probabilities``
float32 (N, K, H, W). The grid is fixed in the graph, so a tile's first pixel has to lie at
multiples of `stride_px` in the slide. Matrix products, convolutions and elementwise nodes only.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histostream.export.graph import GraphError
from histostream.export.onnx import to_onnx
from histostream.runtime.crf import SMALLEST_PROBABILITY, CrfParams
from histostream.runtime.crf.factorised import LANDMARKS, make_grid, stride_px
from histostream.runtime.crf.gaussian import Smoothness


def export_crf(
    params: CrfParams,
    *,
    classes: int,
    tile_px: int,
    channels: int = 3,
    landmarks: int = LANDMARKS,
) -> onnx.ModelProto:
    """Export the CRF of square tiles; N is dynamic, all else is fixed.

    The graph has no guard: where landmarks of the slide miss a colour (``1 - |psi|^2``, see
    ``runtime/crf/factorised.py``), that pixel is not linked to others by the appearance kernel.

    Parameters
    ----------
    params
        Of the CRF; both kernels need a weight.
    classes
        K >= 2.
    tile_px
        Side of the tiles, halo included.
    channels
        3, or 1 for grey.
    landmarks
        L.

    Raises
    ------
    GraphError
        If there are fewer than two classes, or a kernel has no weight.
    """
    if classes < 2:
        raise GraphError(
            f"a CRF of {classes} classes: it chooses among two or more; give two or more"
        )
    if not (params.w1 and params.w2):
        raise GraphError(
            f"a CRF with w1={params.w1:g} and w2={params.w2:g}: "
            "the graph is made for both kernels; give both more than 0"
        )
    # Two tiles, because the exporter takes a dimension of 1 for a constant.
    inputs = {
        "tiles": torch.zeros((2, tile_px, tile_px, channels), dtype=torch.uint8),
        "scores": torch.full((2, classes, tile_px, tile_px), 1 / classes),
        "landmarks": torch.zeros((2, landmarks, channels)),
        "whitening": torch.zeros((2, landmarks, landmarks)),
    }
    network = CrfNetwork(params, classes, tile_px)
    model = to_onnx(network, tuple(inputs.values()), inputs, "probabilities")
    onnx.helper.set_model_props(model, {"crf_stride_px": str(stride_px(params.theta_alpha))})
    return model


class CrfNetwork(nn.Module):
    """The mean field of ``runtime/crf/factorised.py``, step by step, for square tiles."""

    hats: Tensor
    blur: Tensor
    taps: Tensor
    smooth_scale: Tensor
    smooth_ones: Tensor

    def __init__(self, params: CrfParams, classes: int, tile_px: int) -> None:
        super().__init__()
        self.params, self.tile_px, self.filtered = params, tile_px, classes - 1
        grid = make_grid(0, tile_px, params.theta_alpha)
        self.cells, self.stride = grid.cells, len(grid.hats)
        hats = (grid.hats[:, None, :, None] * grid.hats[:, None, :]).reshape(-1, 1, 4)
        smoothness = Smoothness(params.theta_gamma, (tile_px, tile_px))
        taps = np.concatenate([smoothness.taps[:0:-1], smoothness.taps])
        scale = np.outer(smoothness.scale_y, smoothness.scale_x)
        for name, value in {
            "hats": hats, "blur": grid.blur, "smooth_scale": scale,
            "taps": np.tile(taps, (self.filtered, 1, 1, 1)),
            "smooth_ones": params.w2 * smoothness.ones,
        }.items():  # fmt: skip
            self.register_buffer(name, torch.from_numpy(value.astype(np.float32)))

    def forward(
        self, tiles: Tensor, scores: Tensor, landmarks: Tensor, whitening: Tensor
    ) -> Tensor:
        """Map tiles (N, H, W, C) and scores (N, K, H, W) to probabilities (N, K, H, W)."""
        energies = torch.log(scores.clamp(SMALLEST_PROBABILITY, 1.0))
        psi = self.embed(tiles, landmarks, whitening)
        own = (1 - (psi * psi).sum(dim=-1)).clamp(min=0.0).unsqueeze(1)  # (N, 1, H, W)
        ones = torch.ones_like(own)
        psi = self.to_cells(psi)
        scale = self.appearance(ones, psi, own).clamp(min=1.0).rsqrt()
        psi = psi * self.to_cells(scale.permute(0, 2, 3, 1))
        own = own * scale * scale

        w1, w2 = self.params.w1, self.params.w2
        message_of_ones = w1 * self.appearance(ones, psi, own) + self.smooth_ones
        q = torch.softmax(energies, dim=1)
        for _ in range(self.params.n_iter):
            some = q[:, : self.filtered]
            messages = w1 * self.appearance(some, psi, own) + w2 * self.smooth(some)
            last = message_of_ones - messages.sum(dim=1, keepdim=True)
            q = torch.softmax(energies + torch.cat([messages, last], dim=1), dim=1)
        return q

    def embed(self, tiles: Tensor, landmarks: Tensor, whitening: Tensor) -> Tensor:
        """Psi of each pixel, (N, H, W, L)."""
        pixels = tiles.flatten(1, 2).float()
        squares = torch.zeros(1)
        for channel in range(tiles.shape[3]):
            difference = pixels[:, :, None, channel] - landmarks[:, None, :, channel]
            squares = squares + difference.square()
        near = torch.exp(squares * (-0.5 / self.params.theta_beta**2))
        return _split(near @ whitening, 1, self.tile_px, self.tile_px)

    def to_cells(self, pixels: Tensor) -> Tensor:
        """Cut pixels (N, H, W, C) into cells of the grid: (N, cells^2, stride^2, C)."""
        missing = self.cells * self.stride - self.tile_px
        padded = F.pad(pixels, (0, 0, 0, missing, 0, missing))
        cells = _split(padded, 2, self.cells, self.stride)
        cells = _split(cells, 1, self.cells, self.stride)
        return cells.permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3)

    def to_planes(self, cells: Tensor) -> Tensor:
        """Undo `to_cells`, and put the channels first: (N, C, H, W)."""
        pixels = _split(cells, 2, self.stride, self.stride)
        pixels = _split(pixels, 1, self.cells, self.cells).permute(0, 5, 1, 3, 2, 4)
        return pixels.flatten(4, 5).flatten(2, 3)[:, :, : self.tile_px, : self.tile_px]

    def appearance(self, planes: Tensor, psi: Tensor, own: Tensor) -> Tensor:
        """Filter planes (N, C, H, W)."""
        channels, landmarks, cells = planes.shape[1], psi.shape[3], self.cells
        values = self.to_cells(planes.permute(0, 2, 3, 1))
        shares = (values.unsqueeze(-1) * self.hats).flatten(3)
        sums = _split(psi.transpose(2, 3) @ shares, 1, cells, cells)
        sums = _split(sums, 4, channels, 4)  # (N, rows, columns, L, C, corners)
        corners = [
            F.pad(sums[..., 2 * down + right].flatten(3), (0, 0, right, 1 - right, down, 1 - down))
            for down in range(2)
            for right in range(2)
        ]
        nodes = corners[0] + corners[1] + corners[2] + corners[3]
        nodes = _split(self.blur @ nodes.flatten(2), 2, cells + 1, -1)
        nodes = _split(self.blur @ nodes, 3, landmarks, channels)
        around = torch.stack(
            [
                nodes[:, down : down + cells, right : right + cells]
                for down in range(2)
                for right in range(2)
            ],
            dim=-1,
        )
        found = psi @ around.flatten(1, 2).flatten(3)
        found = (_split(found, 3, channels, 4) * self.hats).sum(dim=-1)
        return self.to_planes(found) + own * planes

    def smooth(self, planes: Tensor) -> Tensor:
        """Filter planes (N, K - 1, H, W) with the smoothness kernel."""
        radius = self.taps.shape[-1] // 2
        down, across = self.taps.transpose(2, 3), self.taps
        planes = F.conv2d(
            planes * self.smooth_scale, down, padding=(radius, 0), groups=self.filtered
        )
        planes = F.conv2d(planes, across, padding=(0, radius), groups=self.filtered)
        return planes * self.smooth_scale


def _split(tensor: Tensor, dim: int, *sizes: int) -> Tensor:
    """`Tensor.unflatten`, which has no types."""
    return tensor.reshape(*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :])
