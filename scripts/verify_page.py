"""Open run pages in a browser: no error in its console, every chart drawn, nothing cut off.

    python scripts/verify_page.py [--output FOLDER]

Makes runs (dpo and reward on the starter, made-up runs of ppo and of 20,000 updates, one with
hostile data, and a comparison), opens each page from file:// in headless Chromium, 1200 and 390
pixels wide, light and dark, points at a chart, smooths and zooms it, and leaves pages and pictures
in FOLDER. Takes about three minutes.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
from browser import BROWSERS, find_browser

from mlx_align.report.page import render_comparison, render_run
from mlx_align.tracking.run_dir import read_run_record

WIDTHS = {1200: 2800, 390: 4200}
SCHEMES = {"dark": 0, "light": 1}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
SMALL = "--batch-size 8 --grad-accumulation-steps 1 --steps-per-report 1 --max-seq-length 128"
SMALL += " --val-batches -1 --no-grad-checkpoint --steps-per-eval 10 --learning-rate 2.5e-4"
# Run in a copy of the page whose policy allows it, before the page's own scripts: keeps what is
# written on canvases.
RECORD = """<script>
const written = [];
const fillText = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y, ...rest) {
  const {a, b, e, f} = this.getTransform();
  const width = this.measureText(text).width;
  const shift = {center: 0.5, right: 1, end: 1}[this.textAlign] || 0;
  const turned = Math.abs(b) > 0.5;
  const left = e + (turned ? 0 : a * (x - shift * width));
  written.push({text, left, right: left + (turned ? 0 : width), canvas: this.canvas});
  return fillText.call(this, text, x, y, ...rest);
};
</script>"""
# Run after them: what a reader would see go wrong, and whether pointer, zoom and slider work.
PROBE = """<script>
const plots = [...document.querySelectorAll('.plot')];
const paints = (canvas) => {
  const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  let painted = 0;
  for (let i = 3; i < data.length; i += 4) painted += data[i] > 0;
  return painted;
};
const canvases = plots.map((plot) => plot.querySelector('canvas'));
const painted = canvases.filter((canvas) => canvas && paints(canvas) > 500);
const wide = [...document.querySelectorAll('main > *, section > *, figure, .card, .plot')].filter(
  e => e.getBoundingClientRect().right > innerWidth + 1);
const cut = written.filter((w) => w.left < -1 || w.right > w.canvas.width + 1);
const negative = written.filter((w) => /^[-\u2212].*%$/.test(w.text));
const figure = plots.map((p) => p.closest('figure')).find((f) => f.querySelector('.legend b'));
const over = figure.querySelector('.u-over');
const box = over.getBoundingClientRect();
const at = (share) => ({bubbles: true, button: 0, movementX: 9,
  clientX: box.left + share * box.width, clientY: box.top + box.height / 2});
