"""Table 5 by people: the page on which they vote, its key, and the table of their votes.

`eval.py --vote` writes one HTML page with pairs of pictures and, beside it, the key: which picture of each
pair is by which U-Net. Voters get the page alone. Each of them saves a file of votes, and
`eval.py --table 5 --votes FILE...` makes the table from these files and the key, without runs or pictures.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

import data
from files import atomic_write, write_json
from schema import NULL, OBJECT, TEXT, checked, many, number, one_of, read_json, record
from tables import generation
from tables.exhibit import Exhibit, bullets, markdown, p_text, page, provenance, provenance_text, short
from tables.runs import Plan
from training.metrics import RESAMPLES, bootstrap_interval, fleiss_kappa, sign_test

TEMPLATE = Path(__file__).with_name("vote.html")
PAGE, KEY = "vote.html", "vote-key.json"
LOSSLESS = 256  # pixels; larger pictures become JPEGs: 100 pairs of PNGs at 512 pixels are 100 MB
CHOICES = TRAINED, ORIGINAL, UNDECIDED = "trained", "original", "undecided"
PAPER_AGREEMENTS, PAPER_AVERAGE = (21, 2, 14), ("39.6", "15.0", "45.4")
# The fields of the key and of a file of votes.
PAIR = {"prompt": TEXT, "left": one_of(TRAINED, ORIGINAL), "probe": one_of(*CHOICES) | NULL}
KEY_FIELDS = {
    **{name: TEXT for name in ("page", "run", "command", "date", "torch", "numpy", "processor", "data")},
    "weights": OBJECT,
    "seeds": many(number(int, 0), 1),
    "pairs": many(record(PAIR), 1),
}
VOTE_FIELDS = {"page": TEXT, "voter": TEXT, "votes": OBJECT}
SIDE = one_of("left", "right", "undecided")


# -- the page ----------------------------------------


def data_uri(picture: np.ndarray) -> str:
    """A picture uint8 (H, W, 3) as a data URI, at its own size."""
    kind = "png" if len(picture) <= LOSSLESS else "jpeg"
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, quality=92)  # PNG has no quality
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def ballot(prompts: Sequence[str], original: np.ndarray, trained: np.ndarray) -> tuple[str, list[str], str]:
    """The page's id, the U-Net whose picture is on the left of each pair, and the page as HTML.

    The pictures are uint8 (n, H, W, 3). Id and sides are the two halves of one hash of the prompts and the
    pictures: the same pictures make the same page again, and the id does not reveal the sides.
    """
    digest = hashlib.sha256(json.dumps(list(prompts)).encode() + original.tobytes() + trained.tobytes())
    page_id, seed = digest.hexdigest()[:32], int(digest.hexdigest()[32:], 16)
    left = [CHOICES[side] for side in np.random.default_rng(seed).integers(2, size=len(prompts))]
    pairs = []
    for k, (prompt, side, *pictures) in enumerate(zip(prompts, left, trained, original, strict=True), 1):
        uris = [data_uri(picture) for picture in pictures]
        first, second = uris if side == TRAINED else reversed(uris)
        pairs.append({"id": str(k), "prompt": prompt, "left": first, "right": second})
    content = json.dumps({"id": page_id, "pairs": pairs}).replace("<", "\\u003c")  # no </script> in a prompt
    return page_id, left, TEMPLATE.read_text("utf-8").replace("{{page}}", content)


def probe_choices(requests: Sequence[generation.Request], drawn: dict[str, np.ndarray]) -> list[str | None]:
    """The probe's choice for each pair, as in table 5 without votes; None if it cannot judge the prompts."""
    if not all(request.view for request in requests):
        return [None] * len(requests)
    more = generation.words_shown(drawn["trained"], requests) - generation.words_shown(
        drawn["original"], requests
    )
    return [{1: TRAINED, -1: ORIGINAL, 0: UNDECIDED}[sign] for sign in np.sign(more)]


