"""What a SAM can learn to be prompted with, beside points, boxes and masks: text and attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Deviation of the text projection's first weights: a text says nearly nothing before anything was learned.
_NEARLY_ZERO = 1e-3
#: What the weights of attention are multiplied with: they start at 0, embeddings have a deviation of about 1,
#: and an optimiser moves every weight by much the same small step.
_GAIN = 30.0


class ExtraPrompts(nn.Module):
    """Adds a text token to the sparse prompts, and attention to the image embedding.

    A text is one more sparse token, projected from its embedding: SAM's decoder takes any number of them. How
    Konwer et al. (arXiv 2503.04639) join theirs is not known; a projection to one token is how it was built
    again by others. Attention is a map over the image that is added to its embedding before the decoder, as
    in Ward and Imran (SAM-Mix, arXiv 2412.08575, figure 1). Its weight is not known of them; here it is one
    learned number for each channel, from 0 on: this project's own choice. (A single number for all channels
    is what the first normalisation of the decoder takes away again.)

    Args:
        width: Channels of SAM's prompt embeddings.
        text: Length of an embedded text; None = there is no text.
        attention: Whether there is attention.
    """

    def __init__(self, *, width: int, text: int | None = None, attention: bool = False) -> None:
        super().__init__()
        self.width, self.text_width = width, text
        self.text = None if text is None else nn.Linear(text, width)
        if self.text is not None:
            nn.init.normal_(self.text.weight, std=_NEARLY_ZERO)
            nn.init.zeros_(self.text.bias)
        self.attention = nn.Parameter(torch.zeros(width)) if attention else None

    def forward(
        self, sparse: Tensor, dense: Tensor, *, text: Tensor | None = None, attention: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Join what is given to SAM's own prompt embeddings.

        Args:
            sparse: (P, T, C) float32 tokens of points and boxes.
            dense: (P, C, h, w) float32.
            text: (P, D) float32 embedded texts; None = none.
            attention: (P, 1, h, w) float32 in 0..1; None = none.

        Returns:
            (P, T + 1, C), or as it was without a text, and (P, C, h, w).

        Raises:
            ValueError: When something is given that was not learned.
        """
        if text is not None:
            if self.text is None:
                raise ValueError("this model did not learn to be prompted with text")
            sparse = torch.cat([sparse, self.text(text)[:, None]], dim=1)
        if attention is not None:
            dense = dense + self.attention_weights()[:, None, None] * attention
        return sparse, dense

    def attention_weights(self) -> Tensor:
        """(C,) float32: what is added to each channel of the embedding where attention is 1.

        Raises:
            ValueError: When attention was not learned.
        """
        if self.attention is None:
            raise ValueError("this model did not learn to be prompted with attention")
        return _GAIN * self.attention

    def record(self) -> dict[str, int | bool | None]:
        """The arguments that make it, as JSON takes them."""
        return {"width": self.width, "text": self.text_width, "attention": self.attention is not None}
