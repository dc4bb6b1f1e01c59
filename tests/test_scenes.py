"""The little world: what is said is drawn but for the words recorded as undrawn; builds repeat exactly."""

import json
import os
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from data import DataError, clean, read_pairs
from mini import scenes
from mini.backdrops import GROUNDS, SKIES
from mini.pen import PAINT, pick, stream
from mini.scenes import Scene, Thing, View, build, candidate, render, words_of
from mini.styles import STYLE_PAINT
from mini.subjects import MATERIAL_PAINT, SHAPES

TABLES = (scenes.SUBJECTS, scenes.COLOURS, scenes.MATERIALS, scenes.COUNTS, scenes.RELATIONS,
          scenes.POSITIONS, scenes.PLACES, scenes.LIGHTS, scenes.STYLES)


def drawn(view: View, seed: int = 0, size: int = 64) -> np.ndarray:
    return np.asarray(render(Scene("", (), (), view, view, seed), size)).astype(int)


def zips(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


@pytest.fixture(scope="module")
def world() -> list[Scene]:
    return [candidate(0, index) for index in scenes.kept_indices(2000, 0)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    build(folder, parts=2, per_part=20, seed=5, progress=False)
    return folder


# ------------------------------------------------------------------------------------------ words and prompts
def test_every_word_says_one_thing():
    for table in TABLES:
        words = [word for key in table for _, word in words_of(table, key)]
        assert len(words) == len(set(words)), f"a word stands twice in {table}"
        assert all(word and "*" not in word and word.isascii() for word in words)


def test_over_a_million_distinct_prompts(world):
    assert scenes.distinct_prompts() > 1_000_000
    assert len({scene.prompt for scene in world}) == len(world)
    slots = {"subject 0": scenes.SUBJECTS, "colour 0": scenes.COLOURS, "material 0": scenes.MATERIALS,
             "place": scenes.PLACES, "style": scenes.STYLES}        # the words that the bound multiplies
    rng, said = stream(0), {}
    for _ in range(4000):
        keys = {slot: pick(rng, table) for slot, table in slots.items()}
        spoken = {slot: pick(rng, words_of(slots[slot], key)) for slot, key in keys.items()}
        said[tuple(word for _, word in spoken.values())] = scenes.say(spoken, stream(1))
    assert len(said) > 3900 and len(set(said.values())) == len(said)


def test_prompts_survive_cleaning_untouched(world):
    prompts = [scene.prompt for scene in world]
    kept, report = clean(prompts)
    assert kept.tolist() == list(range(len(prompts)))
    assert report["kept"] == report["read"] == len(prompts)
    assert all(prompt == prompt.strip() and "  " not in prompt for prompt in prompts)


def test_acceptance_and_length(world):
    assert len(world) / (scenes.kept_indices(2000, 0)[-1] + 1) > 0.9
    lengths = np.array([len(scene.prompt.split()) for scene in world])
    assert 9 < lengths.mean() < 14
    assert np.mean((lengths >= 6) & (lengths <= 22)) > 0.93


def test_words_stand_in_the_prompt(world):
    for scene in world:
        assert len(scene.words) == len(set(scene.words))
        assert all(word in scene.prompt for word in scene.words)
        assert set(scene.undrawn) <= set(scene.words)


def test_articles():
    nouns = ["ivory owl", "cat", "umbrella", "pixel art", "paper heart"]
    said = [scenes.with_article(noun) for noun in nouns]
    assert said == ["an ivory owl", "a cat", "an umbrella", "pixel art", "a paper heart"]


def test_everything_is_said_somewhere(world):
    text = "\n".join(scene.prompt for scene in world)
    for table in TABLES:
        for key in table:
            assert any(word in text for _, word in words_of(table, key)), key


# ------------------------------------------------------------------------------------------------ label noise
def test_undrawn_share_and_its_spread(world):
    shares = np.array([len(scene.undrawn) / len(scene.words) for scene in world])
    assert 0.04 < shares.mean() < 0.09
    assert shares.std() > 0.14                     # independent words alone would give about 0.11
    assert np.mean(shares == 0) > 0.55 and np.mean(shares >= 0.5) > 0.02


def test_nothing_undrawn_means_drawn_as_said(world):
    for scene in world:
        assert (scene.drawn == scene.said) == (not scene.undrawn)


def test_undrawn_words_change_the_picture(world):
    noisy = [scene for scene in world if scene.undrawn][:150]
    assert len(noisy) == 150
    for scene in noisy:
        told = render(replace(scene, drawn=scene.said))
        assert render(scene).tobytes() != told.tobytes(), (scene.prompt, scene.undrawn)


@pytest.mark.parametrize("slot", ["subject 0", "colour 0", "material 0", "count", "place", "light", "style"])
def test_a_lost_slot_shows_something_else(slot):
    said = View((Thing("cat", "red", "stripes"),), count=3, place="snow", light="fog", style="oil")
    for seed in range(20):
        view, lost = scenes.undraw(said, {slot}, stream(seed))
        assert view != said and lost == {slot}


def test_a_missing_thing_takes_its_words_along():
    said = View((Thing("cat", "red"), Thing("owl", "blue", "glass")), relation="left", place="sea")
    outcomes = [scenes.undraw(said, {"subject 1"}, stream(seed)) for seed in range(40)]
    gone = [lost for view, lost in outcomes if len(view.things) == 1]
    assert 0 < len(gone) < 40
    assert all({"subject 1", "colour 1", "material 1", "relation"} <= lost for lost in gone)


def test_replaced_places_fit_the_light():
    said = View((Thing("cat"),), place="snow", light="rain")
    places = {scenes.undraw(said, {"place"}, stream(seed))[0].place for seed in range(80)}
    assert not places & {*scenes.INDOORS, "snow"}


# --------------------------------------------------------------------------------------------------- pictures
def test_tables_and_drawings_agree():
    assert set(SHAPES) == set(scenes.SUBJECTS)
    assert set(PAINT) == set(scenes.COLOURS)
    assert set(MATERIAL_PAINT) == set(scenes.MATERIALS)
    assert set(GROUNDS) == {None, *scenes.PLACES}
    assert set(SKIES) == {None, *scenes.LIGHTS}
    assert set(STYLE_PAINT) == set(scenes.STYLES)


@pytest.mark.parametrize("slot, table, least", [
    ("subject", scenes.SUBJECTS, 4), ("colour", scenes.COLOURS, 1.5), ("material", scenes.MATERIALS, 1),
    ("count", scenes.COUNTS, 4), ("position", scenes.POSITIONS, 4), ("relation", scenes.RELATIONS, 4),
    ("place", scenes.PLACES, 8), ("light", scenes.LIGHTS, 2), ("style", scenes.STYLES, 4)])
def test_each_key_shows(slot, table, least):
    """Every pair of keys differs by at least `least` of 255 on average over the whole picture."""
    cat, owl = Thing("cat", "red"), Thing("owl", "blue")
    pictures = []
    for key in table:
        view = {"relation": View((cat, owl), place="meadow", relation=key)}.get(slot)
        if slot in ("subject", "colour", "material"):
            view = View((replace(cat, **{slot: key}),), place="meadow")
        pictures.append(drawn(view or replace(View((cat,), place="meadow"), **{slot: key})))
    assert all(image.shape == (64, 64, 3) for image in pictures)
    assert all(image.std() > 8 for image in pictures)
    gaps = [np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(gaps) > least


def test_a_single_thing_is_large():
    for subject in scenes.SUBJECTS:
        other = "star" if subject != "star" else "apple"
        change = np.abs(drawn(View((Thing(subject, "pink"),))) - drawn(View((Thing(other, "black"),))))
        assert (change.max((1, 2)) > 20).sum() > 26, subject


def test_pictures_are_deterministic_and_jittered(world):
    for scene in world[:10]:
        assert render(scene).tobytes() == render(scene).tobytes()
    assert candidate(3, 4) == candidate(3, 4) != candidate(3, 5)
    view = world[0].drawn
    assert (drawn(view, seed=1) != drawn(view, seed=2)).any()


@pytest.mark.parametrize("size", [32, 64, 96])
def test_other_sizes(size):
    for style in (None, *scenes.STYLES):
        view = View((Thing("house", "red", "wood"),), place="city", light="night", style=style)
        assert drawn(view, size=size).shape == (size, size, 3)


def test_a_larger_picture_is_the_same_scene():
    view = View((Thing("boat", "red"),), place="sea", light="sunset")
    small, large = drawn(view), drawn(view, size=128).reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(small - large).mean() < 4


# ------------------------------------------------------------------------------------------------------ parts
def test_parts_read_as_diffusiondb(built):
    pairs = read_pairs(built)
    assert len(pairs) == 40
    assert pairs.prompts == [candidate(5, index).prompt for index in scenes.kept_indices(40, 5)]
    assert pairs.image(7).size == (64, 64)
    with zipfile.ZipFile(built / "images" / "part-000002.zip") as archive:
        listing = json.loads(archive.read("part-000002.json"))
        assert archive.namelist() == [*listing, "part-000002.json"]
    assert all(set(entry) == {"p", "se", "undrawn"} for entry in listing.values())
    assert all(word in entry["p"] for entry in listing.values() for word in entry["undrawn"])


def test_rebuild_is_byte_identical(built, tmp_path):
    build(tmp_path / "again", parts=2, per_part=20, seed=5, progress=False)
    assert zips(tmp_path / "again") == zips(built)
    build(tmp_path / "other", parts=2, per_part=20, seed=6, progress=False)
    assert not set(read_pairs(tmp_path / "other").names) & set(read_pairs(built).names)


def test_several_processes_draw_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes.os, "cpu_count", lambda: 2)
    build(tmp_path / "two", parts=1, per_part=100, progress=False)
    monkeypatch.setattr(scenes.os, "cpu_count", lambda: 1)
    build(tmp_path / "one", parts=1, per_part=100, progress=False)
    assert zips(tmp_path / "two") == zips(tmp_path / "one")


def test_no_processes_to_be_had(tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise OSError("no semaphores")
    monkeypatch.setattr(scenes.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(scenes, "ProcessPoolExecutor", refuse)
    build(tmp_path, parts=1, per_part=100, progress=False)
    assert len(read_pairs(tmp_path)) == 100


def test_a_process_that_is_ended_is_one_line_and_no_hang(tmp_path, monkeypatch):
    parent = os.getpid()
    monkeypatch.setattr(scenes.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(scenes, "render", lambda of: render(of) if os.getpid() == parent else os._exit(9))
    with pytest.raises(DataError, match="^drawing: a process was ended, .* repeat the command$"):
        build(tmp_path, parts=1, per_part=100, progress=False)
    monkeypatch.undo()
    build(tmp_path, parts=1, per_part=100, progress=False)
    assert len(read_pairs(tmp_path)) == 100


@pytest.mark.parametrize("moment", ["while drawing", "while writing"])
def test_interrupted_build_resumes(built, tmp_path, monkeypatch, moment):
    calls = []
    name = "draw_pair" if moment == "while drawing" else "atomic_write"
    original, last = getattr(scenes, name), 30 if moment == "while drawing" else 2

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == last:
            raise KeyboardInterrupt
        return original(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(scenes, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, parts=2, per_part=20, seed=5, progress=False)
    assert list(zips(tmp_path)) == ["part-000001.zip"]

    again = []
    draw = scenes.draw_pair
    monkeypatch.setattr(scenes, "draw_pair", lambda job: again.append(job) or draw(job))
    build(tmp_path, parts=2, per_part=20, seed=5, progress=False)
    assert zips(tmp_path) == zips(built)
    assert len(again) == 20                        # the part that was there is not drawn again
    build(tmp_path, parts=2, per_part=20, seed=5, progress=False)
    assert len(again) == 20


def test_damaged_part_is_made_again(built, tmp_path):
    build(tmp_path, parts=2, per_part=20, seed=5, progress=False)
    part = tmp_path / "images" / "part-000001.zip"
    part.write_bytes(part.read_bytes()[:5000])
    build(tmp_path, parts=2, per_part=20, seed=5, progress=False)
    assert zips(tmp_path) == zips(built)


# ----------------------------------------------------------------------------------------------- command line
def test_contact_sheet(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scenes", "--sheet", str(tmp_path / "sheet.png"), "--n", "9"])
    scenes.main()
    sheet = scenes.Image.open(tmp_path / "sheet.png")
    assert sheet.width > 8 * 128 and sheet.height > 2 * 128


@pytest.mark.parametrize("n, rows", [(1, 1), (8, 1), (9, 2), (17, 3)])
def test_each_cell_of_a_contact_sheet_holds_a_picture_above_its_text(n, rows):
    pictures = [(scenes.Image.new("RGB", (64, 64), (3 * i, 90, 0)), "a word" * (i % 2)) for i in range(n)]
    sheet = scenes.contact_sheet(pictures)
    assert sheet.size == (8 * 136 + 8, rows * 198 + 8)
    for i, (image, text) in enumerate(pictures):
        x, y = 8 + i % 8 * 136, 8 + i // 8 * 198
        assert sheet.crop((x, y, x + 128, y + 128)).getcolors() == [(128 * 128, image.getpixel((0, 0)))]
        strip = sheet.crop((x, y + 130, x + 128, y + 142))
        assert (len(strip.getcolors()) > 1) == bool(text)
    assert sheet.getpixel((4, 4)) == sheet.getpixel((4, sheet.height - 1)) == (250, 248, 244)


def test_nothing_to_do_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scenes"])
    with pytest.raises(SystemExit):
        scenes.main()
    assert "--sheet" in capsys.readouterr().err.splitlines()[-1]
