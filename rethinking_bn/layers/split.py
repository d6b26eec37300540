"""BatchNorm of rows that come from several sources of data: clean and corrupted, real and drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn

from rethinking_bn.layers.multi_domain import Choice, MultiDomainBatchNorm2d
from rethinking_bn.randomness import Forwards, is_recomputing, mark_of


class SplitBatchNorm2d(MultiDomainBatchNorm2d):
    """Batch normalisation whose rows (images) belong to domains: "Split" or "Auxiliary" BN.

    Section 5 of arXiv 2105.07576 with domains in the data. The choices are those of
    :class:`~rethinking_bn.layers.MultiDomainBatchNorm2d`, here all domain-specific unless said:
    the layer then equals D separate nn.BatchNorm2d, each on the rows of its domain. With one domain
    it is BatchNorm2d bit for bit. :func:`row_domains` tells which row belongs where; domains may be
    mixed in any order, and missing. In a list of feature levels, a domain has its rows of all
    levels. A forward that activation checkpointing recomputes takes the domains of its first pass.

    Args:
        num_features: C.
        num_domains: D.
        train_stats, population_stats, affine: "shared" or "domain_specific".
        options: sync, eps, momentum, process_group, device, dtype: as in MultiDomainBatchNorm2d.

    Shape:
        (N, C, H, W), or a list of such tensors with the same N -> the same.

    Raises:
        ValueError: for another shape, without domains for the rows, or for another number of them.
    """

    _rows: tuple[int, ...] | int | None = None

    def __init__(
        self,
        num_features: int,
        num_domains: int,
        *,
        train_stats: Choice = "domain_specific",
        population_stats: Choice = "domain_specific",
        affine: Choice = "domain_specific",
        **options: Any,
    ) -> None:
        super().__init__(
            num_features,
            num_domains,
            train_stats=train_stats,
            population_stats=population_stats,
            affine=affine,
            **options,
        )
        self._forwards: Forwards[tuple[int, ...] | int] = Forwards(newest_first=True)

    def __prepare_scriptable__(self) -> Any:
        raise ValueError(
            "SplitBatchNorm2d is told the domains of its rows in Python, which TorchScript cannot "
            "express: trace or export the model within row_domains(model, domain)"
        )

    @overload  # type: ignore[override]
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Sequence[Tensor]) -> list[Tensor]: ...
    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        levels = [x] if isinstance(x, Tensor) else list(x)
        for level in levels:
            if level.dim() != 4 or level.shape[1] != self.num_features:
                raise ValueError(f"expected (N, {self.num_features}, H, W), got {level.shape}")
            if len(level) != len(levels[0]):
                raise ValueError(f"levels of {len(levels[0])} and {len(level)} rows")
        outputs = self._forward(levels, self._rows_of(levels[0]))
        return outputs[0] if isinstance(x, Tensor) else outputs

    def _forward(self, levels: list[Tensor], rows: tuple[int, ...] | int) -> list[Tensor]:
        run = self._run
        if "domain_specific" not in (self.train_stats, self.population_stats, self.affine):
            return run(levels)  # no row differs from another
        whole = levels[0]
        if len(levels) > 1:  # side by side: (N, C, positions of all levels, 1)
            whole = torch.cat([level.flatten(2) for level in levels], dim=2).unsqueeze(3)
        if isinstance(rows, int):
            parts = [whole if d == rows else whole[:0] for d in range(self.num_domains)]
            outputs = run(parts)
            # Every domain's affine is in the graph, as data-parallel wrappers want it to be.
            joined = len(outputs) > 1 and self.training and torch.is_grad_enabled()
            out = torch.cat(outputs) if joined else outputs[rows]
        else:
            order = sorted(range(len(rows)), key=rows.__getitem__)
            sizes = [rows.count(d) for d in range(self.num_domains)]
            moved = order != list(range(len(rows)))
            index = torch.tensor(order, device=whole.device) if moved else None
            out = whole if index is None else whole.index_select(0, index)
            out = torch.cat(run(list(out.split(sizes))))
            out = out if index is None else out.index_select(0, index.argsort())
        return [out] if len(levels) == 1 else _one_by_one(out, levels)

    def _rows_of(self, x: Tensor) -> tuple[int, ...] | int:
        """Return the domain of every row, or the one of all of them."""
        rows = self._rows
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            pass
        elif is_recomputing() and (first := self._forwards.find(mark_of(x))) is not None:
            rows = first
        elif rows is not None:
            self._forwards.remember(mark_of(x), rows)
        if rows is None:
            if self.num_domains > 1:
                raise ValueError(
                    "the domains of the rows are not known: run the model within "
                    "`with row_domains(model, [d_0, ..., d_{N-1}]):`"
                )
            rows = 0
        if isinstance(rows, tuple):
            if len(rows) != len(x):
                raise ValueError(f"{len(rows)} row domains for {len(x)} rows")
            if rows.count(rows[0] if rows else 0) == len(rows) > 0:
                rows = rows[0]
        return rows

    def __getstate__(self) -> dict[str, Any]:
        # the domains of a copy's rows are not known
        return {key: value for key, value in super().__getstate__().items() if key != "_rows"}


@contextmanager
def row_domains(model: nn.Module, domains: Sequence[int] | Tensor | int) -> Iterator[None]:
    """Say which domain each row of the model's inputs belongs to, for its SplitBatchNorm2d layers.

    Args:
        model: may be wrapped.
        domains: N numbers from 0 to D - 1, one per row (image) of a batch; or one number for all
            rows of any batch, such as the domain to infer by.

    Raises:
        ValueError: when the model has no such layer, or for a number that is no domain. The layers
            raise one when they see another number of rows than N.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, SplitBatchNorm2d)]
    if not layers:
        raise ValueError("the model has no SplitBatchNorm2d: its rows have no domains")
    given = domains.tolist() if isinstance(domains, Tensor) else domains
    rows = given if isinstance(given, int) else tuple(given)
    for row, domain in enumerate((rows,) if isinstance(rows, int) else rows):
        for layer in layers:
            if type(domain) is not int or not 0 <= domain < layer.num_domains:
                raise ValueError(
                    f"the domain of row {row} is {domain!r}, but the domains are "
                    f"0 to {layer.num_domains - 1}"
                )
    before = [layer._rows for layer in layers]
    for layer in layers:
        layer._rows = rows
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer._rows = old


def _one_by_one(x: Tensor, levels: list[Tensor]) -> list[Tensor]:
    sizes = [level.shape[2] * level.shape[3] for level in levels]
    parts = x.squeeze(3).split(sizes, dim=2)
    # copies: views of one tensor would refuse operators in place (nn.ReLU(inplace=True))
    return [
        part.reshape(level.shape).clone(memory_format=torch.contiguous_format)
        for part, level in zip(parts, levels, strict=True)
    ]
