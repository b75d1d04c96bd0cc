"""Paths of the deployment files."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


KUBERAY = ROOT / "infra" / "kuberay"


OVERLAYS = ("cluster", "train", "score", "serve")