const move = (type, share) => over.dispatchEvent(new MouseEvent(type, at(share)));
const values = () => [...figure.querySelectorAll('.legend b')].map((b) => b.textContent).join();
const last = values();
const ticks = () => written.splice(0).map((w) => w.text).join();
(async () => {
  const frame = () => new Promise((done) => setTimeout(done, 60));
  move('mouseenter', 0.3); move('mousemove', 0.3); await frame();
  const reads = figure.querySelector('.place').textContent !== '' && values() !== last;
  const slider = document.getElementById('smoothing');
  const before = paints(figure.querySelector('canvas'));
  slider.value = 0; slider.dispatchEvent(new Event('input')); await frame();
  const smooths = paints(figure.querySelector('canvas')) !== before;
  ticks();
  move('mousedown', 0.3); move('mousemove', 0.5); move('mousemove', 0.6);
  document.dispatchEvent(new MouseEvent('mouseup', at(0.6)));
  await frame();
  const zooms = ticks() !== '';
  document.body.setAttribute('data-probe', JSON.stringify({charts: plots.length,
    painted: painted.length, wide: wide.length, cut: cut.map((w) => w.text).slice(0, 5),
    negative: negative.length, reads, smooths, zooms,
    overflow: document.documentElement.scrollWidth - innerWidth}));
})();
</script>"""


def train(command: str, folder: Path, iters: int) -> Path:
    """Train on the starter with the command line."""
    options = f"--model starter --data starter --iters {iters} {SMALL} --output {folder}".split()
    subprocess.run([sys.executable, "-m", "mlx_align.cli.main", command, *options], check=True)
    return folder


def make_up(folder: Path, rows: list[dict], config: dict, **files: object) -> Path:
    """Write a run folder without training."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(json.dumps(config))
    for name, content in files.items():
        lines = content if isinstance(content, list) else [content]
        ending = "jsonl" if isinstance(content, list) else "json"
        (folder / f"{name}.{ending}").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def policy_rows(updates: int = 200) -> list[dict]:
    """Metrics of a PPO run that over-optimises its reward."""
    draw = random.Random(0)
    rows = []
    for step in range(1, updates + 1):
        t = step / updates
        row = {
            "loss": 0.3 * math.exp(-t),
            "reward": 0.2 + 1.6 * math.sqrt(t),
            "reward_std": 0.8 - 0.4 * t,
            "rewards/helpful/mean": 0.1 + 1.1 * t,
            "rewards/format/mean": min(1, 0.3 + t),
            "objective/kl": 24 * t**1.5,
            "objective/entropy": 1.9 - t,
            "policy/approx_kl": 0.01,
            "policy/clip_ratio": 0.12,
            "policy/ratio": 1.0,
            "value/loss": 0.4 * math.exp(-2 * t),
            "value/explained_variance": 0.7 * (1 - math.exp(-6 * t)),
            "completions/mean_length": 80 + 30 * t,
            "completions/min_length": 12,
            "completions/max_length": 128,
            "completions/ended": 0.97 - 0.2 * t,
            "frac_reward_zero_std": 0.1 + 0.1 * t,
            "kl_coef": 0.05,
            "learning_rate": 1e-5 * (1 - t),
            "grad_norm": 0.5,
            "tokens_per_second": 410,
            "peak_memory_bytes": 9.9e9,
        }
        noisy = {key: value * (1 + draw.gauss(0, 0.03)) for key, value in row.items()}
        rows.append({"step": step, **noisy})
        if step % 20 == 0:
            reward = 0.2 + 1.3 * math.sqrt(t) - 1.4 * t**3
            rows.append({"step": step, "eval/reward": reward, "eval/reward_std": 0.7})
    return rows


def long_rows(updates: int = 20_000) -> list[dict]:
    """Metrics of a DPO run that is long and noisy, overfits, and has one extreme gradient."""
    draw = random.Random(0)
    rows = []
    for step in range(1, updates + 1):
        t = step / updates
        rows.append(
            {
                "step": step,
                "loss": 0.7 * (1 - 0.5 * t) + draw.gauss(0, 0.05),
                "rewards/accuracies": min(1, max(0, 0.6 + 0.3 * t + draw.gauss(0, 0.1))),
                "rewards/margins": t + draw.gauss(0, 0.2),
                "logps/chosen": -30 - 6 * t + draw.gauss(0, 2),
                "logps/rejected": -30 - 14 * t + draw.gauss(0, 2),
                "learning_rate": 1e-5 * (1 - t),
                "grad_norm": 9.0 if step == 7777 else 1 + draw.gauss(0, 0.05),
            }
        )
        if step % 500 == 0:
            rows.append(
                {
                    "step": step,
                    "eval/loss": 0.7 * (1 - 0.3 * t) + 0.3 * max(0, t - 0.7),
                    "eval/rewards/accuracies": 0.55 + 0.05 * t,
                    "eval/rewards/margins": t,
                    "eval/logps/chosen": -30 - 6 * t,
                    "eval/logps/rejected": -30 - 13 * t,
                }
            )
    return rows


