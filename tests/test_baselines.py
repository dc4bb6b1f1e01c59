"""k-NN regression and BLIP as a regressor, the baselines of table 11."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsRegressor
from transformers import BertTokenizer

import baselines
import data
import weights
from baselines import knn_regression, neighbours
from mini import pretrain
from training import captioner
from training.captioner import CaptionerConfig
from training.loop import Checkpoint

# ----------------------------------------------------------------------------------------------------------
# k-NN
# ----------------------------------------------------------------------------------------------------------


def rows(n: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def test_a_weighted_mean_worked_out_by_hand():
    """Cosines 1, 0.6, 0: the two nearest weigh exp(1 / 0.4) and exp(0.6 / 0.4), a ratio of e."""
    reference = np.array([[0, 5], [6, 8], [2, 0]], np.float32)  # lengths must not count
    targets = np.eye(3, dtype=np.float32)
    found = knn_regression(np.array([[3, 0]], np.float32), reference, targets, k=2, temperature=0.4)
    expected = np.array([0, 1, np.e]) / np.hypot(1, np.e)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    assert found.dtype == np.float32


def test_against_scikit_learn():
    query, reference, targets = rows(40, 16, 0), rows(300, 16, 1), rows(300, 7, 2)

    def weigh(distances: np.ndarray) -> np.ndarray:  # between unit rows: d^2 = 2 - 2 cos
        return np.exp((1 - distances**2 / 2) / 0.1)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    theirs = KNeighborsRegressor(9, weights=weigh, algorithm="brute").fit(unit(reference), targets)
    found = knn_regression(query, reference, targets, k=9, temperature=0.1)
    np.testing.assert_allclose(found, unit(theirs.predict(unit(query))), atol=2e-5)


def test_blocks_change_nothing():
    query, reference, targets = rows(33, 8, 0), rows(100, 8, 1), rows(100, 5, 2)
    whole, parts = (knn_regression(query, reference, targets, 7, 0.2, block=block) for block in (33, 4))
    np.testing.assert_allclose(whole, parts, atol=1e-6)


def test_of_equal_neighbours_the_first_rows_count():
    reference = np.array([[0, 1], [1, 0], [1, 1], [2, 0], [3, 0], [1, 0]], np.float32)
    cosines, found = neighbours(np.array([[1, 0]], np.float32), reference, 3)
    assert found.tolist() == [[1, 3, 4]] and cosines.tolist() == [[1, 1, 1]]
    assert neighbours(np.array([[1, 0]], np.float32), reference, 5)[1].tolist() == [[1, 3, 4, 5, 2]]


def test_as_many_neighbours_as_there_are_rows_and_no_more():
    reference = rows(4, 3, 0)
    assert sorted(neighbours(rows(1, 3, 1), reference, 4)[1][0].tolist()) == [0, 1, 2, 3]
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k = {k}: there are 4 rows"):
            neighbours(rows(1, 3, 1), reference, k)


def test_chosen_neighbours_are_the_best_of_the_grid(monkeypatch: pytest.MonkeyPatch):
    """Targets that a few neighbours tell and one, being noisy, does not."""
    monkeypatch.setattr(baselines, "NEIGHBOURS", (1, 8, 200, 1000))
    monkeypatch.setattr(baselines, "TEMPERATURES", (0.01, 1.0))
    query, reference = rows(60, 4, 0), rows(400, 4, 1)
    truth = query / np.linalg.norm(query, axis=1, keepdims=True)
    targets = reference / np.linalg.norm(reference, axis=1, keepdims=True) + 0.5 * rows(400, 4, 2)
    best = baselines.choose_neighbours(query, truth, reference, targets)
    scores = {
        (k, t): float((knn_regression(query, reference, targets, k, t) * truth).sum(1).mean())
        for k in (1, 8, 200) for t in (0.01, 1.0)
    }
    assert (best["k"], best["temperature"]) == max(scores, key=scores.get) != (1, 0.01)
    assert best["cosine"] == pytest.approx(max(scores.values()), abs=1e-6)


def test_all_rows_may_be_neighbours_and_all_queries_count(monkeypatch: pytest.MonkeyPatch):
    """1,025 queries are more than are worked on at once; the mean of all 8 rows is every query's answer."""
    monkeypatch.setattr(baselines, "NEIGHBOURS", (1, 8, 9))
    reference, targets = np.eye(8, dtype=np.float32), np.eye(8, dtype=np.float32)
    query, truth = rows(1025, 8, 0), np.full((1025, 8), 8**-0.5)
    query[1024] *= -1
    best = baselines.choose_neighbours(query, truth, reference, targets)
    found = knn_regression(query, reference, targets, 8, best["temperature"])
    assert (best["k"], best["temperature"]) == (8, max(baselines.TEMPERATURES))
    assert best["cosine"] == pytest.approx(float((found * truth).sum(1).mean()), abs=1e-6)


