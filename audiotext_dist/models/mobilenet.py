"""MobileNetV3 over log-mel energies, as EfficientAT trains it (Schmid, Koutini, Widmer 2023, arXiv:2211.04772).

    waveform -> PaSST's log-mel [N, 1, mel, time] -> MobileNetV3-Large -> mean over time and frequency

Shapes: N clips, C channels, F and T of the feature map.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Self

from torch import Tensor, nn

from audiotext_dist.errors import require_positive
from audiotext_dist.models.frontends import LogMel, LogMelConfig, resampled

# Howard et al. 2019, Table 1: in, kernel, expanded, out, squeeze-and-excitation, activation, stride.
_LARGE = (
    (16, 3, 16, 16, False, "RE", 1),
    (16, 3, 64, 24, False, "RE", 2),
    (24, 3, 72, 24, False, "RE", 1),
    (24, 5, 72, 40, True, "RE", 2),
    (40, 5, 120, 40, True, "RE", 1),
    (40, 5, 120, 40, True, "RE", 1),
    (40, 3, 240, 80, False, "HS", 2),
    (80, 3, 200, 80, False, "HS", 1),
    (80, 3, 184, 80, False, "HS", 1),
    (80, 3, 184, 80, False, "HS", 1),
    (80, 3, 480, 112, True, "HS", 1),
    (112, 3, 672, 112, True, "HS", 1),
    (112, 5, 672, 160, True, "HS", 2),
    (160, 5, 960, 160, True, "HS", 1),
    (160, 5, 960, 160, True, "HS", 1),
)


@dataclass(frozen=True, kw_only=True)
class MobileNetConfig:
    """MobileNetV3-Large; the defaults are mn10_as.

    width_factor: on every number of channels. batch_norm: ``fixed`` normalises with the statistics that came with the
    weights, so that a clip's embedding depends on no other clip; ``batch``, to train from scratch, with those of the
    clips that a process holds at once, whose running means over all processes serve evaluation.
    """

    sample_rate_hz: int = 32000
    width_factor: float = 1.0
    batch_norm: Literal["fixed", "batch"] = "fixed"
    log_mel: LogMelConfig = field(default_factory=LogMelConfig)

    def __post_init__(self) -> None:
        require_positive(self, "mobilenet", "sample_rate_hz", "width_factor")


class MobileNetTower(nn.Module):
    """Waveforms to embeddings, not normalised. Padding is silence to it.

    ``features`` has the parameters' names of the published weights, whose classifier it leaves out.
    """

    def __init__(self, config: MobileNetConfig, sample_rate_hz: int) -> None:
        from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
        from torchvision.ops.misc import Conv2dNormActivation

        super().__init__()
        self.config = config
        self.sample_rate_hz = sample_rate_hz
        self.log_mel = LogMel(config.log_mel, config.sample_rate_hz)
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
        blocks = [InvertedResidualConfig(*row, dilation=1, width_mult=config.width_factor) for row in _LARGE]
        first, last = blocks[0].input_channels, blocks[-1].out_channels
        self.embed_dim: int = 6 * last
        outer = partial(Conv2dNormActivation, norm_layer=norm, activation_layer=nn.Hardswish)
        self.features = nn.Sequential(
            outer(1, first, kernel_size=3, stride=2),
            *(InvertedResidual(block, norm, _named_excitation) for block in blocks),
            outer(last, self.embed_dim, kernel_size=1),
        )
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for statistics that are fixed."""
        super().train(mode)
        if self.config.batch_norm == "fixed":
            self.features.eval()
        return self

    def forward(
        self, waveform_NS: Tensor, num_valid_samples_N: Tensor, mask_uniforms_N4: Tensor | None = None
    ) -> Tensor:
        """[N, embed_dim].

        Args:
            waveform_NS: int16, or float in [-1, 1], zeros after each clip's end.
            mask_uniforms_N4: in [0, 1), of which two place the ends of the mel band; None: the band of evaluation.
        """
        waveform_NS = resampled(waveform_NS, self.sample_rate_hz, self.config.sample_rate_hz)
        band_uniforms_N2 = None if mask_uniforms_N4 is None else mask_uniforms_N4[:, :2]
        features_NCFT = self.features(self.log_mel(waveform_NS, band_uniforms_N2))
        embedding_NC: Tensor = features_NCFT.mean(dim=(2, 3))
        return embedding_NC


class SqueezeExcitation(nn.Module):
    """Each channel times a number in (0, 1) that all channels' means decide (Hu et al. 2018)."""

    def __init__(self, num_channels: int, num_squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(num_channels, num_squeezed), nn.Linear(num_squeezed, num_channels)

    def forward(self, features_NCFT: Tensor) -> Tensor:
        """As large as its input."""
        scale_NC = self.fc2(self.fc1(features_NCFT.mean(dim=(2, 3))).relu()).sigmoid()
        scaled_NCFT: Tensor = scale_NC[:, :, None, None] * features_NCFT
        return scaled_NCFT


def _named_excitation(num_channels: int, num_squeezed: int) -> nn.Module:
    """Under its published name: EfficientAT could have several at once, over time and frequency as well."""
    return nn.Sequential(OrderedDict(conc_se_layers=nn.Sequential(SqueezeExcitation(num_channels, num_squeezed))))
