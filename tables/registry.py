"""All tables and figures by number or name. A new one is added to the dictionary of its own file."""

from tables.budget import BUDGET
from tables.compute import COMPUTED_TABLES
from tables.confidence import CONFIDENCE
from tables.crossed import CROSSED
from tables.denoised import DENOISED
from tables.difficulty import DIFFICULTY
from tables.exhibit import Exhibit
from tables.figures import FIGURES
from tables.generation import GENERATION_TABLES
from tables.judges import JUDGES
from tables.prompts import PROMPTS, PROMPTS_FIGURES
from tables.readouts import READOUTS
from tables.redrawn import REDRAWN_FIGURES, REDRAWN_TABLES
from tables.shift import SHIFT
from tables.swap import SWAP
from tables.sweep import SWEEP
from tables.votes import text as votes_text
from tables.words import WORDS


def in_order(exhibits: dict[int | str, Exhibit]) -> dict[int | str, Exhibit]:
    """Numbers first, then names."""
    return dict(sorted(exhibits.items(), key=lambda item: (isinstance(item[0], str), item[0])))


TABLES = COMPUTED_TABLES | GENERATION_TABLES | READOUTS | SWEEP | SHIFT | CROSSED | SWAP
TABLES |= JUDGES | DIFFICULTY | BUDGET | DENOISED | WORDS | CONFIDENCE | PROMPTS | REDRAWN_TABLES
ALL_FIGURES = FIGURES | PROMPTS_FIGURES | REDRAWN_FIGURES
EXHIBITS = {"table": in_order(TABLES), "figure": in_order(ALL_FIGURES)}


def text_of(result: dict) -> str:
    """The Markdown of a results file."""
    if "people" in result:  # table 5 by people's votes
        return votes_text(result)
    kind = "table" if "table" in result else "figure"
    return EXHIBITS[kind][result[kind]].text(result)
