"""The outputs of mask transformers: each query predicts a class and a mask.

Cheng et al. 2021 (MaskFormer), https://arxiv.org/abs/2107.06278

In training, a mask transformer's dict has beside ``out`` the predictions of each supervised layer,
which the loss ``mask_classification`` scores. :class:`segkit.models.segmenter.Segmenter` does not
resize them.

Shape:
    query_classes: (layers, B, queries, classes + 1), logits; the last class is "no object"
    query_masks: (layers, B, queries, h, w), logits

Binary models (``num_classes=1``) have queries of two classes, background and foreground.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from segkit.models.layers import full_precision

QUERY_OUTPUTS = ("query_classes", "query_masks")
"""The names of these outputs in a decoder's dict."""


class QueryClassifier(nn.Linear):
    """The linear layer that computes the class logits of queries, "no object" last."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__(inputs, max(2, num_classes) + 1)


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers of these widths, with activations between them."""
    layers = ((nn.Linear(*sizes), activation()) for sizes in itertools.pairwise(widths))
    return nn.Sequential(*itertools.chain(*layers))[:-1]


def semantic_logits(query_classes: Tensor, query_masks: Tensor, *, num_classes: int) -> Tensor:
    """Return log-probabilities of classes, up to a constant per pixel, from those of queries.

    The probability of a class is the sum over queries of the class's probability times the mask's,
    divided by the sum of this over the classes. Softmax of the result is that probability; with
    one plane (``num_classes=1``), sigmoid of it is the foreground's.

    Shape:
        query_classes, query_masks: of a single layer, as above
        result: (B, num_classes, h, w), in the type of the masks, computed in at least float32
    """
    with full_precision(query_classes, query_masks) as (classes, masks):
        shares = torch.einsum("bqc,bqhw->bchw", classes.softmax(2)[..., :-1], masks.sigmoid())
        logits = shares.clamp_min(1e-12).log()
        if num_classes == 1:
            logits = logits[:, 1:] - logits[:, :1]
    return logits.to(query_masks.dtype)
