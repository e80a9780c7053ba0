"""An estimate as plain numbers and strings, for JSON and for the attributes of a file."""

from __future__ import annotations

import math
from typing import Any

from probest.evidence import Evidence
from probest.report.protocols import EstimateLike

__all__ = ["estimate_record"]


def estimate_record(estimate: EstimateLike) -> dict[str, Any]:
    """The conclusion, the advice and the ledger. JSON has no infinities: they are the strings ``inf`` and ``-inf``."""
    return {
        "log_prob": _number(estimate.log_prob),
        "std_error": _number(estimate.std_error),
        "lower": _number(estimate.lower),
        "upper": _number(estimate.upper),
        "converged": bool(estimate.converged),
        "calls": int(estimate.calls),
        "seconds": float(estimate.seconds),
        "advice": list(estimate.advice),
        "ledger": [_evidence_record(evidence) for evidence in estimate.ledger],
    }


def _evidence_record(evidence: Evidence) -> dict[str, Any]:
    return {
        "method": evidence.method,
        "claim": evidence.claim,
        "log_prob": _number(evidence.log_prob),
        "std_error": _number(evidence.std_error),
        "interval": [_number(end) for end in evidence.interval],
        "calls": int(evidence.calls),
        "seconds": float(evidence.seconds),
        "converged": bool(evidence.converged),
        "diagnostics": {name: _number(value) for name, value in evidence.diagnostics.items()},
        "notes": list(evidence.notes),
    }


def _number(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))
