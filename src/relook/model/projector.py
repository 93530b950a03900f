"""The conditioned projector: section 3.2 of the paper (https://arxiv.org/abs/2502.17425), one class for all looks.

    c   = Linear_c(LayerNorm_c(h))           h: hidden state of the control token
    y_i = F_i + <F_i, c> c                   F_i: feature token i of the second look

There is no softmax and no scale. Without a condition (alignment stage) y = F. The scalar <F_i, c> is where the second
look went, token by token: it is returned, so that it can be drawn.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

FeatureMap = Literal["linear", "conv", "identity"]


class ConditionedProjector(nn.Module):
    """Brings a second look's features into the language model's space, conditioned on the control token.

    Args:
        feature_dim: channels of the encoder's output.
        hidden_dim: d, the language model's width.
        feature_map: how F is made from the encoder's output.
            "linear": F = Linear_f(LayerNorm_f(x)), x of shape (n, feature_dim)                       (DINOv2)
            "conv": F = Conv2d(kernel 4, stride 4)(LayerNorm_f over channels(x)), x (feature_dim, h, w) (SAM)
            "identity": F = x, x (n, d) the own ViT's merged tokens. The layers exist, unused, as in the checkpoints.
    """

    def __init__(self, feature_dim: int, hidden_dim: int, feature_map: FeatureMap = "linear"):
        super().__init__()
        self.feature_map = feature_map
        self.layernorm_feature = nn.LayerNorm(feature_dim)
        self.linear_feature = nn.Linear(feature_dim, hidden_dim)
        self.layernorm_condition = nn.LayerNorm(hidden_dim)
        self.linear_condition = nn.Linear(hidden_dim, hidden_dim)
        if feature_map == "conv":
            self.conv_feature = nn.Conv2d(feature_dim, hidden_dim, kernel_size=4, stride=4)
        # The published checkpoints store these unused members; frozen, they neither train nor trouble DDP.
        if feature_map != "linear":
            self.linear_feature.requires_grad_(False)
        if feature_map == "identity":
            self.layernorm_feature.requires_grad_(False)

    def project_features(self, x: Tensor) -> Tensor:
        """Encoder output of one image -> F of shape (n, d). (c, 64, 64) gives n = 256, row by row."""
        if self.feature_map == "identity":
            return x
        if self.feature_map == "linear":
            return self.linear_feature(self.layernorm_feature(x))
        x = self.layernorm_feature(x.permute(1, 2, 0)).permute(2, 0, 1)
        return self.conv_feature(x.unsqueeze(0)).flatten(2)[0].transpose(0, 1)

    def condition(self, h: Tensor) -> Tensor:
        """Control state h of shape (d,) -> c of shape (d,)."""
        return self.linear_condition(self.layernorm_condition(h))

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Project one image.

        Returns:
            y of shape (n, d), and <F_i, c> of shape (n,) (None without a condition).
        """
        features = self.project_features(x)
        if h is None:
            return features, None
        c = self.condition(h)
        attention = features @ c
        return features + attention.unsqueeze(-1) * c, attention


@torch.no_grad()
def init_projector_layer(layer: Any) -> None:
    """One layer of a fresh projector, as published: Xavier-uniform weights, zero biases, unit LayerNorms."""
    if isinstance(layer, nn.LayerNorm):
        nn.init.ones_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
