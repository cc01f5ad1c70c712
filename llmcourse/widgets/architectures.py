"""Three architectures in one picture: what each may look at, and what one looked at while it wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmcourse.models.inspect_attention import attention_maps
from llmcourse.train.tasks import DATE_CHARACTERS, Batch
from llmcourse.widgets.attention_patterns import heat_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmcourse.models.encoder_decoder import EncoderDecoder


def draw_architectures(writer: EncoderDecoder, dates: Batch) -> tuple[Figure, Axes]:
    """The masks of an encoder and a decoder, and `writer`'s cross-attention on the first of some dates.

    Returns the figure, and an empty axes on its right for curves.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(9.6, 3), width_ratios=[0.5, 0.5, 1.15, 1.3])
    full = torch.ones(8, 8)
    for ax, name, mask in ((axes[0], "encoder", full), (axes[1], "decoder", full.tril())):
        ax.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1.4)
        ax.set(title=f"{name}\nmay look", xticks=[], yticks=[])
    source, target, lengths = (t[:1] for t in dates.inputs)
    maps = attention_maps(writer, source, target, lengths, cross=True)[-1].mean(0)
    n = int(lengths[0])
    read, written = ([DATE_CHARACTERS[i] for i in row[0].tolist()] for row in (source, target))
    heat_map(axes[2], maps[:, :n], written, columns=read[:n])
    axes[2].set(
        title="encoder-decoder: looked at\nwhile writing the next character", xlabel="", ylabel="written"
    )
    return figure, axes[3]
