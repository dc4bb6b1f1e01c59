"""The words of a prompt, and whether a word is an adjective, noun or verb (section 3, vocabulary)."""

import re

# Adjectives, nouns and verbs are the open classes of English without the adverbs. So no tagger is needed: we
# drop the closed classes, which are a short list, and the adverbs, most of which end in -ly.
# benchmarks/vocabulary.py measures the agreement with a part-of-speech tagger.
CLOSED_CLASSES = frozenset(
    # determiners, quantifiers and numerals
    """a an the this that these those each every either neither some any no all both half such what which
    whose many much more most few fewer less least several enough another other others one two three four
    five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred thousand million dozen
    first second third"""
    # pronouns
    """ i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we
    us our ours ourselves they them their theirs themselves who whom someone somebody something anyone
    anybody anything everyone everybody everything nobody nothing none there here where when why how whoever
    whatever whichever"""
    # prepositions and particles
    """ of in on at by for with without within from to into onto upon over under above below beneath beside
    besides between among amongst amid amidst behind before after around about across along against through
    throughout during near toward towards off out outside inside up down away back past since until till per
    via versus vs like unlike despite except as than together apart ahead forth beyond underneath atop
    opposite"""
    # conjunctions
    """ and or but nor so yet if because while whereas although though unless whether plus"""
    # auxiliaries, modals and their contractions
    """ be am is are was were been being do does did done doing have has had having can could will would
    shall should may might must ought cannot can't don't doesn't didn't isn't aren't wasn't weren't won't
    wouldn't couldn't shouldn't haven't hasn't hadn't it's he's she's that's there's i'm i've you're we're
    they're let's"""
    # adverbs that do not end in -ly, and abbreviations
    """ not never ever always often again also too very quite rather almost just even still already soon now
    then once twice maybe perhaps instead else ever far away forever everywhere nowhere somewhere elsewhere
    well however therefore thus hence etc eg ie st nd rd th""".split()
)
# Words in -ly that are not adverbs.
NOT_ADVERBS = frozenset(
    """fly butterfly dragonfly firefly family lily lovely ugly holy unholy ghostly heavenly friendly elderly
    belly jelly assembly italy july silly daily curly woolly wooly lonely deadly early godly orderly cuddly
    bubbly wrinkly otherworldly worldly earthly motherly fatherly likely lively monthly weekly bully ally
    rally reply supply multiply apply sly ply oily hilly chilly smelly gnarly sparkly prickly fully-rigged
    billy molly emily sally kelly polly homely costly comely princely scholarly manly womanly beastly
    ghastly grisly burly surly pearly jellyfly""".split()
)
_WORD = re.compile(r"[a-z](?:[a-z'-]*[a-z])")


def words(prompt: str) -> list[str]:
    """The prompt's words of two letters or more in lower case; inner hyphens and apostrophes are kept."""
    return _WORD.findall(prompt.lower())


def is_content_word(word: str) -> bool:
    """Whether a lower-case word counts as an adjective, a noun or a verb (see `CLOSED_CLASSES`)."""
    if word in CLOSED_CLASSES:
        return False
    return not word.endswith("ly") or word in NOT_ADVERBS
