"""An estimate as plain numbers and strings, for JSON and for the attributes of a file; and back."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from probest.evidence import Code, Evidence, Level, Note
from probest.result import Result

__all__ = ["estimate_record", "evidence_of", "versions"]

_PACKAGES = {"pyro": "pyro-ppl", "numpyro": "numpyro", "torch": "torch", "jax": "jax"}


@cache
def versions(*libraries: str) -> dict[str, str]:
    """Versions of Python, of probest, NumPy and SciPy, and of these libraries, by name."""
    from importlib.metadata import PackageNotFoundError, version  # not for every import of probest to wait for

    found = {"python": platform.python_version()}
    for name in ("probest", "numpy", "scipy", *(_PACKAGES.get(library, library) for library in libraries)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout on the path
            found[name] = "unknown"
    return found


def estimate_record(estimate: Result) -> dict[str, Any]:
    """The conclusion, the advice, the settings and the ledger. JSON has no infinities: they are strings, ``-inf``."""
    return {
        "log_prob": _number(estimate.log_prob),
        "std_error": _number(estimate.std_error),
        "lower": _number(estimate.lower),
        "upper": _number(estimate.upper),
        "converged": bool(estimate.converged),
        "calls": int(estimate.calls),
        "seconds": float(estimate.seconds),
        "advice": list(estimate.advice),
        "settings": dict(estimate.settings),
        "ledger": [_evidence_record(evidence) for evidence in estimate.ledger],
    }


def _evidence_record(evidence: Evidence) -> dict[str, Any]:
    return {
        "method": evidence.method,
        "stratum": evidence.stratum,
        "claim": evidence.claim,
        "log_prob": _number(evidence.log_prob),
        "std_error": _number(evidence.std_error),
        "interval": [_number(end) for end in evidence.interval],
        "log_evidence": _number(evidence.log_evidence),
        "floor": _number(evidence.floor),
        "batches": [_number(value) for value in evidence.batches],
        "calls": int(evidence.calls),
        "seconds": float(evidence.seconds),
        "converged": bool(evidence.converged),
        "diagnostics": {name: _number(value) for name, value in evidence.diagnostics.items()},
        "notes": list(evidence.notes),
        "codes": [note.code.name if isinstance(note, Note) else None for note in evidence.notes],
        "levels": [
            {**level._asdict(), "severity": [_number(x) for x in level.severity], "log_prob": _number(level.log_prob)}
            for level in evidence.levels
        ],
    }


def evidence_of(record: Mapping[str, Any]) -> Evidence:
    """A line of the ledger from its record; without its particles."""
    lower, upper = map(float, record["interval"])
    notes = zip(record["notes"], record["codes"], strict=True)
    return Evidence(
        method=record["method"],
        log_prob=float(record["log_prob"]),
        std_error=float(record["std_error"]),
        interval=(lower, upper),
        claim=record["claim"],
        calls=record["calls"],
        seconds=record["seconds"],
        converged=record["converged"],
        log_evidence=float(record["log_evidence"]),
        diagnostics={name: float(value) for name, value in record["diagnostics"].items()},
        notes=tuple(note if code is None else Note(Code[code], note) for note, code in notes),
        stratum=record["stratum"],
        floor=float(record.get("floor", -math.inf)),
        batches=_floats(record.get("batches", ())),
        levels=tuple(
            Level(**{**level, "severity": _floats(level["severity"]), "log_prob": float(level["log_prob"])})
            for level in record["levels"]
        ),
    )


def _floats(values: Sequence[float | str]) -> tuple[float, ...]:
    return tuple(map(float, values))


def _number(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))
