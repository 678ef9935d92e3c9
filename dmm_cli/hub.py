"""What timm's ``config.json`` beside a checkpoint's weights tells, in the words of our metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .archspec import format_arch

INPUT_KEYS = {"input_size": "size", "mean": "mean", "std": "std"}  # timm's words, and those of dmm.input


def in_metadata(config: Mapping[str, Any]) -> dict[str, str]:
    """``dmm.arch``, ``dmm.input`` and ``dmm.classes``, as far as the file tells them."""
    told = {}
    flat = _is_flat(config)
    cfg = config if flat else _section(config, "pretrained_cfg")
    if isinstance(config.get("architecture"), str):
        arguments = {**_classes(cfg), **_section(config, "model_args"), **_classes(config)}
        told["dmm.arch"] = format_arch(config["architecture"], arguments)
    given = {own: cfg[key] for key, own in INPUT_KEYS.items() if key in cfg}
    if given:
        told["dmm.input"] = json.dumps(given)
    names = config.get("label_names", cfg.get("label_names", config.get("labels") if flat else None))
    if isinstance(names, list) and len(set(map(str, names))) == len(names) > 0:
        told["dmm.classes"] = json.dumps(names)
    return told


def key_of(config: Mapping[str, Any], entry: str, part: str = "") -> str:
    """The key under which the file tells an entry of ``in_metadata``, sections in front: ``pretrained_cfg.mean``.

    Args:
        part: of ``dmm.input``: size, mean or std.
    """
    if entry == "dmm.arch":
        return "architecture and model_args" if _section(config, "model_args") else "architecture"
    section = "" if _is_flat(config) else "pretrained_cfg."
    if entry == "dmm.input":
        return section + next(key for key, own in INPUT_KEYS.items() if own == part)
    if "label_names" in config:
        return "label_names"
    return f"{section}label_names" if section else "labels"


def _is_flat(config: Mapping[str, Any]) -> bool:
    """Whether all stands beside the architecture, in no section, as older versions of timm wrote it."""
    return "architecture" in config and "pretrained_cfg" not in config


def _classes(part: Mapping[str, Any]) -> dict[str, Any]:
    count = part.get("num_classes")
    return {"num_classes": count} if type(count) is int else {}


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}
