"""Captioners trained by train.py: tokens, loss, parameters, curriculum, evaluation, faults."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, assert_same_end, entries, environment, losses, result_of, train_here
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import BertTokenizer

import clipscore
import data
import eval as eval_py
import train
import weights
from mini import pretrain
from models import blip, blip2
from reverse_sd import Vocabulary, load_run
from training import captioner
from training.caption_trainer import CaptionerTrainer
from training.captioner import Captioner, load_model
from training.captions import caption_lines, caption_predictions, open_captioner_run
from training.config import TrainConfig, resolve
from training.folder import saved_config
from training.inputs import prepare
from training.loop import Checkpoint, Process, epoch_batches
from training.reading import Captioner as Captions
from weights.kinds import blip2 as blip2_files

KINDS = ["blip", "blip2"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of untrained captioners in the published formats: blip-mini's words, and bytes."""
    tiny, second = (tmp_path_factory.mktemp("sources") / name for name in ("tiny-mini", "tiny-2-mini"))
    sizes = {"vision_hidden_size": 32, "vision_intermediate_size": 32, "vision_num_hidden_layers": 1}
    sizes |= {"vision_num_attention_heads": 2, "vision_image_size": 16, "vision_patch_size": 8}
    text = {"text_hidden_size": 32, "text_num_hidden_layers": 2, "text_num_attention_heads": 2}
    torch.manual_seed(0)
    places = {"text_max_position_embeddings": 32, "text_intermediate_size": 32}
    config = replace(blip.CONFIGS["blip-mini"], **sizes, **text, **places)
    captioner.write_captioner(blip.BLIP(config, None), tiny, captioner.BLIP_MINI)
    settings = json.loads((tiny / "preprocessor_config.json").read_text())
    settings["size"] = {"height": 16, "width": 16}
    (tiny / "preprocessor_config.json").write_text(json.dumps(settings))

    second.mkdir(parents=True)
    words = {token: n for n, token in enumerate(["<s>", "<pad>", "</s>"])}
    words |= {c: 3 + n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    (second / "vocab.json").write_text(json.dumps(words))
    (second / "merges.txt").write_text("#version: 0.2\n")
    queries = {"num_query_tokens": 4, "qformer_hidden_size": 32, "qformer_intermediate_size": 32}
    queries |= {"qformer_num_hidden_layers": 2, "qformer_num_attention_heads": 2}
    marks = {"text_bos_token_id": 2, "text_pad_token_id": 1, "text_eos_token_id": words["Ċ"]}
    places = {"text_vocab_size": len(words), "text_max_position_embeddings": 64, "text_ffn_dim": 32}
    config = replace(blip2.CONFIGS["blip2-opt-2.7b"], **sizes, **text, **queries, **marks, **places)
    save_file(blip2.BLIP2(config).state_dict(), second / "model.safetensors")
    (second / "config.json").write_text(json.dumps(blip2_files.published(config)))
    return {"blip": str(tiny), "blip2": str(second)}


def flags_of(kind: str, sources: dict[str, str], few_scenes: Path, *more: str) -> list[str]:
    flags = ["--backbone", kind, "--weights", sources[kind], "--data", str(few_scenes), *SMALL]
    return [*flags, "--curriculum", "difficulty", "--lr", "3e-3", *more]


@pytest.fixture(scope="module", params=KINDS)
def run(request, sources: dict[str, str], few_scenes: Path, cache: Path, tmp_path_factory) -> Path:
    """A run of both phases with the vocabulary head."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / request.param
    assert train.main(flags_of(request.param, sources, few_scenes, "--out", str(folder))) == 0
    return folder


def small(kind: str, sources: dict[str, str], few_scenes: Path, **fields: object) -> TrainConfig:
    config = TrainConfig(backbone=kind, weights=sources[kind], data=str(few_scenes), device="cpu", **fields)
    return resolve(replace(config, val_size=12, test_size=12))


def trainer_in(folder: Path, config: TrainConfig, words: list[str]) -> CaptionerTrainer:
    return CaptionerTrainer(config, folder, Process(), prepare(config), Vocabulary(words))


# -- tokens ------------------------------------------------------------------------------------------------


def loaded(kind: str, sources: dict[str, str], n_words: int = 0) -> Captioner:
    return Captioner(kind, load_model(kind, sources[kind], bf16=False), n_words)


def test_tokens_by_hand(sources: dict[str, str]):
    model = loaded("blip", sources)
    ids = model.tokens(["a red cat", "a cat"])
    words = [[model.model.tokenizer.id_to_token(i) for i in row] for row in ids.tolist()]
    assert words[0] == ["[DEC]", "a", "picture", "of", "a", "red", "cat", "[SEP]"]
    assert words[1] == ["[DEC]", "a", "picture", "of", "a", "cat", "[SEP]", "[PAD]"]
    assert model.counts(ids).tolist() == [4, 3]

    second = loaded("blip2", sources)
    ids = second.tokens(["cat", "a\nb"])
    words = [[second.model.tokenizer.id_to_token(i) for i in row] for row in ids.tolist()]
    assert words == [["</s>", "c", "a", "t", "Ċ"], ["</s>", "a", "Ġ", "b", "Ċ"]]
    assert second.counts(ids).tolist() == [5, 5]  # without a prompt "</s>" is learnt too


@pytest.mark.parametrize("kind, longest", [("blip", 32), ("blip2", 60)])
def test_a_text_that_is_cut_keeps_its_end_mark(kind: str, longest: int, sources: dict[str, str]):
    """The tiny BLIP has 32 places, the tiny BLIP-2 64, of which 4 are its queries'."""
    assert captioner.MAX_TOKENS == 77  # of larger models
    model = loaded(kind, sources)
    ids = model.tokens(["cat " * n for n in (9, 100)])
    end = getattr(model.model.config, model.original.end)
    assert ids.shape == (2, longest) and ids[1, -1] == end and (ids[1, :-1] != end).all()
    assert int((ids[0] == end).nonzero()) == int((ids[0] != model.pad).sum()) - 1
    assert model(torch.zeros(2, 3, 16, 16), ids)[0].isfinite().all()


def test_every_mini_prompt_is_words_of_the_vocabulary_and_any_english_can_be_spelled(few_scenes: Path):
    model, preprocessing = captioner.new_captioner(0)
    assert preprocessing.size == (64, 64) and preprocessing.mean == preprocessing.std == (0.5, 0.5, 0.5)
    assert model.tokenizer.get_vocab_size() == model.config.text_vocab_size
    ids = [model.tokenizer.token_to_id(token) for token in ("[DEC]", "[PAD]", "[SEP]")]
    config = model.config
    assert ids == [config.text_bos_token_id, config.text_pad_token_id, config.text_sep_token_id]
    theirs = BertTokenizer.from_pretrained(captioner.BLIP_MINI)
    for prompt in [*data.read_pairs(few_scenes).prompts, "Zebra's XYLOPHONE, 123!", "a picture of"]:
        tokens = model.tokenizer.encode(prompt, add_special_tokens=False).tokens
        assert tokens == theirs.tokenize(prompt) and "[UNK]" not in tokens
        assert prompt[0] == "Z" or not any(token.startswith("##") for token in tokens)


# -- loss and parameters -----------------------------------------------------------------------------------


def images_and_ids(model: Captioner, pairs: data.Pairs, rows: np.ndarray, source: str) -> tuple:
    preprocessing = data.Preprocessing(**weights.preprocessing(model.kind, source))
    images = torch.stack([data.image_tensor(pairs.image(i), preprocessing) for i in rows])
    return images, model.tokens([pairs.prompts[i] for i in rows])


@pytest.mark.parametrize("kind, smoothing", [("blip", 0.1), ("blip2", 0.0)])
def test_it_is_trained_as_by_a_plain_loop(
    kind: str, smoothing: float, sources: dict[str, str], few_scenes: Path, cache: Path, tmp_path: Path
):
    """In two parts a step: the loss is the mean over all tokens of the batch, and AdamW's decay on all."""
    fields = {"epochs": 1, "batch_size": 20, "accumulate": 2, "lr": 1e-3, "weight_decay": 5.0, "seed": 2}
    config = small(kind, sources, few_scenes, heads=1, mlc_weight=0.3, clip_norm=0.0, **fields)
    trainer = trainer_in(tmp_path / kind, config, ["red", "owl"])
    pairs, rows = trainer.prepared.pairs, trainer.prepared.splits["train"]
    model = loaded(kind, sources, 2)
    model.load_state_dict(trainer.model.state_dict())
    trainer.fit()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=5.0)
    expected = []
    for step, batch in enumerate(epoch_batches(60, 20, 2, 0)):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + np.cos(np.pi * step / 3)) / 2
        optimizer.zero_grad()
        images, ids = images_and_ids(model, pairs, rows[batch], sources[kind])
        labels = ids.masked_fill(ids == model.pad, -100)
        labels[:, : 4 if kind == "blip" else 0] = -100
        if kind == "blip":
            labels, logits = labels[:, 1:], model.model(images, ids)[:, :-1]
            features = model.model.encode_image(images)[:, 0]
        else:  # the state before "</s>" is the last query's
            queries = model.model.encode_queries(images)
            x, _ = model.model._states(ids, None, model.model.language_projection(queries))
            logits, features = model.model._logits(x[:, 3:-1]), queries.mean(dim=1)
        caption = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
        words = Vocabulary(["red", "owl"]).targets([pairs.prompts[i] for i in rows[batch]])
        mlc = F.binary_cross_entropy_with_logits(model.vocabulary(features), words)
        (caption + 0.3 * mlc).backward()
        optimizer.step()
        expected.append((caption.item(), mlc.item()))
    logged = [(e["caption_loss"], e["vocabulary_loss"]) for e in entries(tmp_path / kind) if "loss" in e]
    np.testing.assert_allclose(logged, expected, rtol=1e-4)
    ours = trainer.model.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_heads_gradient_reaches_the_image_side_alone(kind: str, sources: dict[str, str]):
    model = loaded(kind, sources, 3)
    _, logits = model(torch.randn(2, 3, 16, 16), model.tokens(["a red cat", "an owl"]))
    logits.square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    image = ("vocabulary.", "model.vision_model.") if kind == "blip" else (
        "vocabulary.", "model.qformer.", "model.query_tokens"
    )  # fmt: skip
    assert {name.startswith(image) for name in reached} == {True}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    text = ("model.text_decoder.", "model.language_projection.")
    assert {name for name in trained - reached if not name.endswith(".bias")} <= {
        name for name in trained if name.startswith(text)
    }


