"""Loads from files: traces as CSV, the gateway's own request log, and workloads written down whole.

    NAME.csv     columns TIMESTAMP, ContextTokens, GeneratedTokens (the form of Azure's traces), and, if there are any, model
                 and priority
    NAME.jsonl   the gateway's request log (`request_log`)
    NAME.json    a `Workload`: {"name": …, "scripts": [{"rounds": [[{"offset", "model", "service", "priority"}]], "start",
                 "pause"}]}

Each may be compressed: `NAME.csv.gz`.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import random
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec

from .._request_log import RequestEntry
from .errors import SimulationError
from .workload import Arrival, Script, Workload

__all__ = ["TraceOptions", "read_workload"]


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """How a trace becomes a load."""

    prefill: float = 0.2
    """Seconds before the first token, of a request that a CSV file tells the tokens of."""
    tokens_per_second: float = 40.0
    """Tokens that such a request is given in a second."""
    speed: float = 1.0
    """Factor for the rate of arrivals. What a request takes stays as it is."""
    limit: int | None = None
    """Take only so many requests, from the beginning of the file; `None`: all."""
    seed: int = 0
    """For the draw of models where the trace names none."""

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.prefill, self.tokens_per_second, self.speed))):
            raise SimulationError("prefill, tokens per second and speed must be finite numbers")
        if self.prefill < 0 or self.tokens_per_second <= 0 or self.speed <= 0:
            raise SimulationError("prefill must not be less than 0; tokens per second and speed must be more")


def read_workload(
    path: Path,
    models: Sequence[str],
    *,
    aliases: Mapping[str, str] | None = None,
    priorities: Collection[str] = (),
    options: TraceOptions | None = None,
) -> Workload:
    """Read a load for `models` from a file.

    Requests that name no model are given one by a draw from Zipf's distribution: the weight of the k-th model is 1/k.
    `aliases` are further names of the models, `priorities` the priority classes that there are. Raises `SimulationError`, which
    names the file and the line.
    """
    options = options or TraceOptions()
    names = _Names({**(aliases or {}), **{model: model for model in models}}, frozenset(priorities))
    kind = path.suffixes[-2:-1] if path.suffix == ".gz" else path.suffixes[-1:]
    try:
        match kind:
            case [".csv"]:
                rows = _read_csv(_lines(path), models, names, options)
            case [".jsonl"]:
                rows = _read_log(_lines(path), names)
            case [".json"]:
                return _read_json(_bytes(path), names, options)
            case _:
                raise SimulationError(f"{path}: the file's ending is none of .csv, .jsonl, .json, or one of these with .gz")
        taken = list(islice(rows, options.limit))
    except (OSError, EOFError, zlib.error) as exc:
        raise SimulationError(f"{path}: {getattr(exc, 'strerror', None) or exc}") from None
    except UnicodeDecodeError as exc:
        raise SimulationError(f"{path}: it is not text in UTF-8: {exc.reason}") from None
    except _LineError as exc:
        raise SimulationError(f"{path}, line {exc.line}: {exc}") from None
    except msgspec.DecodeError as exc:
        raise SimulationError(f"{path}: {exc}") from None
    if not taken:
        raise SimulationError(f"{path}: there are no requests in it")
    first = min(row.time for row in taken)
    arrivals = [Arrival((row.time - first) / options.speed, row.model, row.service, row.priority) for row in taken]
    return Workload(path.name, [Script([sorted(arrivals, key=lambda arrival: arrival.offset)])])


class _LineError(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class _Row(NamedTuple):
    """A request. `time` is when it came, in seconds, as the file counts them."""

    time: float
    model: str
    service: float
    priority: str | None


@dataclass(frozen=True, slots=True)
class _Names:
    """What a file may name."""

    models: Mapping[str, str]
    """Aliases too."""
    priorities: frozenset[str]

    def model(self, name: str, line: int) -> str:
        try:
            return self.models[name]
        except KeyError:
            raise _LineError(line, f"the model {name!r} is not configured") from None

    def priority(self, name: str | None, line: int) -> str | None:
        """Nothing, or an empty cell: it has none of its own."""
        if name and name not in self.priorities:
            raise _LineError(line, f"the priority {name!r} is not configured")
        return name or None


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def _lines(path: Path) -> Iterator[str]:
    with (
        path.open("rb") as raw,
        io.TextIOWrapper(gzip.open(raw) if path.suffix == ".gz" else raw, "utf-8-sig", newline="") as text,
    ):
        yield from text


def _read_csv(lines: Iterator[str], models: Sequence[str], names: _Names, options: TraceOptions) -> Iterator[_Row]:
    reader = csv.reader(lines, strict=True)
    rng = random.Random(options.seed)
    weights = [1 / (place + 1) for place in range(len(models))]
    try:
        columns = {name.strip().lower(): index for index, name in enumerate(next(reader, []))}
        if missing := [name for name in ("TIMESTAMP", "GeneratedTokens") if name.lower() not in columns]:
            raise _LineError(1, f"there is no column {' and no column '.join(missing)}")
        when, tokens = columns["timestamp"], columns["generatedtokens"]
        model, priority = columns.get("model"), columns.get("priority")
        for row in reader:
            if not row:
                continue
            if len(row) != len(columns):
                raise _LineError(reader.line_num, f"{len(row)} values for {len(columns)} columns")
            # Drawn for each row, so that the others keep theirs when one is given a model.
            drawn = rng.choices(models, weights)[0]
            named = names.model(row[model], reader.line_num) if model is not None and row[model] else drawn
            generated = _checked(int, row[tokens], "a number of tokens", reader.line_num)
            yield _Row(
                _checked(_seconds, row[when], "a time such as 2023-11-16 18:15:46.68", reader.line_num),
                named,
                options.prefill + generated / options.tokens_per_second,
                names.priority(row[priority], reader.line_num) if priority is not None else None,
            )
    except csv.Error as exc:
        raise _LineError(reader.line_num, str(exc)) from None


def _read_log(lines: Iterable[str], names: _Names) -> Iterator[_Row]:
    """Requests that were never admitted are given the mean of their model's others, for that is what they would have taken.

    The time in which one was frozen is none of its service.
    """
    decoder = msgspec.json.Decoder(RequestEntry)
    entries: list[RequestEntry] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = decoder.decode(line)
        except msgspec.DecodeError as exc:
            raise _LineError(number, str(exc)) from None
        if entry.served is not None and min(entry.served, entry.frozen) < 0:
            raise _LineError(number, f"{'served' if entry.served < 0 else 'frozen'} is less than 0")
        served = None if entry.served is None else max(0.0, entry.served - entry.frozen)
        names.priority(entry.priority, number)
        entries.append(msgspec.structs.replace(entry, model=names.model(entry.model, number), served=served))
    means = {}
    for model in {entry.model for entry in entries}:
        known = [entry.served for entry in entries if entry.model == model and entry.served is not None]
        means[model] = sum(known) / len(known) if known else 0.0
    for entry in entries:
        service = means[entry.model] if entry.served is None else entry.served
        yield _Row(entry.time, entry.model, service, entry.priority)


def _read_json(data: bytes, names: _Names, options: TraceOptions) -> Workload:
    if options.speed != 1 or options.limit is not None:
        raise SimulationError("a workload file is played as it is: speed and limit are for traces")
    load = msgspec.json.decode(data, type=Workload)
    for script in load.scripts:
        for arrival in (arrival for part in script.rounds for arrival in part):
            if min(arrival.offset, arrival.service, script.start, script.pause) < 0:
                raise msgspec.ValidationError("start, pause, offset and service must not be less than 0")
            if arrival.model not in names.models:
                raise msgspec.ValidationError(f"the model {arrival.model!r} is not configured")
            if arrival.priority is not None and arrival.priority not in names.priorities:
                raise msgspec.ValidationError(f"the priority {arrival.priority!r} is not configured")

    def renamed(script: Script) -> Script:
        rounds = [[replace(arrival, model=names.models[arrival.model]) for arrival in part] for part in script.rounds]
        return Script(rounds, script.start, script.pause)

    return Workload(load.name, [renamed(script) for script in load.scripts])


def _checked(convert: Callable[[str], float], text: str, what: str, line: int) -> float:
    try:
        value = convert(text)
        if not math.isfinite(value) or value < 0:
            raise ValueError
    except (ValueError, OverflowError):
        raise _LineError(line, f"{text!r} is not {what}") from None
    return value


def _seconds(text: str) -> float:
    """A number of seconds, or a date and time, UTC if it does not say where; fractions of a second may have any length."""
    try:
        return float(text)
    except ValueError:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
