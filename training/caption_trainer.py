"""Training of the captioners of section 4.4 to write the prompt, by the loop of train.py."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weights
from reverse_sd import Vocabulary, joint_loss, vocabulary_loss
from training.captioner import Captioner, load_model, trimmed
from training.config import TrainConfig
from training.inputs import Prepared, Samples
from training.loop import Process
from training.trainer import PairsTrainer, uses_bf16


class CaptionSamples(Samples):
    """Rows as arrays: image, tokens of the prompt, vocabulary targets, row number. `counts` (n,): tokens
    that the loss counts."""

    def __init__(self, prepared: Prepared, rows: np.ndarray, vocabulary: Vocabulary, captioner: Captioner):
        super().__init__(prepared, rows, vocabulary)
        ids = captioner.tokens([prepared.pairs.prompts[i] for i in rows])
        self.ids, self.counts = ids.int().numpy(), captioner.counts(ids).numpy()

    def __getitem__(self, i: int) -> tuple[np.ndarray | int, ...]:
        row, (images,) = int(self.rows[i]), self.prepared.inputs
        words = self.vocabulary.targets([self.prepared.pairs.prompts[row]])[0].numpy()
        return images[row], self.ids[i], words, row


class CaptionerTrainer(PairsTrainer):
    """Trains a captioner to write the prompt: L = L_caption + lambda L_mlc.

    L_caption is the mean over all counted tokens of a batch, as in the originals. The score of a sample, of
    which the mean on validation selects the best weights, and which phase 1 records, is the mean token
    likelihood of its true prompt, exp(-mean negative log-likelihood). Paper: phase 1 records the cosine of
    predicted and true embedding, which takes a caption: --difficulty-by caption.

    `chunks` as in PairsTrainer; `model`: in place of the one that config.weights names.
    """

    score = "likelihood"

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        process: Process,
        prepared: Prepared,
        vocabulary: Vocabulary,
        chunks: list[np.ndarray] | None = None,
        model: nn.Module | None = None,
    ):
        if model is None:
            model = load_model(config.backbone, config.weights, uses_bf16(config, process.device))
        torch.manual_seed(config.seed)
        captioner = Captioner(config.backbone, model, len(vocabulary) if config.heads else 0)
        captioner.to(process.device)
        self.prepared = prepared
        train, val = (
            CaptionSamples(prepared, prepared.splits[split], vocabulary, captioner)
            for split in ("train", "val")
        )
        trained = {name: p for name, p in captioner.named_parameters() if p.requires_grad}
        super().__init__(config, folder, process, prepared, captioner, {1.0: trained}, (train, val), chunks)

    def tensors(self) -> dict[str, Tensor]:
        return self.model.trained()

    def on_device(self, batch: list[Tensor], whole: np.ndarray) -> list[Tensor]:
        """Images, tokens, words, each sample's weight in the head's loss, and in the caption's: its number of
        tokens over the mean of the whole batch."""
        images, ids, words, rows = batch
        share = self.model.counts(ids) / float(self.train_samples.counts[whole].mean())
        *tensors, weight = super().on_device([images, trimmed(ids, self.model.pad), words, rows], whole)
        return [*tensors, weight, weight * share.to(weight)]

    def loss(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The terms of the loss, each summed over the samples, times their weights."""
        images, ids, words, weight, share = batch
        with self.autocast():
            caption, logits = self.parallel(images, ids)
        caption, vocabulary = caption * share, torch.zeros_like(caption)
        if logits is not None:
            vocabulary = vocabulary_loss(logits.float(), words) * weight  # (2), (3)
        joint = joint_loss(caption, vocabulary, self.config.mlc_weight)  # (4)
        return {"caption_loss": caption.sum(), "vocabulary_loss": vocabulary.sum(), "loss": joint.sum()}

    def scores_of(self, samples: Samples) -> np.ndarray:
        """The mean token likelihood of each sample's true prompt."""

        def likelihood(batch: list[Tensor]) -> Tensor:
            images, ids, *_ = batch
            with self.autocast():
                losses, _ = self.model(*self.sent(images, trimmed(ids, self.model.pad)))
            return torch.exp(-losses)

        return self.gathered(samples, likelihood)

    def recorded_scores(self) -> np.ndarray:
        if self.config.difficulty_by == "likelihood":
            return super().recorded_scores()

        def cosine(batch: list[Tensor]) -> Tensor:
            images, *_, rows = batch
            written = self.model.captions(*self.sent(images), num_beams=1)
            targets = torch.from_numpy(self.prepared.targets[rows.numpy()])
            return F.cosine_similarity(*self.sent(self.minilm.encode(written), targets))

        return self.gathered(self.train_samples, cosine)

    @functools.cached_property
    def minilm(self) -> nn.Module:
        return weights.load("minilm", device=self.process.device)

    def sent(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(self.process.device) for tensor in tensors]