def test_the_vit_and_the_language_model_of_blip_2_are_frozen_and_not_saved(
    run: Path, sources: dict[str, str]
):
    kind = saved_config(run).backbone
    saved, start = load_file(run / "model.safetensors"), loaded(kind, sources, 60).state_dict()
    frozen = {n for n in start if kind == "blip2" and n.startswith(("model.vision", "model.language_model"))}
    assert saved.keys() == start.keys() - frozen
    last = load_file(next((run / "last").glob("step-*.safetensors")))
    assert {n.removeprefix("model.") for n in last if n.startswith("model.")} == saved.keys()
    changed = {name for name in saved if saved[name].shape == start[name].shape}
    assert all(not torch.equal(saved[name], start[name]) for name in changed if not name.endswith("bias"))
    whole = open_captioner_run(run).captioner.state_dict()
    assert all(torch.equal(whole[name], start[name]) for name in frozen)
    assert all(torch.equal(whole[name], saved[name]) for name in saved)


@pytest.mark.parametrize("bf16", [False, True])
def test_frozen_parts_alone_are_in_bf16(bf16: bool, sources: dict[str, str]):
    for kind in KINDS:
        model = Captioner(kind, load_model(kind, sources[kind], bf16), 3)
        halves = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert halves == ({torch.bfloat16 if bf16 else torch.float32} if kind == "blip2" else set())
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = model(torch.randn(1, 3, 16, 16), model.tokens(["a red cat"]))
        loss.sum().backward()
        assert loss.dtype == torch.float32 and all(
            p.grad is not None for name, p in model.named_parameters() if "vocabulary" not in name
            and p.requires_grad
        )  # fmt: skip


