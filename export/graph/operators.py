"""Operators of the ONNX standard, grouped by what they do; ``operators.toml`` has the groups and their meaning."""

from __future__ import annotations

import tomllib
from importlib import resources

_GROUPS = tomllib.loads(resources.files(__package__).joinpath("operators.toml").read_text(encoding="utf-8"))

STANDARD_DOMAINS = ("", "ai.onnx")
FORBIDDEN = frozenset(_GROUPS["forbidden"])
POINTWISE = frozenset(_GROUPS["pointwise"])
REDUCTIONS = frozenset(_GROUPS["reductions"])
FREEZABLE = frozenset(_GROUPS["freezable"])
NEEDS_FP32 = frozenset(_GROUPS["needs_fp32"])
QUANTIZED = tuple(_GROUPS["quantized"])
MOVING = frozenset(_GROUPS["moving"])
VIEWS = frozenset(_GROUPS["views"])
