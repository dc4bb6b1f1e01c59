"""CLIPScore and RefCLIPScore (Hessel et al. 2021): captions against images, and against reference captions.

The published scores need OpenAI's ViT-B/32, the default here. Each text is embedded after "A photo depicts ".
torchmetrics' CLIPScore is "100 cos" of `Scorer.scores`, without this prefix. Paper: section 4.4 states neither
the scale of its RefCLIPScore nor the CLIP, so each scale in use is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import data
import weights

PREFIX, WEIGHT = "A photo depicts ", 2.5
BATCH = 64


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine (n,) float64 of each row of `a` (n, P) with that of `b` (n, P); either may be one row (P,)."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return (a * b).sum(axis=-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def clip_score(images: np.ndarray, captions: np.ndarray, weight: float = WEIGHT) -> np.ndarray:
    """CLIPScore (n,) of each pair of embeddings (n, P), of any length: weight · max(cos, 0)."""
    return weight * np.maximum(cosines(images, captions), 0)


def ref_clip_score(
    images: np.ndarray, captions: np.ndarray, references: Sequence[np.ndarray], weight: float = WEIGHT
) -> np.ndarray:
    """RefCLIPScore (n,) of each pair: the harmonic mean of its CLIPScore and of the largest cosine of the
    caption with one of its references, without weight. Embeddings (n, P); references: n arrays (r, P).

    It is 0 if either is not above 0. The official code clips the first alone and divides by their sum, which
    may be 0 or below.
    """
    image = clip_score(images, captions, weight)
    text = np.array([cosines(caption, each).max() for caption, each in zip(captions, references, strict=True)])
    defined = (image > 0) & (text > 0)
    return np.divide(2 * image * text, image + text, out=np.zeros_like(image), where=defined)


class Scorer:
    """Both halves of a CLIP, a source of `weights.load`, and the scores by them. Raises weights.WeightsError
    if one is missing."""

    def __init__(self, source: str = "clip-b-32", device: str = "cpu", prefix: str = PREFIX):
        if weights.config("clip-text", source).projection_dim is None:
            raise weights.WeightsError(f"{source}: its text half has no projection; give a whole CLIP")
        self.text = weights.load("clip-text", source, device=device)
        self.vision = weights.load("clip-vision", source, device=device)
        self.tokenizer = weights.load_tokenizer(source)
        self.preprocessing = data.Preprocessing(**weights.preprocessing("clip-vision", source))
        self.device, self.prefix = device, prefix

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Embeddings (n, P) float32, not of unit length. A text of more than 75 tokens is cut, and pooled at the
        end mark that follows."""
        return self._embedded(captions, lambda part: self.text.pooled(self._ids(part)))

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Embeddings (n, P) float32, not of unit length."""
        return self._embedded(images, lambda part: self.vision(self._tensor(part)))

    def scores(
        self,
        images: Sequence[Image.Image],
        captions: Sequence[str],
        references: Sequence[Sequence[str]] | None = None,
    ) -> dict[str, np.ndarray]:
        """Scores (n,) of each image and its caption: "cos", "CLIPScore" and "100 cos"; if each image has
        references, also "RefCLIPScore" and, with w = 1 and times 100, "100 RefCLIPScore, w = 1".

        Raises data.DataError for unequal numbers, and for an image without references.
        """
        if not 0 < len(images) == len(captions) == len(captions if references is None else references):
            raise data.DataError("CLIPScore: give as many captions, and lists of references, as images")
        if references is not None and not all(references):
            raise data.DataError("RefCLIPScore: an image has no references; give at least one")
        pictures, texts = self.images(images), self.texts(captions)
        cosine = cosines(pictures, texts)
        found = {"cos": cosine, "CLIPScore": clip_score(pictures, texts), "100 cos": 100 * cosine}
        if references is not None:
            embedded = self.texts([text for group in references for text in group])
            groups = np.split(embedded, np.cumsum([len(group) for group in references])[:-1])
            found["RefCLIPScore"] = ref_clip_score(pictures, texts, groups)
            found["100 RefCLIPScore, w = 1"] = 100 * ref_clip_score(pictures, texts, groups, weight=1.0)
        return found

    def _ids(self, captions: Sequence[str]) -> Tensor:
        return self.tokenizer([self.prefix + caption for caption in captions]).to(self.device)

    def _tensor(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([data.image_tensor(x, self.preprocessing) for x in images]).to(self.device)

    @torch.no_grad()
    def _embedded(self, items: Sequence, embed: Callable[[Sequence], Tensor]) -> np.ndarray:
        parts = [embed(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
        return torch.cat(parts).float().cpu().numpy()
