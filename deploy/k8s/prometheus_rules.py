"""Writes deploy/prometheus/alerts.yml as the Prometheus operator wants it: `python deploy/k8s/prometheus_rules.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent
ALERTS = FOLDER.parent / "prometheus" / "alerts.yml"
RULES = FOLDER / "components" / "monitoring" / "rules.yaml"
_HEAD = "# Made of deploy/prometheus/alerts.yml by `python deploy/k8s/prometheus_rules.py`; a change belongs there.\n"


def rules() -> dict[str, Any]:
    """The resource."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "fastlightgen"},
        "spec": yaml.safe_load(ALERTS.read_text()),
    }


if __name__ == "__main__":
    RULES.write_text(_HEAD + yaml.safe_dump(rules(), sort_keys=False, allow_unicode=True, width=120))
