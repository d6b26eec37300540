"""What population training did: samples seen per layer and domain, and how far statistics moved."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# one name for all of population training
logger = logging.getLogger("rethinking_bn.population")


@dataclass(frozen=True)
class LayerReport:
    """One set of population statistics; "old" are those that this rank had before.

    Attributes:
        name: of the layer in the model.
        domain: "" when the layer has one set for all, else the domain, such as "3".
        samples: values per channel that were seen on all ranks together (batches, of a layer in
            ``from_buffers``). With 0 the statistics were kept; the numbers are 0, 0 and 1 then.
        drift_mean, drift_max: |old mean - new mean| in units of the new standard deviation
            √(var + eps), averaged over the channels and at its largest (by a mean square alone:
            |√old - √new|). Infinite for statistics that were not finite.
        variance_ratio: old / new variance (plus eps each), geometric mean over the channels.
    """

    name: str
    domain: str
    samples: int
    drift_mean: float
    drift_max: float
    variance_ratio: float

    @property
    def label(self) -> str:
        """The layer's name, with the domain in brackets where there are several."""
        return f"{self.name}[{self.domain}]" if self.domain else self.name


@dataclass(frozen=True)
class PopulationReport:
    """The outcome of :func:`rethinking_bn.population.estimate_population_statistics`.

    Attributes:
        layers: one entry per layer and domain, in the model's order.
        frozen: names of the BN-like layers that were left alone: in eval mode, frozen or constant.
        num_batches: forwards on each rank.
        world_size: ranks W.
        labelled: whether the model ran on labelled data, as in training.
        seconds: wall-clock time on this rank.
        left: modules that are not known to be BatchNorm, with the reasons.
        from_buffers: names of layers with a forward of their own, whose statistics are what they
            left in their buffers, averaged over batches.
    """

    layers: tuple[LayerReport, ...]
    frozen: tuple[str, ...]
    num_batches: int
    world_size: int
    labelled: bool
    seconds: float
    left: tuple[str, ...] = ()
    from_buffers: tuple[str, ...] = ()

    @property
    def unreached(self) -> tuple[str, ...]:
        """Labels of the statistics that no forward reached with a single value: kept as before."""
        return tuple(layer.label for layer in self.layers if layer.samples == 0)

    @property
    def drift(self) -> float:
        """The largest drift of any channel, in standard deviations; 0 with nothing estimated."""
        return max((layer.drift_max for layer in self.layers), default=0.0)

    @property
    def drift_mean(self) -> float:
        """The layers' and domains' mean drift, averaged over those that were estimated."""
        drifts = [layer.drift_mean for layer in self.layers if layer.samples]
        return sum(drifts) / len(drifts) if drifts else 0.0

    def summary(self) -> str:
        """Return one line."""
        done = len(self.layers) - len(self.unreached)
        kind = "labelled" if self.labelled else "unlabelled"
        return (
            f"population statistics: {done} sets from {self.num_batches} {kind} batches on each of "
            f"{self.world_size} rank(s) in {self.seconds:.1f} s; old means were off by "
            f"{self.drift_mean:.3g} standard deviations on average, {self.drift:.3g} at most"
        )

    def __str__(self) -> str:
        """Return the summary and a table, a line per layer and domain."""
        wide = max([5, *(len(layer.name) for layer in self.layers)])
        lines = [self.summary()]
        if self.layers:
            head = ("domain", "samples", "drift mean", "drift max", "old/new var")
            lines.append("  ".join([f"{'layer':{wide}}", *(f"{title:>11}" for title in head)]))
        for layer in self.layers:
            drifts = f"{layer.drift_mean:11.3g}  {layer.drift_max:11.3g}"
            seen = f"{layer.domain or '-':>11}  {layer.samples:11}"
            lines.append(f"{layer.name:{wide}}  {seen}  {drifts}  {layer.variance_ratio:11.3g}")
        return "\n".join([*lines, *(text for _, text in self._remarks())])

    def _remarks(self) -> Iterator[tuple[int, str]]:
        """Yield a level of logging and a line for each kind of layers that need one."""
        own = "a forward of their own, so from their buffers, batch after batch"
        for level, title, names in (
            (logging.WARNING, "not known to be BatchNorm, left alone", self.left),
            (logging.INFO, own, self.from_buffers),
            (logging.INFO, "frozen, left alone", self.frozen),
            (logging.WARNING, "no value seen or left in the buffers, kept", self.unreached),
        ):
            if names:
                yield level, f"{title}: {', '.join(names)}"

    def log(self) -> None:
        """Log the summary and what is to be remarked."""
        for level, text in ((logging.INFO, self.summary()), *self._remarks()):
            logger.log(level, "%s", text)


def shorten(parts: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    """Return the first parts in one line, and how many more there are."""
    more = f" and {len(parts) - most} more" if len(parts) > most else ""
    return separator.join(parts[:most]) + more
