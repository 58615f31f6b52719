"""`python train.py analyze task=NAME ckpt_path=...`: a folder of figures and animations, and one HTML report of them.

    runs/<task>/<name>/   report.html   media/*.{png,gif}   samples.csv   analysis.json

The report holds every image and needs nothing else, no network either.
"""

import csv
import json
import time
from base64 import b64encode
from html import escape
from io import StringIO
from pathlib import Path

import numpy as np
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from ctm.checkpoint import read
from tasks.run import drawing, progress, sample_rows, say, write_aside
from tasks.seen import Seen, learned_decays, of_split, spread, survey, telling, watch


class AnalyzingTrainer(Trainer):
    """Lightning's trainer, which can also show what a model does."""

    def analyze(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        n: int = 256,
        shown: int = 4,
    ) -> None:
        """Draws what a model does on the test set.

        Args:
            model: what is looked at.
            datamodule: its task.
            ckpt_path: checkpoint whose weights are taken.
            n: test samples for statistics, in equal steps over the test set.
            shown: how many of them are shown being thought about: solved ones and failures by turns.
        """
        if ckpt_path:
            model.load_state_dict(read(ckpt_path)["state_dict"])
        model.to(self.strategy.root_device)
        analyze(model, Path(self.default_root_dir), n, shown, str(ckpt_path))


def analyze(module, folder: Path, n: int = 256, shown: int = 4, checkpoint: str = "") -> Path:
    """Writes figures, animations, tables and the report of a `ctm.lit.LitCTM` into a folder.

    Raises:
        UserError: where there is nothing to draw with.
    """
    began, task = time.perf_counter(), module.task
    with drawing():
        from tasks import figures
    media = folder / "media"
    media.mkdir(parents=True, exist_ok=True)
    samples = of_split(task, "test", spread(task, "test", n))
    surveyed = survey(module, samples, lambda steps: progress(steps, "thinking"))
    chosen = [samples[i] for i in telling(surveyed, task.headline, shown)]
    seen = Seen(watch(module, chosen), learned_decays(module.model), surveyed)
    written = [figures.write(picture, media) for picture in progress(task.figures(seen), "drawing")]
    rows = sample_rows(task, seen.samples)
    means = {name: float(np.mean(value)) for name, value in surveyed.values.items()}
    content = {"checkpoint": checkpoint, "n": surveyed.n, **means}
    write_aside(folder / "analysis.json", lambda aside: aside.write_text(json.dumps(content, indent=2)))
    text = StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_aside(folder / "samples.csv", lambda aside: aside.write_text(text.getvalue(), newline=""))
    parameters = sum(p.numel() for p in module.model.parameters())
    result = f"{task.headline}: {means[task.headline]:.1%} of {surveyed.n} test samples"
    about = f"{result}. {type(module.model.net).__name__} of {parameters:,} parameters, {task.describe()}. {checkpoint}"
    path = folder / "report.html"
    page = report(type(task).__name__.removesuffix("Task"), about, means, surveyed.n, rows, written)
    write_aside(path, lambda aside: aside.write_text(page, encoding="utf-8"))
    say(result)
    say(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB, {len(written)} pictures, "
        f"{time.perf_counter() - began:.0f} s)")  # fmt: skip
    return path


# ----------------------------------------------------------------------------------------------------------------------
# The report

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 870px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem }
p { margin: .3rem 0 .6rem } .about, figcaption { color: #555; font-size: .92rem } figure { margin: 0 }
img { width: 100%; max-width: 830px; display: block } img[hidden] { display: none }
table { border-collapse: collapse; font-size: .88rem }
td, th { text-align: left; padding: .15rem .9rem .15rem 0; vertical-align: top; overflow-wrap: anywhere }
th { border-bottom: 1px solid #bbb } .play { display: flex; gap: .6rem; align-items: center; max-width: 830px }
.play input { flex: 1 } .play button { width: 5rem }
"""
SCRIPT = """
for (const figure of document.querySelectorAll("figure[data-ticks]")) {
  const images = figure.querySelectorAll("img"), slider = figure.querySelector("input");
  const button = figure.querySelector("button"), label = figure.querySelector("output");
  let timer = null;
  const show = () => {
    images.forEach((image, i) => { image.hidden = i != slider.value; });
    label.textContent = `tick ${+slider.value + 1} of ${images.length}`;
  };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "play"; };
  slider.addEventListener("input", () => { stop(); show(); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    button.textContent = "pause";
    if (+slider.value == images.length - 1) slider.value = 0;
    show();
    timer = setInterval(() => {
      if (+slider.value == images.length - 1) return stop();
      slider.value = +slider.value + 1;
      show();
    }, Math.min(500, Math.max(60, 8000 / images.length)));
  });
  show();
}
"""


def report(title: str, about: str, means: dict[str, float], n: int, rows: list[dict], written: list) -> str:
    """The page: numbers, samples in a table, every picture; one that moves has a slider over ticks."""
    numbers = [{"metric": name, f"mean of {n} test samples": f"{value:.4f}"} for name, value in means.items()]
    parts = [
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f"<title>{escape(title)}: what it thinks</title><style>{CSS}</style></head><body>",
        f"<h1>{escape(title)}</h1><p class=about>{escape(about)}</p>",
        *(figure(one) for one in written),
        f"<h2>Samples shown</h2>{table(rows)}<h2>Numbers</h2>{table(numbers)}",
        f"<script>{SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts)


def figure(written) -> str:
    from tasks.figures import png

    picture, images = written.picture, written.images
    tags = "".join(
        f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{b64encode(png(image)).decode()}"'
        f"{' hidden' if i < len(images) - 1 else ''}>"
        for i, image in enumerate(images)
    )
    moves = ""
    if len(images) > 1:
        moves = (
            f"<div class=play><button>play</button><input type=range min=0 max={len(images) - 1}"
            f" value={len(images) - 1} aria-label=tick><output></output></div>"
        )
    ticks = f" data-ticks={len(images)}" if moves else ""
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
    return f"<h2>{escape(picture.title)}</h2><figure{ticks}>{tags}{moves}{caption}</figure>"


def table(rows: list[dict]) -> str:
    def cells(values, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(value))}</{tag}>" for value in values) + "</tr>"

    return f"<table>{cells(rows[0], 'th')}{''.join(cells(row.values(), 'td') for row in rows)}</table>"