def write_page(plan: Plan, folder: Path) -> None:
    """Write the page and its key, for test prompts of the run of the plan's one seed.

    Raises DataError if the folder holds the key of another page.
    """
    (seed,) = plan.seeds
    requests = generation.spread(generation.prompt_sets(plan, seed)["test prompts"], generation.VOTES)
    prompts = [request.prompt for request in requests]
    drawn = generation.drawn_by_both(plan, generation.open_pipeline(plan), requests, seed)
    page_id, left, html = ballot(prompts, drawn["original"], drawn["trained"])
    path = folder / KEY
    if path.exists() and read_json(path, KEY_FIELDS)["page"] != page_id:
        raise data.DataError(
            f"{path}: is the key of another page, whose votes need it; give another --results folder"
        )
    columns = zip(prompts, left, probe_choices(requests, drawn), strict=True)
    pairs = [dict(zip(PAIR, column, strict=True)) for column in columns]
    write_json(path, provenance(plan) | generation.drawing_settings() | {"page": page_id, "pairs": pairs})
    atomic_write(folder / PAGE, html)
    print(f"written: {folder / PAGE}, {len(pairs)} pairs for the voters, and {path}, which they must not see")


# -- the table ----------------------------------------


def read_votes(files: Sequence[Path], key_path: Path) -> tuple[dict, np.ndarray]:
    """The key, and the choices (people, n) as indices of CHOICES.

    Raises DataError for votes of another page, for missing or unknown pairs and choices, and for two files of
    one voter.
    """
    if not key_path.exists():
        raise data.DataError(f"{key_path}: is missing; give --results with the folder of the page")
    key = read_json(key_path, KEY_FIELDS)
    pairs = {str(k): pair for k, pair in enumerate(key["pairs"], 1)}
    choices: list[list[int]] = []
    voters: dict[str, Path] = {}
    for path in files:
        file = read_json(path, VOTE_FIELDS, closed=True)
        if file["page"] != key["page"]:
            raise data.DataError(
                f"{path}: holds votes of another page than {key_path}; give votes of this page, or --results "
                "with the folder of the other"
            )
        votes = checked(file["votes"], dict.fromkeys(pairs, SIDE), f"{path}: votes", closed=True)
        voter = file["voter"].strip().casefold()
        if voter in voters:
            raise data.DataError(f"{path}: has the voter of {voters[voter]}; give one file of each voter")
        voters[voter] = path
        choices.append([chosen(pair["left"], votes[name]) for name, pair in pairs.items()])
    return key, np.array(choices)


def chosen(left: str, vote: str) -> int:
    """The index in CHOICES of a vote for a side, by the U-Net on the left."""
    if vote == "undecided":
        return CHOICES.index(UNDECIDED)
    return CHOICES.index(left) ^ (vote == "right")  # 0 trained, 1 original


def counted(choices: np.ndarray) -> list[int]:
    """The number of each of CHOICES in indices (n,)."""
    return np.bincount(choices, minlength=len(CHOICES)).tolist()


def per_pair(choices: np.ndarray) -> np.ndarray:
    """The number of people that made each of CHOICES, (n, 3), by choices (people, n)."""
    return (choices[..., None] == np.arange(len(CHOICES))).sum(axis=0)


def majority(choices: np.ndarray) -> np.ndarray:
    """The choice (n,) that most people made, by choices (people, n); undecided after a tie."""
    counts = per_pair(choices)
    tied = (counts == counts.max(axis=1, keepdims=True)).sum(axis=1) > 1
    return np.where(tied, CHOICES.index(UNDECIDED), counts.argmax(axis=1))


