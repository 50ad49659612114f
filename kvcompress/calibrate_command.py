"""What `kvcompress calibrate` does with its options: measure, show tables, write a spec as JSON and a basis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel

from kvcompress import basis as bases
from kvcompress import calibrate, learning
from kvcompress.budget import Part, average
from kvcompress.calibrate import Calibration
from kvcompress.codecs import SIDES
from kvcompress.divergence import Judge, Measured, Text
from kvcompress.spec import CacheSpec

UNIT = 1e-4  # nats: what tables of KL divergences count in


@dataclass
class Wanted:
    """The options, with what was left open filled in; raises ValueError for any that do not go together.

    One of bits, energy and spec says what is to be found; codec and heads say more of the first two.
    """

    bits: float | None
    energy: float | None
    spec: str | None
    codec: str | None
    heads: bool
    basis: Path | None
    output: Path
    context: int
    passages: int
    seed: int

    def __post_init__(self) -> None:
        goals = {"--bits": self.bits, "--energy": self.energy, "--spec": self.spec}
        given = [name for name, value in goals.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: a budget, ranks by energy, a spec's basis")
        if self.spec is not None and (self.basis is None or self.codec is not None or self.heads):
            raise ValueError("--spec says of which codecs to learn a --basis FILE; it goes without --codec and --heads")
        if self.energy is not None and self.heads:
            raise ValueError("--heads is for --bits: --energy chooses a rank for all heads of a layer")
        for name, file, suffix in (("--basis", self.basis, ".safetensors"), ("--output", self.output, ".json")):
            if file is not None and file.suffix != suffix:
                raise ValueError(f"{name} writes a {suffix} file, which a spec knows by its name, got {str(file)!r}")
        if not given:
            self.bits = 3
        self.codec = self.codec or ("trellis" if self.energy is None else "lowrank")
        self._check_codec(self.codec)

    def _check_codec(self, codec: str) -> None:
        """What the search would raise too, before a model is loaded."""
        if self.bits is not None:
            calibrate.choices(codec, self.bits)
        elif self.energy is not None:
            learning.ranked(codec, learning.LEAST_RANK)
        else:
            CacheSpec.parse(self.spec or "")


def run(model: PreTrainedModel, text: Text, wanted: Wanted) -> None:
    """Find, show and write what is wanted. Raises ValueError as what it calls does, OSError for files."""
    assert wanted.codec is not None
    if wanted.spec is not None:
        spec = CacheSpec.parse(wanted.spec)
    elif wanted.energy is not None:
        spec = _rank(model, text, wanted, wanted.codec, wanted.energy)
    else:
        assert wanted.bits is not None
        spec = _allot(model, text, wanted, wanted.codec, wanted.bits)
    if wanted.basis is not None:
        bases.save(wanted.basis, learning.learn_basis(model, text, spec, wanted.seed))
        spec = replace(spec, basis=str(wanted.basis))
        print(f"wrote {wanted.basis}")
    if wanted.spec is None:
        wanted.output.write_text(spec.to_json() + "\n", "utf-8")
        print(f"wrote {wanted.output}")
    print(f"use it with --spec {wanted.output if wanted.spec is None else spec}")


def _allot(model: PreTrainedModel, text: Text, wanted: Wanted, codec: str, bits: float) -> CacheSpec:
    with _bar() as told:
        found = calibrate.calibrate(
            model,
            text,
            bits,
            codec,
            heads=wanted.heads,
            context=wanted.context,
            count=wanted.passages,
            seed=wanted.seed,
            progress=told,
        )
    console = Console()
    console.print(losses_table(found))
    console.print(candidates_table(found))
    print(f"taken: {found.winner.name}, which is {found.winner.spec}")
    return found.winner.spec


def losses_table(found: Calibration) -> Table:
    """KL divergence by part and number, and the number that the winner has."""
    numbers = list(next(iter(found.losses.values())))
    columns = [f"{number:g} bits" for number in numbers]
    table = Table("layer", "side", *columns, "taken", title="KL in 1e-4 nats a token, each alone coded")
    for part, losses in found.losses.items():
        cells = [f"{losses[number] / UNIT:.3f}" for number in numbers]
        table.add_row(*_names(part), *cells, f"{found.winner.numbers[part]:g}")
    return table


def candidates_table(found: Calibration) -> Table:
    """What was compared: bits on average, of what is coded with overheads, of all held; KL, and the losses' sum."""
    table = Table(title="compared on other passages: bits per element, KL in 1e-4 nats a token")
    table.add_column("spec", no_wrap=True)
    for head in ("average", "coded", "held", "KL", "predicted", ""):
        table.add_column(head)
    for each in found.candidates:
        measured, predicted = _cells(each.measured), f"{each.predicted / UNIT:.3f}"
        taken = "taken" if each is found.winner else ""
        table.add_row(each.name, f"{each.average:.3f}", *measured, predicted, taken)
    return table


def _rank(model: PreTrainedModel, text: Text, wanted: Wanted, codec: str, energy: float) -> CacheSpec:
    """Ranks by energy, measured beside one rank for all of the same average."""
    ranks = learning.ranks_by_energy(model, text, codec, energy, wanted.seed)
    unit = learning.LEAST_RANK
    even = dict.fromkeys(ranks, max(round(average(ranks) / unit), 1) * unit)
    specs = [learning.with_ranks(codec, own) for own in (ranks, even)]
    passages = text.passages(wanted.passages, wanted.context, wanted.seed)
    judge = Judge(model, passages, learning.coded_from(model, specs[0]))
    chosen = Table("layer", "side", "rank", title=f"ranks that keep {energy:.1%} of the energy")
    for part, rank in ranks.items():
        chosen.add_row(*_names(part), str(rank))
    table = Table("ranks", "average", "coded", "held", "KL", title="bits per element, KL in 1e-4 nats a token")
    for name, own, spec in zip(("by energy", "one for all"), (ranks, even), specs, strict=True):
        table.add_row(name, f"{average(own):.1f}", *_cells(judge.measure(spec)))
    console = Console()
    console.print(chosen)
    console.print(table)
    return specs[0]


def _names(part: Part) -> tuple[str, str]:
    side = f"{SIDES[part.side]}s"
    return str(part.layer), side if part.head is None else f"{side}, head {part.head}"


def _cells(measured: Measured) -> tuple[str, str, str]:
    return f"{measured.bits:.3f}", f"{measured.effective:.3f}", f"{measured.kl / UNIT:.3f}"


@contextmanager
def _bar() -> Iterator[calibrate.Progress]:
    """A progress bar on stderr that is gone when all is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("uncompressed", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
