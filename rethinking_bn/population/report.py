"""What population training did: samples seen per layer and domain, and how far statistics moved."""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
            ``from_buffers``). With 0 the statistics were kept, so the next three are 0, 0 and 1.
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
        frozen: names of BN-like layers that were in eval mode, frozen, or of constant statistics,
            hence left alone.
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
        done = sum(1 for layer in self.layers if layer.samples)
        return (
            f"population statistics: {done} sets from {self.num_batches} "
            f"{'labelled' if self.labelled else 'unlabelled'} batches on each of "
            f"{self.world_size} rank(s) in {self.seconds:.1f} s; old means were off by "
            f"{self.drift_mean:.3g} standard deviations on average, {self.drift:.3g} at most"
        )

    def __str__(self) -> str:
        """Return the summary and a table, one row per layer and domain."""
        head = ("layer", "domain", "samples", "drift mean", "drift max", "old/new var")
        rows = [
            (
                *(layer.name, layer.domain or "-", str(layer.samples)),
                *(f"{v:.3g}" for v in (layer.drift_mean, layer.drift_max, layer.variance_ratio)),
            )
            for layer in self.layers
        ]
        lines = [self.summary()]
        if rows:
            widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
            for name, *numbers in (head, *rows):
                cells = [number.rjust(w) for number, w in zip(numbers, widths[1:], strict=True)]
                lines.append("  ".join([name.ljust(widths[0]), *cells]))
        lines += [f"{title}: {', '.join(names)}" for _, title, names in self._remarks() if names]
        return "\n".join(lines)

    def _remarks(self) -> tuple[tuple[int, str, tuple[str, ...]], ...]:
        own = "a forward of their own, so from their buffers, batch after batch"
        return (
            (logging.WARNING, "not known to be BatchNorm, left alone", self.left),
            (logging.INFO, own, self.from_buffers),
            (logging.INFO, "frozen, left alone", self.frozen),
            (logging.WARNING, "no value seen or left in the buffers, kept", self.unreached),
        )

    def log(self) -> None:
        """Log the summary, and a line for each kind of layers that need one."""
        logger.info(self.summary())
        for level, title, names in self._remarks():
            if names:
                logger.log(level, "%s: %s", title, ", ".join(names))


def shorten(parts: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    """Return the first parts in one line, and how many more there are."""
    more = f" and {len(parts) - most} more" if len(parts) > most else ""
    return separator.join(parts[:most]) + more
