"""The method: vocabulary and equations (1) to (4), the heads of figure 3, the regressor."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from backbones import UNetFeatures
from reverse_sd import (
    Heads,
    Regressor,
    Vocabulary,
    cosine_loss,
    joint_loss,
    nearest,
    predict,
    vocabulary_loss,
)
from words import is_content_word, words


def test_equation_1_is_the_mean_of_one_minus_cosine():
    predicted = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([[4.0, 3.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(cosine_loss(predicted, target), torch.tensor([1 - 24 / 25, 1.0, 2.0]).double())


def test_equation_1_does_not_depend_on_the_length_of_the_prediction():
    predicted, target = torch.randn(5, 384).double(), torch.randn(5, 384).double()
    torch.testing.assert_close(cosine_loss(7 * predicted, target), cosine_loss(predicted, target))


def test_equation_2_marks_the_words_of_each_prompt_whatever_their_case():
    vocabulary = Vocabulary(["Castle", "red", "snow"])
    targets = vocabulary.targets(["A RED castle, red roof", "snowman on SNOW", "", "8 k, hd"])
    assert targets.tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_equation_3_is_the_mean_binary_cross_entropy_over_the_words():
    logits = torch.tensor([[0.0, 2.0, -1.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)

    def p(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = -(math.log(p(0)) + math.log(1 - p(2)) + math.log(1 - p(-1))) / 3
    assert vocabulary_loss(logits, targets).item() == pytest.approx(expected, abs=1e-12)


def test_equation_4_adds_a_tenth_of_the_vocabulary_loss():
    cosine, vocabulary = torch.tensor([0.4, 0.2]), torch.tensor([0.7, 0.1])
    torch.testing.assert_close(joint_loss(cosine, vocabulary), torch.tensor([0.47, 0.21]))
    torch.testing.assert_close(joint_loss(cosine, vocabulary, 0.5), torch.tensor([0.75, 0.25]))


def test_words_keep_hyphens_inside_and_drop_numbers_and_single_letters():
    assert words("A Sci-Fi city, 8 k, women's --hats-- x 1 9 5 0") == ["sci-fi", "city", "women's", "hats"]


@pytest.mark.parametrize("word", ["red", "castle", "running", "butterfly", "ugly", "detailed", "rutkowski"])
def test_content_words(word: str):
    assert is_content_word(word)


@pytest.mark.parametrize("word", ["the", "of", "and", "is", "highly", "very", "three", "with", "slowly"])
def test_closed_classes_and_adverbs_are_no_content_words(word: str):
    assert not is_content_word(word)


def test_vocabulary_counts_a_word_once_a_prompt_and_breaks_ties_by_alphabet():
    vocabulary = Vocabulary.of(["cat cat cat dog", "dog of stone", "the highly apple"], 3)
    assert vocabulary.words == ["dog", "apple", "cat"]


def test_likely_words_are_the_most_probable_in_per_cent():
    assert Vocabulary(["cat", "red", "star"]).likely(np.array([0.125, 0.5, 0.756]), 2) == "star 76%, red 50%"


def test_heads_without_vocabulary():
    prediction = Heads(8, 5, 0)(torch.randn(2, 8))
    assert prediction.embedding.shape == (2, 384) and prediction.logits is None
    assert {name for name, _ in Heads(8, 5, 0).named_parameters()} == {"embedding.weight", "embedding.bias"}


@pytest.mark.parametrize(
    ("placement", "embedding_inputs", "vocabulary_inputs"), [(1, 8, 8), (2, 8 + 5, 8), (3, 8, 384)]
)
def test_each_head_is_one_layer_of_the_width_of_figure_3(placement, embedding_inputs, vocabulary_inputs):
    heads = Heads(8, 5, placement)
    shapes = {name: tuple(p.shape) for name, p in heads.named_parameters() if "weight" in name}
    expected = {"embedding.weight": (384, embedding_inputs), "vocabulary.weight": (5, vocabulary_inputs)}
    assert shapes == expected


@pytest.mark.parametrize(("placement", "reaches"), [(1, False), (2, False), (3, True)])
def test_classification_error_updates_the_embedding_head_only_in_placement_3(placement: int, reaches: bool):
    heads = Heads(8, 5, placement)
    heads(torch.randn(2, 8)).logits.square().sum().backward()
    assert (heads.embedding.weight.grad is not None) == reaches


@pytest.mark.parametrize(("placement", "reaches"), [(1, False), (2, True), (3, False)])
def test_the_embedding_error_updates_the_vocabulary_head_only_in_placement_2(placement: int, reaches: bool):
    heads = Heads(8, 5, placement)
    heads(torch.randn(2, 8)).embedding.square().sum().backward()
    assert (heads.vocabulary.weight.grad is not None) == reaches


def test_heads_refuse_another_placement():
    with pytest.raises(ValueError, match="0, 1, 2 or 3"):
        Heads(8, 5, 4)


class RecordingUNet(nn.Module):
    """Middle block with one known peak a channel."""

    width = 3

    def encode(self, latents, timesteps, context):
        self.timesteps = timesteps
        middle = torch.full((len(latents), 3, 2, 2), -5.0)
        middle[:, 0, 0, 1], middle[:, 1, 1, 0], middle[:, 2, 1, 1] = 1, 2, 3
        return middle


def test_unet_features_are_the_maximum_over_places_at_timestep_0():
    unet = RecordingUNet()
    features = UNetFeatures(unet)(torch.randn(2, 4, 16, 16), torch.randn(2, 77, 8))
    assert features.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert unet.timesteps.tolist() == [0, 0]


def test_predict_gives_unit_rows_and_probabilities_in_order():
    regressor = Regressor(nn.Linear(6, 8), 8, 5, 3).eval()
    x = torch.randn(7, 6)
    embedding, probabilities = predict(regressor, [(x[:3],), (x[3:],)])
    whole = regressor(x)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-6)
    expected = torch.nn.functional.normalize(whole.embedding, dim=1)
    np.testing.assert_allclose(embedding, expected.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(probabilities, whole.logits.sigmoid().detach().numpy(), atol=1e-6)


def test_nearest_ranks_by_cosine():
    rows = np.eye(3, dtype=np.float32)
    assert [i for i, _ in nearest(np.array([0.1, 0.9, 0.3], np.float32), rows, 2)] == [1, 2]