# -- curriculum --------------------------------------------------------------------------------------------


def test_phase_1_records_the_likelihood_of_the_true_prompts(run: Path, sources: dict[str, str]):
    """The last record is that of the last weights of phase 1, and the stages follow the mean."""
    config = saved_config(run)
    prepared = prepare(config)
    last = next((run / "phase-1" / "last").glob("step-*.safetensors"))
    model = loaded(config.backbone, sources, len(json.loads((run / "vocabulary.json").read_text()))).eval()
    own = {k.removeprefix("model."): v for k, v in load_file(last).items() if k.startswith("model.")}
    model.load_state_dict(model.state_dict() | own)
    rows = prepared.splits["train"]
    images, ids = images_and_ids(model, prepared.pairs, rows, config.weights)
    with torch.no_grad():
        expected = torch.exp(-model.model.loss(images, ids, model.n_prompt))
    recorded = np.load(run / "cosines.npy")
    assert recorded.shape == (2, 60)
    np.testing.assert_allclose(recorded[1], expected, atol=1e-5)
    np.testing.assert_allclose(np.load(run / "easiness.npy"), recorded.mean(axis=0), atol=1e-6)
    stages = json.loads((run / "curriculum.json").read_text())["stages"]
    assert [stage["samples"] for stage in stages] == [20, 40, 60]
    best = max(e["val_likelihood"] for e in entries(run) if "val_likelihood" in e)
    state = json.loads((run / "last" / "state.json").read_text())
    assert state["best"] == pytest.approx(best)