# ----------------------------------------------------------------------------------------------------------
# BLIP
# ----------------------------------------------------------------------------------------------------------

SHORT = CaptionerConfig("blip-mini", epochs=2, batch_size=8, lr=3e-3, max_tokens=24, checkpoint_every=2)


@pytest.fixture(autouse=True)
def untrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of blip-mini before its training, in place of the one in mini/."""
    folder = tmp_path / "untrained-blip-mini"
    folder.mkdir()
    for name in ("vocab.txt", "preprocessor_config.json"):
        (folder / name).write_bytes((captioner.BLIP_MINI / name).read_bytes())
    monkeypatch.setattr(captioner, "BLIP_MINI", folder)
    return folder


@pytest.fixture(scope="module")
def pairs(few_scenes: Path) -> data.Pairs:
    return data.read_pairs(few_scenes)


SPLITS = {"train": np.arange(20), "val": np.arange(60, 66), "test": np.arange(70, 78)}


def test_every_mini_prompt_is_words_of_the_vocabulary_and_any_english_can_be_spelled(pairs: data.Pairs):
    model, how = captioner.new_captioner(0)
    assert how.size == (64, 64) and how.mean == how.std == (0.5, 0.5, 0.5)
    assert model.tokenizer.get_vocab_size() == model.config.text_vocab_size
    ids = [model.tokenizer.token_to_id(token) for token in ("[DEC]", "[PAD]", "[SEP]")]
    config = model.config
    assert ids == [config.text_bos_token_id, config.text_pad_token_id, config.text_sep_token_id]
    theirs = BertTokenizer.from_pretrained(captioner.BLIP_MINI)
    for prompt in [*pairs.prompts, "Zebra's XYLOPHONE, 123!", "a picture of"]:
        tokens = model.tokenizer.encode(prompt, add_special_tokens=False).tokens
        assert tokens == theirs.tokenize(prompt) and "[UNK]" not in tokens
        assert prompt[0] == "Z" or not any(token.startswith("##") for token in tokens)


def test_tokens_and_labels_by_hand():
    model, _ = captioner.new_captioner(0)
    ids, labels = captioner.caption_tokens(model, ["a red cat", "a cat"], "a picture of ", 77)
    words = [[model.tokenizer.id_to_token(i) for i in row] for row in ids]
    assert words[0] == ["[DEC]", "a", "picture", "of", "a", "red", "cat", "[SEP]"]
    assert words[1] == ["[DEC]", "a", "picture", "of", "a", "cat", "[SEP]", "[PAD]"]
    assert labels[0].tolist() == [-100] * 4 + ids[0, 4:].tolist()
    assert labels[1].tolist() == [-100] * 4 + ids[1, 4:7].tolist() + [-100]
    cut, _ = captioner.caption_tokens(model, ["a red cat"], "a picture of ", 6)
    assert cut.tolist() == [[*ids[0, :5].tolist(), ids[0, 7]]]


def test_it_learns_and_predicts_and_the_folder_it_writes_is_a_captioner(
    pairs: data.Pairs, cache: Path, tmp_path: Path, untrained: Path
):
    """Forty steps on twenty pairs: the loss falls, and the written prompts' embeddings are the answer."""
    torch.set_num_threads(1)
    captioner.write_captioner(captioner.new_captioner(0)[0], untrained, untrained)
    config = dataclasses.replace(SHORT, source=str(untrained), epochs=14)
    found = captioner.blip_regressor(tmp_path / "run", config, pairs, SPLITS)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 42 and np.mean(losses[-3:]) < 0.6 * losses[0]
    assert sum("val_loss" in entry for entry in log) == 14

    written = json.loads((tmp_path / "run" / "predictions" / "prompts.json").read_text())
    for split in ("val", "test"):
        array = np.load(tmp_path / "run" / "predictions" / f"{split}.npy", allow_pickle=False)
        np.testing.assert_array_equal(array, found[split])
        np.testing.assert_allclose(np.linalg.norm(array, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(array, weights.load("minilm").encode(written[split]), atol=1e-5)

    again = weights.load("blip", tmp_path / "run" / "blip")
    how = data.Preprocessing(**weights.preprocessing("blip", tmp_path / "run" / "blip"))
    images = torch.stack([data.image_tensor(pairs.image(i), how) for i in SPLITS["test"]])
    assert again.generate(images, max_length=24) == written["test"]
    assert any(written["test"])


def test_the_captioner_is_trained_as_by_a_plain_loop(pairs: data.Pairs, tmp_path: Path):
    torch.set_num_threads(1)
    config = dataclasses.replace(SHORT, weight_decay=5.0, label_smoothing=0.2, max_tokens=10, seed=2)
    splits = {"train": np.arange(20), "val": np.arange(60, 72)}
    trained, how = captioner.new_captioner(0)
    captioner.CaptionerTrainer(trained, how, config, pairs, splits, tmp_path).fit()

    model, _ = captioner.new_captioner(0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=5.0)

    def loss(some: np.ndarray) -> torch.Tensor:
        images = torch.stack([data.image_tensor(pairs.image(i), how) for i in some])
        texts = [pairs.prompts[i] for i in some]
        ids, labels = captioner.caption_tokens(model, texts, "a picture of ", 10)
        logits = model(images, ids)[:, :-1].transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:], label_smoothing=0.2)  # not -100

    expected, validated, rates = [], [], [3e-3 * (1 + np.cos(np.pi * i / 6)) / 2 for i in range(6)]
    for epoch in (0, 1):
        model.train()
        order = np.random.default_rng([2, epoch]).permutation(20)
        for batch in (order[:8], order[8:16], order[16:]):
            optimizer.param_groups[0]["lr"] = rates[len(expected)]
            optimizer.zero_grad()
            expected.append(loss(batch))
            expected[-1].backward()
            optimizer.step()
        with torch.no_grad():
            validated.append(np.mean([loss(part).item() for part in np.split(splits["val"], 2)]))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["lr"] for e in log if "lr" in e] == pytest.approx(rates)
    assert [e["loss"] for e in log if "loss" in e] == pytest.approx([x.item() for x in expected], rel=1e-4)
    assert [e["val_loss"] for e in log if "val_loss" in e] == pytest.approx(validated, rel=1e-4)