def make_runs(folder: Path) -> dict[str, Path]:
    """All the runs whose pages are opened, by name."""
    status = {"command": "ppo", "state": "running", "step": 200, "total": 400, "seconds": 6300}
    status["eval_examples"] = 48
    long = {"command": "dpo", "state": "running", "step": 20_000, "total": 30_000, "seconds": 9e4}
    long["data_facts"] = {"valid_groups": 25}
    samples = [
        {"source": HOSTILE, "prompt": HOSTILE, "before": "x" * 10_000, "after": "</div></main>"},
        {
            "source": "2",
            "prompt": "ما هي عاصمة فرنسا؟",
            "before": "ליון, I think.",
            "after": "\u202e!",
        },
        {"source": "3", "prompt": "\x00 \x1b[31m \ud800", "before": "word " * 800, "after": ""},
    ]
    rows = [{"step": i, "loss": 1 / i, f"rewards/{HOSTILE}/mean": i} for i in range(1, 60)]
    summary = {"command": "dpo", "steps": 60, "talk": HOSTILE, "versions": {HOSTILE: HOSTILE * 40}}
    return {
        "dpo": train("dpo", folder / "dpo", 40),
        "reward": train("reward", folder / "reward", 20),
        "ppo": make_up(
            folder / "ppo", policy_rows(), {"model": "m/7B", "data": "d"}, status=status
        ),
        "long": make_up(
            folder / "long", long_rows(), {"model": "m/7B", "val_batches": -1}, status=long
        ),
        "hostile": make_up(
            folder / "hostile", rows, {"model": HOSTILE}, summary=summary, samples=samples
        ),
    }


def browse(browser: str, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page; returns what the browser prints."""
    command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu"]
    command += ["--enable-logging=stderr", *options, page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def check(browser: str, name: str, text: str, folder: Path) -> list[str]:
    """Open a page at each width and in each scheme; returns what is wrong with it."""
    page, probed = folder / f"{name}.html", folder / f".{name}.probed.html"
    page.write_text(text, encoding="utf-8")
    unlocked = re.sub(r'<meta http-equiv="(Content-Security-Policy|refresh)"[^>]*>', "", text)
    unlocked = unlocked.replace("<body>", "<body>" + RECORD, 1)
    probed.write_text(unlocked.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    wrong = []
    for width, height in WIDTHS.items():
        for scheme, number in SCHEMES.items():
            how = [
                f"--window-size={width},{height}",
                f"--blink-settings=preferredColorScheme={number}",
            ]
            picture = folder / f"{name}-{scheme}-{width}.png"
            picture.unlink(missing_ok=True)
            printed = browse(browser, page, *how, f"--screenshot={picture}").stderr
            where = f"{name} at {width} px, {scheme}"
            wrong += [f"{where}: {line}" for line in printed.splitlines() if "CONSOLE" in line]
            if not picture.exists():
                wrong.append(f"{where}: no picture")
        probe = re.search(
            r'data-probe="([^"]*)"',
            browse(browser, probed, how[0], "--virtual-time-budget=5000", "--dump-dom").stdout,
        )
        found = json.loads(probe[1].replace("&quot;", '"')) if probe else {}
        print(f"{name} at {width} px: {found}")
        wanted = text.count("<figure")
        if found.get("painted") != wanted or found.get("charts") != wanted or not wanted:
            wrong.append(f"{name} at {width} px: {wanted} charts expected, found {found}")
        if any(found.get(key, 1) not in (0, []) for key in ("wide", "overflow", "cut", "negative")):
            wrong.append(f"{name} at {width} px: something is too wide or negative, {found}")
        for key in ("reads", "smooths", "zooms"):
            # Few points need no smoothing.
            if not found.get(key) and not (key == "smooths" and name == "reward"):
                wrong.append(f"{name} at {width} px: {key} is false")
    probed.unlink()
    return wrong


@click.command(help=__doc__)
@click.option("--output", default="page-check", show_default=True, metavar="FOLDER")
def main(output: str) -> None:
    browser = find_browser()
    if browser is None:
        raise click.ClickException(f"no browser: none of {', '.join(BROWSERS)} is installed")
    folder = Path(output)
    shutil.rmtree(folder, ignore_errors=True)
    runs = {name: read_run_record(run) for name, run in make_runs(folder / "runs").items()}
    pages = {name: render_run(run) for name, run in runs.items()}
    pages["comparison"] = render_comparison(list(runs.values()), list(runs))
    wrong = [line for name, text in pages.items() for line in check(browser, name, text, folder)]
    print("\n".join(wrong) or f"{len(pages)} pages, nothing wrong; pictures in {folder}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