def compute(key: dict, choices: np.ndarray, plan: Plan) -> dict:
    """The table's numbers and, for each pair, its prompt and the choices of people and probe.

    "preference": trained minus original, averaged over people and pairs, with an interval over pairs.
    """
    people, counts, most = len(choices), per_pair(choices), majority(choices)
    preference = (counts[:, 0] - counts[:, 1]) / people
    probe = None
    if key["pairs"][0]["probe"]:
        found = np.array([CHOICES.index(pair["probe"]) for pair in key["pairs"]])
        probe = {"votes": counted(found), "alike": int((most == found).sum())}
        probe["kappa"] = fleiss_kappa(per_pair(np.stack([most, found])))
    return {name: key[name] for name in ("data", "weights", "seeds")} | {
        "n": len(counts),
        "people": [counted(person) for person in choices],
        "agreements": (counts == people).sum(axis=0).tolist(),
        "average": (counts.sum(axis=0) / people).tolist(),
        "majority": counted(most),
        "alike": [int((a == b).sum()) for a, b in combinations(choices, 2)],
        "kappa": fleiss_kappa(counts) if people > 1 else None,
        "preference": float(preference.mean()),
        "preference_95": bootstrap_interval(preference, resamples=RESAMPLES),
        "probe": probe,
        "pictures": {name: value for name, value in key.items() if name != "pairs"},
        "pairs": [
            {"prompt": pair["prompt"], "people": [CHOICES[k] for k in column], "probe": pair["probe"]}
            for pair, column in zip(key["pairs"], choices.T, strict=True)
        ],
    }


def with_p(votes: Sequence[int]) -> tuple[object, ...]:
    """Counts of CHOICES, and the p of their sign test."""
    return *votes, p_text(sign_test(*votes[:2]))


def text(result: dict) -> str:
    """Table 5 of people's votes as Markdown."""
    n, probe, pictures = result["n"], result["probe"], result["pictures"]
    names = [f"#{k}" for k in range(1, len(result["people"]) + 1)]
    columns = {name: with_p(votes) for name, votes in zip(names, result["people"], strict=True)}
    columns["agreements"] = *result["agreements"], ""
    columns["average"] = *(f"{votes:.1f}" for votes in result["average"]), ""
    columns["majority"] = with_p(result["majority"])
    if probe:
        columns["probe"] = with_p(probe["votes"])
    columns |= {f"paper: #{k}": with_p(votes) for k, votes in enumerate(generation.PAPER_VOTES, 1)}
    columns |= {"paper: agreements": (*PAPER_AGREEMENTS, ""), "paper: average": (*PAPER_AVERAGE, "")}
    notes = []
    if result["alike"]:
        alike = zip(combinations(names, 2), result["alike"], strict=True)
        notes.append(
            f"Same choice: {', '.join(f'{a} and {b} {k} of {n}' for (a, b), k in alike)}; Fleiss' kappa "
            f"{short(result['kappa']) or 'undefined'}."
        )
    low, high = result["preference_95"]
    notes += [
        f"Trained minus original, averaged over people: {100 * result['preference']:+.1f} percentage points "
        f"of the pairs ({100 * low:+.1f} to {100 * high:+.1f}, bootstrap over pairs).",
        "p: two-sided sign test of the decided pairs. Agreements: pairs for which all people made the "
        "choice. Majority: undecided if no choice has the most votes.",
        "The pictures are by one training; interval and p do not cover other trainings and other people.",
    ]
    if probe:
        notes.append(
            "The probe counts the things of a prompt that it finds in a picture; equal is undecided. The "
            f"majority and the probe agree in {probe['alike']} of {n} pairs; Fleiss' kappa "
            f"{short(probe['kappa']) or 'undefined'}."
        )
    return page(
        "Table 5: which picture is more representative of its prompt",
        f"{provenance_text(result)} {n} test prompts, the same noise for both U-Nets, sides at random and "
        f"hidden. Trained: {pictures['run']}. Pictures, page {pictures['page']}: {provenance_text(pictures)}",
        markdown(f"choice | {' | '.join(columns)}", zip((*CHOICES, "p"), *columns.values(), strict=True)),
        bullets(notes),
    )


def voted(files: Sequence[Path], key_path: Path) -> Exhibit:
    """Table 5 of files of votes. They are read here, before the trainings of other tables."""
    return Exhibit((), partial(compute, *read_votes(files, key_path)), text)
