"""The page in a browser, at the widths of a phone, a tablet and a screen: what it draws is what the log says."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from megatron_mtp.observe.run_log import open_log
from megatron_mtp.report.charts import charts
from megatron_mtp.report.page import open_runs, page
from tests.report.logs import LOGS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on PATH (Debian, Ubuntu: apt install chromium)"),
]
WIDTHS = (390, 800, 1400)
# A window of Chromium is at least 500 wide, so the page is shown in a frame, whose state the outer page repeats.
FRAME = """<body><iframe id="frame" style="width:%dpx;height:900px;border:0" src="%s"></iframe><script>
const frame = document.getElementById("frame");
frame.onload = () => setTimeout(() => {
  const page = frame.contentDocument;
  const figures = [...page.querySelectorAll("figure[id]")].map((one) => ({ id: one.id, ...one.dataset }));
  const slider = page.querySelector("figure input");
  if (slider) { slider.value = 4; slider.dispatchEvent(new Event("input")); }
  setTimeout(() => {
    const read = page.querySelector("figure output")?.textContent;
    document.body.textContent = JSON.stringify({ figures, page: { ...page.documentElement.dataset }, read });
  }, 100);
}, 300);
</script></body>"""


def shown(folder: Path, text: str, width: int, anchor: str = "") -> tuple[dict, str]:
    """What the page says of itself after it was drawn, and the browser's log."""
    (folder / "page.html").write_text(text, encoding="utf-8")
    (folder / f"frame{width}.html").write_text(FRAME % (width, f"page.html{anchor}"))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    flags += ["--virtual-time-budget=5000", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    address = (folder / f"frame{width}.html").as_uri()
    ran = subprocess.run([CHROMIUM, *flags, address], capture_output=True, text=True, timeout=90, check=True)
    return json.loads(html.unescape(re.search(r"<body>(.*)</body>", ran.stdout, re.S)[1])), ran.stderr


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", [*LOGS, "all"])
def test_a_page_is_drawn_without_an_error_and_fits_its_width(tmp_path: Path, name: str, width: int):
    runs = open_runs([LOGS[one](tmp_path / one).path for one in (LOGS if name == "all" else [name])])
    found = charts(runs)
    state, log = shown(tmp_path, page(runs, found, time.time()), width)
    assert "CONSOLE" not in log
    assert state["page"]["drawn"] == str(len(found)) == str(len(state["figures"]))
    assert int(state["page"]["width"]) == width
    assert int(state["page"]["overflow"]) <= 0
    for chart, figure in zip(found, state["figures"], strict=True):
        lines = [line.curve for line in chart.series]
        steps = {step for line in lines for step in line.iteration.tolist()}
        assert int(figure["points"]) == len(steps), figure
        values = [value for line in lines for value in line.value.tolist() if math.isfinite(value)]
        if values:
            assert float(figure["xMin"]) <= min(steps) + 1e-9
            assert float(figure["xMax"]) >= max(steps)
            assert float(figure["yMin"]) <= min(values) * (1 + 1e-5)
            assert float(figure["yMax"]) >= max(values) * (1 - 1e-5)
            # and not so much more that the lines are flat
            spread = max(values) - min(values)
            assert spread == 0 or float(figure["yMax"]) - float(figure["yMin"]) <= max(4 * spread, 0.1)
        assert int(figure["bad"]) == sum(line.num_bad for line in lines)


def test_the_slider_reads_the_values_of_the_log(tmp_path: Path):
    path = LOGS["without_validation"](tmp_path / "run").path
    runs = open_runs([path])
    state, _ = shown(tmp_path, page(runs, charts(runs), time.time()), 800)
    value = open_log(path).column("lm loss")[1][4]
    assert state["read"] == f"5 steps: lm {value:.5g}"


@pytest.mark.parametrize("axis", ["tokens", "hours", "flop"])
def test_curves_stand_over_each_axis(tmp_path: Path, axis: str):
    runs = open_runs([LOGS["killed_and_resumed"](tmp_path / "run").path])
    state, log = shown(tmp_path, page(runs, charts(runs), time.time()), 800, f"#axis={axis}")
    assert "CONSOLE" not in log
    places = runs[0].axes.places[axis]
    for figure in state["figures"]:
        assert figure["axis"] == axis
        assert float(figure["xMax"]) == pytest.approx(places[-1], rel=1e-5)
