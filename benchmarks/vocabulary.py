"""Agreement of "not a closed-class word, not an adverb" with a part-of-speech tagger on real prompts.

    python benchmarks/vocabulary.py [PROMPTS.txt]      (needs textblob, of requirements-test.txt)

The tagger is the Brill tagger with the Penn Treebank lexicon that TextBlob carries. Compared are single
occurrences of words, and the vocabulary of the 1,000 most frequent adjectives, nouns and verbs that each of
the two leads to.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from textblob.en import tag

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import clean
from reverse_sd import Vocabulary
from words import is_content_word, words

CONTENT_TAGS = ("JJ", "NN", "VB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parents[2] / "shared/data/prompts/diffusiondb_10k.txt"
    parser.add_argument("prompts", nargs="?", type=Path, default=default, help="one prompt a line")
    parser.add_argument("--size", type=int, default=1000, help="words of the vocabulary")
    args = parser.parse_args()
    prompts = args.prompts.read_text(encoding="utf-8").splitlines()
    kept, _ = clean(prompts)
    prompts = [prompts[i].strip() for i in kept]

    agree, total, tagged_counts = 0, 0, Counter()
    wrong: Counter[tuple[str, str]] = Counter()
    for prompt in prompts:
        tagged = set()
        for text, part_of_speech in tag(prompt.lower()):
            if words(text) != [text]:
                continue
            theirs = part_of_speech.startswith(CONTENT_TAGS)
            total += 1
            agree += theirs == is_content_word(text)
            wrong[text, part_of_speech] += theirs != is_content_word(text)
            if theirs:
                tagged.add(text)
        tagged_counts.update(tagged)
    ours = set(Vocabulary.of(prompts, args.size).words)
    ranked = sorted(tagged_counts.items(), key=lambda item: (-item[1], item[0]))[: args.size]
    theirs = {word for word, _ in ranked}
    print(f"prompts {len(prompts):,}   words {total:,}")
    print(f"occurrences on which both agree   {agree / total:.2%}")
    print(f"vocabulary words in common        {len(ours & theirs) / len(theirs):.2%} of {len(theirs):,}")
    print(
        "most frequent disagreements       "
        + ", ".join(f"{w}/{t} {n}" for (w, t), n in wrong.most_common(25))
    )
    print("only ours                         " + ", ".join(sorted(ours - theirs)[:60]))
    print("only the tagger's                 " + ", ".join(sorted(theirs - ours)[:60]))


if __name__ == "__main__":
    main()
