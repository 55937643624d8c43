"use strict";
// Draws the charts of the page from the JSON in it. Without this script the tables still say everything.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  // Colours that are told apart with any colour vision (Okabe and Ito), one set for each background.
  const COLORS = {
    light: ["#0072b2", "#d55e00", "#007d5c", "#b0568c", "#7a5c00", "#2f8fc4", "#8a8a00", "#444444"],
    dark: ["#56b4e9", "#ff9e4a", "#2fd0a0", "#e79ac6", "#e6c04d", "#8ec9f0", "#f0e442", "#cccccc"],
  };
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 5], [1, 4], [12, 4], [6, 2, 2, 2]];
  const MARK_COLORS = { fault: "#d1242f", sign: "#d1242f", recovery: "#1a7f37", rollback: "#bf8700",
    restart: "#8250df", phase: "#6e7781" };
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  let axis = data.axes.length ? data.axes[0].key : "iteration";
  let chosen = "auto";
  let printing = false;
  const charts = [];

  const theme = () => (printing ? "light" : chosen !== "auto" ? chosen : systemDark.matches ? "dark" : "light");
  const color = (index) => COLORS[theme()][index % COLORS.light.length];
  const shown = (value) =>
    value === null || value === undefined ? "–" : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3)
      ? value.toExponential(3) : String(+value.toPrecision(5));
  const short = (value) => {
    for (const [size, letter] of [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= size) return +(value / size).toPrecision(4) + letter;
    return String(+value.toPrecision(4));
  };

  // The x values of a line on the chosen axis; a run whose log lacks the axis is left out.
  const placesOf = (index) => data.places[index][axis];

  // One table for all lines: joined by x. A NaN stays null and breaks the line; where a line has no point it goes on.
  function table(chart) {
    const parts = [];
    const layout = [];
    chart.series.forEach((line, number) => {
      const x = placesOf(line.x);
      if (!x || !x.length) return;
      const columns = line.low && !line.points ? [line.y, line.low, line.high] : [line.y];
      parts.push([x, ...columns]);
      columns.forEach((_, part) => layout.push({ number, part }));
    });
    return { rows: parts.length > 1 ? uPlot.join(parts) : parts[0] || [[]], layout };
  }

  function options(chart, layout, width) {
    const fg = theme() === "dark" ? "#c9d1d9" : "#24292f";
    const grid = { stroke: theme() === "dark" ? "#30363d" : "#e4e8ec", width: 1 };
    const series = [{}];
    const bands = [];
    layout.forEach(({ number, part }, index) => {
      const line = chart.series[number];
      const stroke = color(line.color);
      if (part) {
        series.push({ show: !line.hidden, stroke: "transparent", width: 0, points: { show: false } });
        if (part === 2) bands.push({ series: [index + 1, index], fill: stroke + "38" });
      } else if (line.points) {
        series.push({ show: !line.hidden, stroke, width: 0, paths: () => null,
                      points: { show: true, size: 8, width: 2, fill: theme() === "dark" ? "#0d1117" : "#fff" } });
      } else {
        series.push({ show: !line.hidden, stroke, width: 1.75, dash: DASHES[line.dash % DASHES.length],
                      points: { show: line.y.length === 1 } });
      }
    });
    return {
      width, height: 260, series, bands, legend: { show: false },
      scales: { x: { time: false } },
      cursor: { drag: { x: true, y: false }, points: { size: 7 } },
      axes: [
        { stroke: fg, grid, ticks: grid, values: (_, ticks) => ticks.map(short), space: 60, labelSize: 20,
          label: data.axes.find((one) => one.key === axis).label.split(",")[0] },
        { stroke: fg, grid, ticks: grid, values: (_, ticks) => ticks.map(short), size: 62 },
      ],
      hooks: { draw: [(plot) => marks(plot, chart)], setCursor: [(plot) => read(plot, chart)] },
    };
  }

  // Vertical lines for what happened, and crosses at the top for values that are not finite.
  function marks(plot, chart) {
    const { ctx } = plot;
    const { left, top, width, height } = plot.bbox;
    ctx.save();
    ctx.beginPath();
    ctx.rect(left, top, width, height);
    ctx.clip();
    const runs = new Set(chart.series.filter((line) => !line.hidden).map((line) => line.run));
    let drawn = 0;
    for (const number of runs)
      for (const mark of data.runs[number].marks) {
        const place = placesOf(mark.x);
        if (!place) continue;
        const x = Math.round(plot.valToPos(place[0], "x", true)) + 0.5;
        ctx.strokeStyle = MARK_COLORS[mark.kind];
        ctx.lineWidth = devicePixelRatio;
        ctx.setLineDash(mark.kind === "fault" || mark.kind === "sign" ? [] : [4, 4]);
        ctx.beginPath();
        ctx.moveTo(x, top);
        ctx.lineTo(x, top + height);
        ctx.stroke();
        drawn += 1;
      }
    ctx.setLineDash([]);
    let bad = 0;
    for (const line of chart.series) {
      const places = line.hidden || line.bad === undefined ? null : placesOf(line.bad);
      for (const value of places || []) {
        const x = plot.valToPos(value, "x", true);
        const size = 4 * devicePixelRatio;
        const y = top + 2 * size;
        ctx.strokeStyle = color(line.color);
        ctx.lineWidth = 2 * devicePixelRatio;
        ctx.beginPath();
        ctx.moveTo(x - size, y - size);
        ctx.lineTo(x + size, y + size);
        ctx.moveTo(x - size, y + size);
        ctx.lineTo(x + size, y - size);
        ctx.stroke();
        bad += 1;
      }
    }
    ctx.restore();
    const { x, y } = plot.scales; // what was drawn, for tests
    Object.assign(chart.figure.dataset, { axis, points: plot.data[0].length, marks: drawn, bad });
    Object.assign(chart.figure.dataset, { xMin: x.min, xMax: x.max, yMin: y.min, yMax: y.max });
  }

  // What stands at the cursor, as text.
  function read(plot, chart) {
    const index = plot.cursor.idx;
    if (index === null || index === undefined || !plot.data[0].length) return;
    const at = plot.data[0][index];
    const texts = [];
    chart.layout.forEach(({ number, part }, column) => {
      const line = chart.series[number];
      if (part || line.hidden) return;
      const values = plot.data[column + 1];
      let place = index;
      while (place > 0 && (values[place] === undefined || (values[place] === null && line.points))) place -= 1;
      let text = `${line.label} ${shown(values[place])}`;
      if (chart.layout[column + 1]?.number === number && chart.layout[column + 1].part && values[place] !== null)
        text += ` (${shown(plot.data[column + 2][place])} to ${shown(plot.data[column + 3][place])})`;
      texts.push(text);
    });
    const label = data.axes.find((one) => one.key === axis).label.split(",")[0];
    const text = `${short(at)} ${label}: ${texts.join("; ")}`;
    chart.output.textContent = text;
    chart.slider.value = index;
    chart.slider.setAttribute("aria-valuetext", text);
  }

  function draw(chart) {
    chart.plot?.destroy();
    chart.holder.textContent = "";
    const { rows, layout } = table(chart);
    chart.layout = layout;
    chart.slider.max = Math.max(0, rows[0].length - 1);
    chart.slider.value = chart.slider.max;
    if (!layout.length) {
      chart.holder.textContent = "The log does not say where its steps are on this axis.";
      return;
    }
    chart.plot = new uPlot(options(chart, layout, chart.holder.clientWidth), rows, chart.holder);
  }

  function legend(chart) {
    const list = chart.figure.querySelector(".legend");
    chart.series.forEach((line, number) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      button.innerHTML = '<svg width="26" height="10" aria-hidden="true"></svg><span></span>';
      button.querySelector("span").textContent = line.label;
      button.addEventListener("click", () => {
        line.hidden = !line.hidden;
        button.setAttribute("aria-pressed", String(!line.hidden));
        chart.layout.forEach((one, column) => {
          if (one.number === number) chart.plot.setSeries(column + 1, { show: !line.hidden });
        });
      });
      list.append(button);
      chart.keys.push(() => {
        const stroke = color(line.color);
        button.querySelector("svg").innerHTML = line.points
          ? `<circle cx="13" cy="5" r="3.5" fill="none" stroke="${stroke}" stroke-width="2"/>`
          : `<line x1="0" x2="26" y1="5" y2="5" stroke="${stroke}" stroke-width="3" ` +
            `stroke-dasharray="${DASHES[line.dash % DASHES.length].join(" ")}"/>`;
      });
    });
  }

  function redraw() {
    document.documentElement.dataset.theme = theme();
    for (const chart of charts) {
      chart.keys.forEach((paint) => paint());
      draw(chart);
    }
  }

  for (const chart of data.charts) {
    const figure = document.getElementById("chart-" + chart.key);
    Object.assign(chart, { figure, holder: figure.querySelector(".plot"), output: figure.querySelector("output"),
                           slider: figure.querySelector("input"), keys: [] });
    chart.slider.hidden = false;
    chart.slider.addEventListener("input", () => {
      const { plot, slider } = chart;
      if (plot) plot.setCursor({ left: plot.valToPos(plot.data[0][+slider.value], "x"), top: 20 });
    });
    legend(chart);
    charts.push(chart);
  }

  const bar = document.getElementById("bar");
  bar.hidden = false;
  const axes = bar.querySelector("#axes");
  for (const one of data.axes) {
    const label = document.createElement("label");
    label.innerHTML = '<input type="radio" name="axis"> <span></span>';
    label.querySelector("span").textContent = one.label.split(",")[0];
    label.title = one.label;
    const input = label.querySelector("input");
    input.value = one.key;
    input.checked = one.key === axis;
    input.addEventListener("change", () => { axis = one.key; redraw(); });
    axes.append(label);
  }
  bar.querySelector("select").addEventListener("change", (event) => { chosen = event.target.value; redraw(); });
  systemDark.addEventListener("change", redraw);
  addEventListener("beforeprint", () => { printing = true; redraw(); });
  addEventListener("afterprint", () => { printing = false; redraw(); });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    for (const chart of charts) chart.plot?.setSize({ width: chart.holder.clientWidth, height: 260 });
  });
  // An address such as report.html#axis=tokens opens on that axis.
  const asked = /axis=(\w+)/.exec(location.hash);
  const input = asked && bar.querySelector(`input[value="${asked[1]}"]`);
  if (input) { input.checked = true; axis = asked[1]; }
  redraw();
  const root = document.documentElement; // for tests: how wide the page is, and by how much something sticks out
  Object.assign(root.dataset, { drawn: charts.length, width: innerWidth, overflow: root.scrollWidth - innerWidth });
})();
