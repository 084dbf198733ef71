"""How the demo prints."""

from __future__ import annotations


def title(text: str) -> None:
    print(f"\n\033[1m── {text}\033[0m", flush=True)


def note(text: str) -> None:
    print(f"   {text}", flush=True)
