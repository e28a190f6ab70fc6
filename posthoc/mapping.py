"""Which columns of a table make which tensor of a model.

Apart from `posthoc.data`, which needs pyarrow: the serving process reads a bundle's mapping and
no tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from posthoc.contract import DataError, TensorSpec


class TableMapping(BaseModel):
    """Which columns make which tensor; saved in the bundle and used again wherever it reads rows.

    Each input is filled by its columns stacked in order, or by one list or tensor column alone.
    ``split_by`` names the column whose equal values share a split (copies and truncations of one
    item); without it equal rows do.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    inputs: dict[str, tuple[str, ...]]
    target: tuple[str, ...] = ()
    group: str | None = None
    split_by: str | None = None
    id: str | None = None

    def inputs_only(self) -> TableMapping:
        """The same inputs, for rows of which nothing else is known or wanted."""
        return TableMapping(inputs=self.inputs)

    def columns(self, *, target: bool = True) -> tuple[str, ...]:
        """Every column that rows are made of, once each."""
        meta = (self.group, self.split_by, self.id)
        every = (*(c for cs in self.inputs.values() for c in cs), *(self.target if target else ()))
        return tuple(dict.fromkeys((*every, *(c for c in meta if c is not None))))


def infer_mapping(
    columns: Sequence[str],
    specs: Sequence[TensorSpec],
    *,
    target: Sequence[str] | str | None,
    inputs: Mapping[str, Sequence[str]] | None = None,
    group: str | None = None,
    split_by: str | None = None,
    id: str | None = None,
) -> TableMapping:
    """The mapping from ``columns`` to the model inputs ``specs``.

    Each input takes, in this order of preference: what ``inputs`` says, the column of its own
    name, and (a model with one input) every column that is not target, group, split or id, in
    the table's order. Raises DataError for a column or input that does not exist, and for an
    input that nothing fills.
    """
    targets = (target,) if isinstance(target, str) else tuple(target or ())
    given = {name: tuple(cols) for name, cols in (inputs or {}).items()}
    names = [s.name for s in specs]
    for name in given:
        if name not in names:
            raise DataError(f"the model has no input {name!r}; it takes {', '.join(names)}")
    meta = {c for c in (*targets, group, split_by, id) if c is not None}
    for column in (*meta, *(c for cs in given.values() for c in cs)):
        if column not in columns:
            raise DataError(f"no column {column!r}; the table has {', '.join(columns)}")
    rest = tuple(c for c in columns if c not in meta)
    filled: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name in given:
            filled[name] = given[name]
        elif name in rest:
            filled[name] = (name,)
        elif len(names) == 1:
            filled[name] = rest
        if not filled.get(name):
            raise DataError(
                f"input {name!r} has no column; name them with --inputs {name}=a,b,c "
                f"(the table has {', '.join(columns)})"
            )
    return TableMapping(inputs=filled, target=targets, group=group, split_by=split_by, id=id)