def test_the_cosines_of_a_regressors_run_can_take_the_place_of_phase_1(
    sources: dict[str, str], few_scenes: Path, cache: Path, tmp_path: Path
):
    flags = ("--backbone", "vit", "--train-blocks", "0", "--record-cosines", "--head-start", "random")
    regressor = train_here(few_scenes, tmp_path / "regressor", *flags)
    more = {"curriculum": "difficulty", "phase_1": str(regressor)}
    config = small("blip", sources, few_scenes, **more)
    found = train.phase_1(config, tmp_path / "run", Process(), prepare(config), Vocabulary(["red"]))
    assert np.array_equal(found, np.load(regressor / "cosines.npy")) and found.shape == (2, 60)
    with pytest.raises(data.DataError, match="recorded its cosines on other pairs or another split"):
        other = replace(config, seed=1)
        train.phase_1(other, tmp_path / "other", Process(), prepare(other), Vocabulary(["red"]))


def test_difficulty_by_the_cosine_of_greedy_captions(
    sources: dict[str, str], few_scenes: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(captioner, "MAX_TOKENS", 12)
    config = small("blip", sources, few_scenes, difficulty_by="caption", record_cosines=True, epochs=1)
    trainer = trainer_in(tmp_path / "run", config, ["red"])
    found, rows = trainer.recorded_scores(), trainer.prepared.splits["train"]
    pairs, model = trainer.prepared.pairs, trainer.model
    images, _ = images_and_ids(model, pairs, rows, sources["blip"])
    written = model.model.generate(images, num_beams=1, max_length=12)
    minilm = weights.load("minilm")
    expected = (minilm.encode(written) * minilm.encode([pairs.prompts[i] for i in rows])).sum(dim=1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(set(written)) > 1 or found.std() > 0.01


# -- the loop ----------------------------------------------------------------------------------------------


def test_stopped_and_resumed_it_ends_bit_for_bit_alike(
    run: Path, sources: dict[str, str], few_scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped in phase 1, between two checkpoints, and in phase 2."""
    stopped, kind, step = tmp_path / "stopped", saved_config(run).backbone, CaptionerTrainer.train_step
    flags = flags_of(kind, sources, few_scenes, "--out", str(stopped))
    for phase, argv in (("phase-1", flags), ("stopped", ["--resume", str(stopped)])):

        def interrupted(self, *args, phase=phase):
            if self.step == 6 and self.folder.name == phase:
                signal.raise_signal(signal.SIGINT)
            return step(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(CaptionerTrainer, "train_step", interrupted)
            assert train.main(argv) == 130
    assert train.main(["--resume", str(stopped)]) == 0
    assert_same_end(stopped / "phase-1", run / "phase-1")
    assert_same_end(stopped, run)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shares_of_two_processes_sum_to_the_gradient_of_one(
    kind: str, sources: dict[str, str], few_scenes: Path, cache: Path, tmp_path: Path
):
    """Of a batch of three texts of different lengths, and of one of a single text, of which one has none."""
    trainer = trainer_in(tmp_path, small(kind, sources, few_scenes), ["red", "owl"])
    lengths = trainer.train_samples.counts
    for positions in (np.array([int(lengths.argmin()), 5, int(lengths.argmax())]), np.array([7])):
        gradients = []
        for world in (1, 2):
            trainer.model.zero_grad()
            for rank in range(world):
                trainer.process = Process(rank, world)
                (batch,) = trainer.loader([positions])
                trainer.loss(trainer.on_device(batch, positions))["loss"].backward()
            gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad})
        for name, value in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_losses_of_one(
    kind: str, sources: dict[str, str], few_scenes: Path, cache: Path, tmp_path: Path
):
    # 59 training pairs in batches of 29: the last batch is one sample, so one process has none
    flags = flags_of(kind, sources, few_scenes, "--batch-size", "29", "--val-size", "13", "--device", "cpu")
    flags += ["--curriculum", "none", "--epochs", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    torch.set_num_threads(1)
    assert train.main([*flags, "--out", str(one)]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(ROOT / "train.py"), *flags, "--out", str(two)],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(losses(two)[0], losses(one)[0], atol=1e-5)
    np.testing.assert_allclose(losses(two), losses(one), atol=1e-3)
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 2e-3
    assert result_of(two)["test_cosine"] == pytest.approx(result_of(one)["test_cosine"], abs=0.02)


# -- evaluation --------------------------------------------------------------------------------------------


def test_a_run_ends_with_captions_their_scores_and_predictions(run: Path):
    rows = json.loads((run / "predictions" / "rows.json").read_text())
    lines = [json.loads(line) for line in (run / "captions.jsonl").read_text().splitlines()]
    opened, minilm = open_captioner_run(run), weights.load("minilm")
    prepared, images = prepare(saved_config(run)), {}
    for split in ("val", "test"):
        mine = [line for line in lines if line["split"] == split]
        expected = [{"image": line["image"], "prompt": line["prompt"]} for line in mine]
        assert expected == rows[split] and len(rows[split]) == 12
        images[split] = [prepared.pairs.image(i) for i in prepared.splits[split]]
        tensors = torch.stack([data.image_tensor(x, opened.preprocessing) for x in images[split]])
        captions = [line["caption"] for line in mine]
        assert opened.captions(tensors) == captions
        assert Captions(str(run), "cpu").captions(images[split]) == captions
        array = np.load(run / "predictions" / f"{split}.npy", allow_pickle=False)
        np.testing.assert_allclose(array, minilm.encode(captions), atol=1e-5)
    targets = np.load(run / "predictions" / "train-targets.npy")
    np.testing.assert_allclose(targets, minilm.encode([row["prompt"] for row in rows["train"]]), atol=1e-5)
    tests, result = [line for line in lines if line["split"] == "test"], result_of(run)
    scores = clipscore.Scorer("clip-mini").scores(
        images["test"], [line["caption"] for line in tests], [[line["prompt"]] for line in tests]
    )
    for name in ("CLIPScore", "RefCLIPScore"):
        np.testing.assert_allclose([line[name.lower()] for line in tests], scores[name], atol=1e-5)
    assert {n: pytest.approx(x.mean()) for n, x in scores.items() if n != "cos"} == result["scores"]
    for name, mean in result["scores"].items():
        assert result["scores_95"][name][0] <= mean <= result["scores_95"][name][1]
    cosines = (array * np.load(run / "predictions" / "test-targets.npy")).sum(axis=1)
    assert result["test_cosine"] == pytest.approx(cosines.mean(), abs=1e-6)
    assert (result["scorer"], result["n_test"]) == ("clip-mini", 12) and 0 < result["vocabulary_map"] <= 1
    assert (run / "examples.png").stat().st_size > 5000


def test_eval_alone_reproduces_the_result(run: Path, capsys: pytest.CaptureFixture):
    before, captions = result_of(run), (run / "captions.jsonl").read_bytes()
    for name in ("result.json", "captions.jsonl", "predictions/test.npy"):
        (run / name).unlink()
    assert eval_py.main([str(run)]) == 0
    assert result_of(run) == before and (run / "captions.jsonl").read_bytes() == captions
    printed = capsys.readouterr().out
    for name, mean in before["scores"].items():
        assert f"  {name:<22} {mean:.4f}   95 % interval " in printed


def test_captions_are_those_of_a_runs_own_weights(run: Path, tmp_path: Path):
    """Though a run on the same source has cached its captions of the same images."""
    other = Path(shutil.copytree(run, tmp_path / "other"))
    trained = load_file(run / "model.safetensors")
    save_file({name: -value for name, value in trained.items()}, other / "model.safetensors")
    predictions, _ = caption_predictions(other, prepare(saved_config(run)), Process())
    assert not np.array_equal(predictions["test"], np.load(run / "predictions" / "test.npy"))


def test_the_text_beside_a_captioned_image():
    prepared = SimpleNamespace(pairs=SimpleNamespace(prompts=["a cat", "an owl"]), splits={"test": [1]})
    run = SimpleNamespace(vocabulary=Vocabulary(["cat", "owl"]))
    scores, words = {"CLIPScore": np.array([0.5]), "RefCLIPScore": np.array([0.25])}, np.array([[0.25, 0.75]])
    one = run, prepared, ["a bird"], np.array([0.125])
    assert [(line.label, line.text) for line in caption_lines(*one, scores, words)(0)] == [
        ("true prompt", "an owl"), ("caption", "a bird"),
        ("", "cosine 0.125, CLIPScore 0.500, RefCLIPScore 0.250"), ("likely words", "owl 75%, cat 25%"),
    ]  # fmt: skip
    assert [line.text for line in caption_lines(*one, {}, None)(0)] == ["an owl", "a bird", "cosine 0.125"]


def test_a_blip_is_written_as_published(run: Path):
    if saved_config(run).backbone == "blip2":
        assert not (run / "blip").exists()
        return
    again = weights.load("blip", run / "blip").state_dict()
    mine = open_captioner_run(run).captioner.model.state_dict()
    assert again.keys() == mine.keys() and all(torch.equal(again[name], mine[name]) for name in mine)
    with safe_open(run / "blip" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # as transformers wants it


def test_a_captioners_run_is_no_regressor(run: Path):
    with pytest.raises(data.DataError, match="holds a captioner"):
        load_run(run)


def test_words_of_another_run_are_refused(run: Path):
    path = run / "vocabulary.json"
    words = path.read_text()
    path.write_text(json.dumps(json.loads(words)[::-1]))
    with pytest.raises(data.DataError, match="not the words that this run was trained with"):
        open_captioner_run(run)
    path.write_text(words)


# -- flags -------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_authors_fine_tuning():
    paper = {"epochs": 3, "batch_size": 64, "lr": 1e-5, "heads": 1}
    paper |= {"optimizer": "adamw", "weight_decay": 0.05}
    for backbone, source, changed in (
        ("blip", "blip-base", {}),
        ("blip", "my/folder", {}),
        ("blip", "blip-large", {"lr": 2e-6}),
        ("blip2", "blip2-opt-2.7b", {}),
        ("blip", None, {"epochs": 3, "batch_size": 32, "lr": 1e-4, "weights": "blip-mini"}),
        ("blip2", None, {"epochs": 6, "batch_size": 32, "lr": 1e-3, "weights": "blip2-mini"}),
    ):
        config = vars(resolve(TrainConfig(backbone=backbone, weights=source)))
        assert {name: config[name] for name in paper | changed} == paper | changed
    settings = captioner.ORIGINALS["blip"], captioner.ORIGINALS["blip2"]
    assert [(o.prompt, o.label_smoothing) for o in settings] == [("a picture of ", 0.1), ("", 0.0)]
    assert settings[0].generate(77) == {"num_beams": 3, "min_length": 5, "max_length": 77}
    assert settings[1].generate(77) == {"num_beams": 5, "min_new_tokens": 1, "max_new_tokens": 76}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--heads", "2"], "--heads 2: a captioner has no embedding head; give 0 or 1"),
        (["--heads", "3"], "--heads 3"),
        (["--train-blocks", "1"], "--train-blocks: only --backbone clip, unet, swin, vit uses it"),
        (["--head-start", "ridge"], "--head-start"),
        (["--layer-decay", "0.5"], "--layer-decay"),
        (["--captions", "empty"], "--captions"),
        (["--random-start"], "--random-start"),
        (["--target-texts", "x.jsonl"], "--target-texts"),
        (["--activation-checkpointing"], "--activation-checkpointing"),
        (["--image-size", "64"], "--image-size"),
        (["--curriculum", "lerac"], "--curriculum lerac: not for captioners"),
        (["--weights", "sd-mini"], "sd-mini"),
        (["--backbone", "vit", "--difficulty-by", "caption"], "--difficulty-by: only --backbone blip, blip2"),
    ],
)
def test_flags_that_do_not_apply(flags: list[str], message: str, few_scenes: Path, capsys, tmp_path: Path):
    argv = ["--backbone", "blip", "--data", str(few_scenes), "--out", str(tmp_path / "run"), *flags]
    assert train.main(argv) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert message in line and not (tmp_path / "run").exists()


# -- published folders, and the miniature ------------------------------------------------------------------


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of blip-mini before its training, in place of the one in mini/."""
    folder = tmp_path / "untrained-blip-mini"
    folder.mkdir()
    for name in ("vocab.txt", "preprocessor_config.json"):
        (folder / name).write_bytes((captioner.BLIP_MINI / name).read_bytes())
    monkeypatch.setattr(captioner, "BLIP_MINI", folder)
    return folder


def test_a_captioner_is_opened_with_its_own_preprocessing(untrained: Path, tmp_path: Path):
    new = tmp_path / "new" / "deep"
    captioner.write_captioner(captioner.new_captioner(0)[0], new, captioner.BLIP_MINI)
    path = new / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    model, preprocessing, folder = captioner.open_captioner(str(new))
    assert preprocessing.mean == (0.1, 0.2, 0.3) and folder == new and not model.training
    first, second = (captioner.new_captioner(seed)[0].state_dict() for seed in (0, 1))
    tensors = model.state_dict().items()
    assert all(torch.equal(x, first[name]) for name, x in tensors)
    assert not all(torch.equal(x, second[name]) for name, x in tensors)


def test_the_miniature_is_trained_from_random_values_and_written_as_published(
    untrained: Path, few_scenes: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.set_num_threads(1)
    monkeypatch.setattr(pretrain, "training_pairs", lambda parts: data.read_pairs(few_scenes))
    monkeypatch.setattr(pretrain, "HELD_OUT", 20)
    pretrain.train_captioner(parts=1, epochs=1, batch_size=32, lr=1e-3, seed=0)
    card = json.loads((captioner.BLIP_MINI / "card.json").read_text())
    assert -1 < card["prompt_cosine"] < 1 and 0 < card["val_likelihood"] < 1
    model, preprocessing, folder = captioner.open_captioner(str(captioner.BLIP_MINI))
    assert folder == captioner.BLIP_MINI and preprocessing == captioner.new_captioner(0)[1]
    start = captioner.new_captioner(0)[0].state_dict()
    assert not torch.equal(start["vision_model.post_layernorm.bias"],
                           model.state_dict()["vision_model.post_layernorm.bias"])
    assert Checkpoint(weights.cache_dir() / "pretrain-captioner" / "last").load({}) is None
