"""Draws the two pictures of the documents; `python docs/drawings.py` writes them into `docs/images`."""

from __future__ import annotations

from pathlib import Path

IMAGES = Path(__file__).parent / "images"
INK, QUIET, SHARED, CORE, OWN = "#24292f", "#57606a", "#2f6fdb", "#e36209", "#8b949e"

ROOMS = (  # from top to bottom: a room imports only the rooms below it
    ("lotr_cli", "the command line", "typer, rich"),
    ("serving", "a bank over HTTP, and in vLLM", "fastapi, uvicorn"),
    ("compression", "many LoRAs become one bank", ""),
    ("training", "lotr train, evaluate and predict; many tasks at once", "transformers, datasets"),
    ("bank", "one basis, any number of tasks", "sqlite3"),
    ("adapters", "a saved adapter: inspect, export, merge, draw", "matplotlib"),
    ("tuner", "the method inside PEFT: LotrConfig, layers, groups", "peft"),
    ("files", "folders that are whole or not there", "safetensors"),
    ("sharing", "the plan: which sites share what, from names and shapes", ""),
    ("math", "the formula, the cores, the norms, the starts", "torch"),
    ("methods, errors", "a published method is a row of a table", ""),
)


def svg(width: int, height: int, label: str, shapes: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'role="img" aria-label="{label}" font-family="sans-serif">\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="2" fill="{fill}"/>'


def text(x: float, y: float, words: str, size: int = 15, fill: str = INK, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" {more}>{words}</text>'


def lora_and_lotr() -> str:
    """Four modules: LoRA has two wide factors for each, LoTR one pair for all and a core for each."""
    wide, thin, step, top, bold, middle = 76, 14, 96, 74, 'font-weight="bold"', 'text-anchor="middle"'
    shapes = [
        text(130, 28, "LoRA", 18, more=f"{middle} {bold}"),
        text(398, 28, "LoTR", 18, more=f"{middle} {bold}"),
    ]
    shapes += [text(130, 50, "B · A", 15, QUIET, middle), text(398, 50, "U · C · Vᵀ", 15, QUIET, middle)]
    half = top + 1.5 * step + wide / 2
    for layer in range(4):
        y = top + layer * step
        centre = y + wide / 2
        shapes += [
            text(16, centre + 5, f"layer {layer + 1}", 14, QUIET),
            box(92, y, thin, wide, OWN),
            box(118, centre - thin / 2, wide, thin, OWN),
            box(392, centre - thin / 2, thin, thin, CORE),
            f'<path d="M342 {half} L386 {centre} M412 {centre} L440 {half}" stroke="{OWN}" fill="none"/>',
        ]
    centre = half
    shapes += [
        box(322, centre - wide / 2, thin, wide, SHARED),
        box(446, centre - thin / 2, wide, thin, SHARED),
        text(329, centre - wide / 2 - 8, "U", 15, SHARED, f"{middle} {bold}"),
        text(484, centre - thin / 2 - 8, "Vᵀ", 15, SHARED, f"{middle} {bold}"),
        text(399, top + wide / 2 - 14, "C", 15, CORE, f"{middle} {bold}"),
        text(130, top + 4 * step + 12, "two wide factors", 15, INK, middle),
        text(130, top + 4 * step + 32, "for every module", 15, INK, middle),
        text(398, top + 4 * step + 12, "one pair for all layers,", 15, INK, middle),
        text(398, top + 4 * step + 32, "a small core for every module", 15, INK, middle),
    ]
    return svg(
        540,
        top + 4 * step + 48,
        "LoRA has two wide factors a module; LoTR shares one pair and has a core a module",
        shapes,
    )


def house() -> str:
    """The rooms, one above the other, with what each of them alone needs from outside."""
    height, gap, left, wide = 50, 14, 12, 516
    shapes = []
    for n, (name, purpose, outside) in enumerate(ROOMS):
        y = 12 + n * (height + gap)
        shapes += [
            f'<rect x="{left}" y="{y}" width="{wide}" height="{height}" rx="6" fill="#f6f8fa" stroke="{SHARED}"/>',
            text(left + 12, y + 21, name, 16, INK, 'font-weight="bold"'),
            text(left + 12, y + 40, purpose, 14, QUIET),
        ]
        if outside:
            shapes.append(text(left + wide - 12, y + 21, outside, 14, CORE, 'text-anchor="end"'))
        if n + 1 < len(ROOMS):
            x, end = left + wide / 2, y + height
            shapes.append(
                f'<path d="M{x} {end} v{gap - 5} m-4 -5 l4 5 l4 -5" stroke="{QUIET}" fill="none" stroke-width="1.5"/>'
            )
    return svg(
        540,
        12 + len(ROOMS) * (height + gap),
        "The rooms of the library; each imports only those below it",
        shapes,
    )


if __name__ == "__main__":
    for drawing in (lora_and_lotr, house):
        (IMAGES / f"{drawing.__name__}.svg").write_text(drawing(), encoding="utf-8")