def test_stopped_and_resumed_training_ends_alike(
    pairs: data.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.set_num_threads(1)

    def tune(name: str, config: CaptionerConfig = SHORT) -> dict[str, torch.Tensor]:
        model, how = captioner.new_captioner(0)
        captioner.CaptionerTrainer(model, how, config, pairs, SPLITS, tmp_path / name).fit()
        return model.state_dict()

    whole = tune("whole")
    loss, calls = captioner.caption_loss, iter(range(100))

    def stopping(*given: object) -> torch.Tensor:
        if next(calls) == 5:  # after a checkpoint, an epoch's end and a step that is lost
            raise KeyboardInterrupt
        return loss(*given)

    with monkeypatch.context() as patch:
        patch.setattr(captioner, "caption_loss", stopping)
        with pytest.raises(KeyboardInterrupt):
            tune("stopped")
    # of three steps an epoch every second one is saved: the fifth alone is lost
    assert json.loads((tmp_path / "stopped" / "last" / "state.json").read_text())["step"] == 4
    resumed = tune("stopped")
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []

    def logged(name: str) -> list[dict]:
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines]

    assert logged("stopped") == logged("whole")
    with pytest.raises(data.DataError, match="other pairs or options"):
        tune("stopped", dataclasses.replace(SHORT, lr=1e-3))


def test_the_published_captioners_are_tuned_as_blip_was():
    base = {
        "source": "blip-base", "epochs": 3, "batch_size": 64, "lr": 1e-5, "weight_decay": 0.05,
        "label_smoothing": 0.1, "prompt": "a picture of ", "max_tokens": 77, "num_beams": 3, "min_length": 5,
        "seed": 0, "checkpoint_every": 100, "workers": 0,
    }  # fmt: skip
    for changed in (
        {},
        {"source": "blip-large", "lr": 2e-6},
        {"source": "blip-mini", "epochs": 6, "batch_size": 32, "lr": 1e-3},
    ):
        expected = base | changed
        assert vars(captioner.CAPTIONERS[expected["source"]]) == expected


def test_a_captioner_is_opened_with_its_own_preprocessing(untrained: Path, tmp_path: Path):
    new = tmp_path / "new" / "deep"
    captioner.write_captioner(captioner.new_captioner(0)[0], new, captioner.BLIP_MINI)
    path = new / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    model, how, folder = captioner.open_captioner(str(new))
    assert how.mean == (0.1, 0.2, 0.3) and folder == new and not model.training


def test_the_miniature_is_trained_from_random_values_and_written_as_published(
    few_scenes: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.set_num_threads(1)
    monkeypatch.setattr(pretrain, "training_pairs", lambda parts: data.read_pairs(few_scenes))
    monkeypatch.setattr(pretrain, "HELD_OUT", 20)
    pretrain.train_captioner(parts=1, epochs=1, batch_size=32, lr=1e-3, seed=0)
    card = json.loads((captioner.BLIP_MINI / "card.json").read_text())
    assert -1 < card["prompt_cosine"] < 1 and card["val_loss"] > 0
    model, how, folder = captioner.open_captioner(str(captioner.BLIP_MINI))
    assert folder == captioner.BLIP_MINI and how == captioner.new_captioner(0)[1]
    start = captioner.new_captioner(0)[0].state_dict()
    assert not torch.equal(start["vision_model.post_layernorm.bias"],
                           model.state_dict()["vision_model.post_layernorm.bias"])
    assert Checkpoint(weights.cache_dir() / "pretrain-captioner" / "last").load({}) is None
