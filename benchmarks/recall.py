"""Associative recall: facts stated early in a document, asked for much later.

A fact reads ``Note: the password of Harriet is copper lantern.`` and its question repeats the sentence up to the value
(``Recall: the password of Harriet is``), so that a model answers by looking back, not by knowing. The training of the
embedded model and the needle tests draw from this one file.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NAMES = """Agnes Albert Alfred Amelia Arthur Barbara Basil Beatrice Bernard Caroline Cecil Charles Clara Conrad Cyril
Daniel Dora Dorothy Edgar Edith Edmund Eleanor Emma Ernest Esther Eugene Fanny Felix Florence Frances Frederick George
Gilbert Grace Harold Harriet Helen Henry Herbert Hester Hugh Ida Irene Isabel Jasper Julia Kate Laura Leonard Louisa
Lucy Mabel Margaret Martha Maurice Miriam Nancy Nicholas Olive Oscar Patrick Philip Rachel Ralph Rebecca Robert Roger
Rose Rupert Ruth Samuel Sarah Silas Simon Stella Stephen Susan Sylvia Theodore Thomas Ursula Victor Violet Walter
Wilfred William Winifred""".split()

QUALITIES = """ancient bitter black blue bold brave bright broken calm clear clever cold cruel dark deep double dry dull
empty faint false fine firm flat foreign free fresh gentle golden grand gray great green happy heavy hidden high hollow
honest humble idle iron kind large light little lonely long loose loud low merry narrow noble old open pale perfect
plain proud pure quiet rapid rare red rich rough round royal sacred sharp short silent silver simple single slow small
smooth soft solid solemn stern still strange strong sudden sweet swift tall tender thick thin tired true vast warm weak
white wide wild wise wooden yellow young""".split()

THINGS = """apple army arrow bank basket bell bird boat bone book bottle bridge candle captain carriage castle cat chain
chair chapel church circle city cloud coat corn corner cottage cow cup door dream ear eagle engine farm father feather
field fire fish flag flower forest fruit game garden gate glass gold guest guide hall hammer harbor hat heart hill horse
house island journey judge key king knife ladder lady lake lamp leaf letter lion lock machine market master meadow milk
mirror money moon mountain music needle night office orange owl paper path pearl pipe plate pocket poet pool prince
queen ring river road rock roof room rope sail salt school sea shadow sheep shell ship shoe silk sister soldier song
spring star stone storm street sun sword table teacher temple thread tower town train tree valley village violin wagon
wall water wave wheel window wine winter wolf wood""".split()


@dataclass(frozen=True)
class Fact:
    """One thing to remember: the password of `name` is `value` (two words)."""

    name: str
    value: str

    @property
    def statement(self) -> str:
        return f"\nNote: the password of {self.name} is {self.value}.\n"

    @property
    def question(self) -> str:
        """The text after which a model that remembers goes on with `answer`."""
        return f"\nRecall: the password of {self.name} is"

    @property
    def answer(self) -> str:
        return f" {self.value}"


def draw_value(rng: random.Random) -> str:
    """Two words."""
    return f"{rng.choice(QUALITIES)} {rng.choice(THINGS)}"


def draw_facts(rng: random.Random, count: int, distinct: bool = False) -> list[Fact]:
    """`count` facts with names of their own. distinct: no two values begin with the same word, so that the two tokens
    before a value's second word tell it from all others.

    Raises ValueError above the number of names known.
    """
    if not 0 <= count <= len(NAMES):
        raise ValueError(f"count must lie in 0..{len(NAMES)} (names are not repeated), got {count}")
    names = rng.sample(NAMES, count)
    if not distinct:
        return [Fact(name, draw_value(rng)) for name in names]
    qualities = rng.sample(QUALITIES, count)
    return [Fact(name, f"{quality} {rng.choice(THINGS)}") for name, quality in zip(names, qualities, strict=True)]
