// Draws the charts of a run page with uPlot, from the JSON in #chart-data.
"use strict";
(() => {
  const MINUS = "\u2212";
  const HEIGHT = 210;
  // Top, right, bottom, left: half the last label of the horizontal axis has to fit on the right.
  const PADDING = [8, 14, 0, 0];
  const FONT_SIZE = 12;
  const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif';
  // Series of up to this many held-out values have a marker at each.
  const MARKED = 30;

  const minus = (text) => text.replace("-", MINUS);
  const grouped = (value, places) =>
    value.toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places });

  // The same text as format_value in system/formatting.py.
  function formatValue(value, unit = "") {
    if (value === null || value === undefined) return "–";
    if (unit === "share") return minus(`${(100 * value).toFixed(1)}%`);
    if (unit === "bytes") {
      return value >= 1e9 ? `${(value / 1e9).toFixed(2)} GB` : `${(value / 1e6).toFixed(0)} MB`;
    }
    if (unit === "tokens/s") return `${grouped(value, 0)} tokens/s`;
    const size = Math.abs(value);
    let text;
    if (size >= 10000) text = grouped(value, 0);
    else if (size >= 100) text = value.toFixed(0);
    else if (size >= 1e-3 || size === 0) text = value.toFixed(size < 1 ? 3 : size < 10 ? 2 : 1);
    else {
      const [mantissa, exponent] = value.toExponential(1).split("e");
      text = `${mantissa.replace(/\.0$/, "")}e${Number(exponent)}`;
    }
    // The sign of the mantissa and that of the exponent.
    return `${text.replaceAll("-", MINUS)} ${unit}`.trim();
  }

  // Labels of an axis, with as many decimal places as tell the ticks apart. A null tick has none.
  function tickLabels(ticks, unit = "") {
    const present = ticks.filter((tick) => tick !== null);
    const largest = Math.max(0, ...present.map(Math.abs));
    let scale = 1;
    let tail = "";
    if (unit === "share") [scale, tail] = [100, "%"];
    else if (unit === "bytes") [scale, tail] = largest >= 1e9 ? [1e-9, " GB"] : [1e-6, " MB"];
    else if (largest >= 10000) [scale, tail] = largest >= 2e6 ? [1e-6, "M"] : [1e-3, "k"];
    else if (largest > 0 && largest < 1e-2) {
      const power = Math.floor(Math.log10(largest));
      [scale, tail] = [10 ** -power, `e${MINUS}${-power}`];
    }
    const shown = present.map((tick) => tick * scale);
    const steps = shown.slice(1).map((value, i) => value - shown[i]);
    const step = steps.length ? Math.min(...steps) : 1;
    let places = 0;
    while (places < 6 && Math.abs(step - Number(step.toFixed(places))) >= 1e-6 * Math.abs(step)) {
      places++;
    }
    const zero = ["k", "M", "e"].includes(tail[0]) ? "0" : `0${tail}`;
    return ticks.map((tick) => {
      if (tick === null) return "";
      const text = grouped(tick * scale, places);
      return Number(text.replaceAll(",", "")) === 0 ? zero : minus(text) + tail;
    });
  }

  // Means of up to `width` values around each; at the ends of fewer, the same number on both sides.
  function runningMean(values, width) {
    const sums = [0];
    for (const value of values) sums.push(sums[sums.length - 1] + value);
    return values.map((_, i) => {
      const reach = Math.min(Math.floor(width / 2), i, values.length - 1 - i);
      return (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1);
    });
  }

  // Index of the value in ascending `values` that is nearest to `x`.
  function nearest(values, x) {
    let [low, high] = [0, values.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] < x) low = middle + 1;
      else high = middle;
    }
    return low > 0 && x - values[low - 1] <= values[low] - x ? low - 1 : low;
  }

  // Ends of a vertical axis: the data with some room, but never below 0 for data that is not.
  function verticalRange(low, high, bounds) {
    if (bounds) return [bounds[0] - 0.03, bounds[1] + 0.03];
    const pad = 0.06 * (high - low) || 0.05 * Math.abs(high) || 0.5;
    return [low >= 0 ? Math.max(low - pad, -0.04 * (high + pad)) : low - pad, high + pad];
  }

  if (typeof module !== "undefined") {
    module.exports = { formatValue, tickLabels, runningMean, nearest, verticalRange };
    return;
  }

  const all = JSON.parse(document.getElementById("chart-data").textContent);
  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const slider = document.getElementById("smoothing");
  let charts = [];

  const ink = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const font = () => `${FONT_SIZE}px ${FONT}`;
  const smoothing = () => (slider ? Number(slider.value) / 100 : 0);

  function axis(unit, more) {
    return {
      stroke: ink("muted"),
      font: font(),
      grid: { stroke: ink("rule"), width: 1 },
      ticks: { show: false },
      gap: 6,
      values: (u, ticks) => tickLabels(ticks, unit),
      ...more,
    };
  }

  function verticalAxis(unit, floor, ceiling) {
    return axis(unit, {
      space: 34,
      filter: (u, ticks) => ticks.map((tick) => (tick < floor || tick > ceiling ? null : tick)),
      size: (u, labels) => {
        u.ctx.save();
        u.ctx.font = `${FONT_SIZE * uPlot.pxRatio}px ${FONT}`;
        const widths = (labels || []).map((label) => u.ctx.measureText(label || "").width);
        u.ctx.restore();
        return Math.ceil(Math.max(24, ...widths) / uPlot.pxRatio) + 10;
      },
    });
  }

  function horizontalAxis(name) {
    const more = { grid: { show: false }, size: 30, label: name, labelFont: font() };
    Object.assign(more, { labelSize: 18, labelGap: 0, space: 56 });
    if (name === "update") {
      more.incrs = [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5, 6, 7, 8].map((p) => n * 10 ** p));
      more.incrs.sort((a, b) => a - b);
    }
    return axis("", more);
  }

  // A dashed horizontal line at a value, if the value is in view.
  function levelLine(u, value, colour) {
    const { min, max } = u.scales.y;
    if (value === null || value < min || value > max) return;
    const y = Math.round(u.valToPos(value, "y", true)) + 0.5;
    const { ctx, bbox } = u;
    ctx.save();
    ctx.strokeStyle = colour;
    ctx.lineWidth = uPlot.pxRatio;
    ctx.setLineDash([4 * uPlot.pxRatio, 4 * uPlot.pxRatio]);
    ctx.beginPath();
    ctx.moveTo(bbox.left, y);
    ctx.lineTo(bbox.left + bbox.width, y);
    ctx.stroke();
    ctx.restore();
  }

  // Shades the area between a line and its first value where the line is below it.
  function fallArea(u, series) {
    const { ctx, bbox } = u;
    const first = series.y[0];
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.beginPath();
    const at = (x, y) => [u.valToPos(x, "x", true), u.valToPos(y, "y", true)];
    ctx.moveTo(...at(series.x[0], first));
    series.x.forEach((x, i) => ctx.lineTo(...at(x, Math.min(series.y[i], first))));
    ctx.lineTo(...at(series.x[series.x.length - 1], first));
    ctx.closePath();
    ctx.fillStyle = ink("warn");
    ctx.globalAlpha = 0.16;
    ctx.fill();
    ctx.restore();
    levelLine(u, first, ink("warn"));
  }

  // Two series of uPlot for each of the chart: the values, and the smoothed line before them.
  function lineData(chart) {
    const tables = [];
    const smoothed = [];
    for (const one of chart.series) {
      const from = one.means || one;
      const width = Math.round(smoothing() * from.y.length);
      const smooth = chart.smooth && !one.heldOut && width >= 3;
      smoothed.push(smooth);
      tables.push([one.x, one.y]);
      tables.push([from.x, smooth ? runningMean(from.y, width) : from.x.map(() => undefined)]);
    }
    return { data: uPlot.join(tables), smoothed };
  }

  function lineChart(chart, box, figure) {
    const scattered = chart.x !== "update";
    const { data, smoothed } = lineData(chart);
    const series = [{}];
    chart.series.forEach((one, i) => {
      const stroke = ink(`c${one.colour}`);
      const few = one.x.length === 1 || (one.heldOut && one.x.length <= MARKED);
      series.push({
        stroke,
        width: one.heldOut ? 2 : 1.5,
        alpha: smoothed[i] ? 0.3 : 1,
        paths: scattered ? () => null : undefined,
        points: { show: few || scattered, size: scattered ? 4 : 6, fill: stroke, width: 0 },
      });
      series.push({ stroke, width: 2, points: { show: false } });
    });
    const values = chart.series.flatMap((one) => one.y);
    const floor = chart.bounds ? chart.bounds[0] : values.some((y) => y < 0) ? -Infinity : 0;
    const ceiling = chart.bounds ? chart.bounds[1] : Infinity;
    const u = new uPlot(
      {
        width: box.clientWidth,
        height: HEIGHT,
        padding: PADDING,
        series,
        scales: {
          x: {
            time: false,
            range: (u, low, high) => {
              const pad = 0.02 * (high - low) || 0.5;
              return [low - pad, high + pad];
            },
          },
          y: { range: (u, low, high) => verticalRange(low ?? 0, high ?? 1, chart.bounds) },
        },
        axes: [horizontalAxis(chart.x), verticalAxis(chart.unit, floor, ceiling)],
        legend: { show: false },
        cursor: {
          y: false,
          points: { size: 7 },
          drag: { x: true, y: false },
          sync: scattered ? undefined : { key: "updates", scales: ["x", null] },
        },
        hooks: {
          drawAxes: [
            (u) => {
              levelLine(u, chart.level, ink("muted"));
              if (chart.fall !== null) fallArea(u, chart.series[chart.fall]);
            },
          ],
          setCursor: [(u) => readValues(u, chart, figure)],
        },
      },
      data,
      box
    );
    u.smooth = () => {
      const next = lineData(chart);
      next.smoothed.forEach((on, i) => (u.series[2 * i + 1].alpha = on ? 0.3 : 1));
      u.setData(next.data, false);
      u.redraw(true);
    };
    return u;
  }

  // Puts the values under the cursor into the legend, and the last values back afterwards.
  function readValues(u, chart, figure) {
    const place = figure.querySelector(".place");
    const entries = figure.querySelectorAll(".legend b");
    const inside = u.cursor.left >= 0 && u.cursor.idx !== null && u.cursor.idx !== undefined;
    const x = inside ? u.data[0][u.cursor.idx] : null;
    const name = chart.x === "update" ? `update ${x}` : `${chart.x} ${formatValue(x)}`;
    place.textContent = inside ? name : "";
    chart.series.forEach((one, i) => {
      if (!entries[i]) return;
      const at = inside ? nearest(one.x, x) : one.x.length - 1;
      entries[i].textContent = formatValue(one.y[at], chart.unit);
      entries[i].classList.toggle("near", inside && one.heldOut && one.x[at] !== x);
    });
  }

  // Charts of shares without a time axis: bars, and a reward model's calibration.
  function shareChart(chart, box, figure) {
    const bars = chart.kind === "bars";
    const x = bars ? chart.labels.map((_, i) => i) : chart.x;
    const stroke = ink("c1");
    const low = bars ? 0 : Math.min(0.5, ...chart.y);
    const horizontal = bars
      ? { grid: { show: false }, size: 40, splits: () => x, values: () => chart.labels }
      : { grid: { show: false }, size: 30, label: "confidence", labelFont: font() };
    if (!bars) Object.assign(horizontal, { labelSize: 18, labelGap: 0, space: 50 });
    return new uPlot(
      {
        width: box.clientWidth,
        height: HEIGHT,
        padding: PADDING,
        series: [
          {},
          bars
            ? { stroke, fill: stroke, width: 0, paths: uPlot.paths.bars({ size: [0.64, 60] }) }
            : { stroke, width: 1.2, alpha: 0.5 },
        ].map((one) => ({ ...one, points: { show: false } })),
        scales: {
          x: { time: false, range: bars ? [-0.6, x.length - 0.4] : [0.47, 1.03] },
          y: { range: bars ? [0, 1.12] : [low - 0.06, 1.06] },
        },
        axes: [axis("share", horizontal), verticalAxis("share", 0, 1)],
        legend: { show: false },
        cursor: { y: false, x: !bars, drag: { x: false, y: false }, points: { show: false } },
        hooks: {
          drawClear: [(u) => bars || diagonal(u)],
          draw: [(u) => (bars ? barValues(u, chart) : dots(u, chart, stroke))],
          setCursor: [
            (u) => {
              const i = u.cursor.idx;
              const inside = !bars && u.cursor.left >= 0 && i !== null && i !== undefined;
              figure.querySelector(".place").textContent = inside ? chart.labels[i] : "";
            },
          ],
        },
      },
      [x, chart.y],
      box
    );
  }

  function barValues(u, chart) {
    const { ctx } = u;
    levelLine(u, chart.level, ink("ink"));
    ctx.save();
    ctx.font = `${FONT_SIZE * uPlot.pxRatio}px ${FONT}`;
    ctx.fillStyle = ink("ink");
    ctx.textAlign = "center";
    chart.y.forEach((y, i) => {
      if (y === null) return;
      const left = u.valToPos(i, "x", true);
      const top = u.valToPos(y, "y", true) - 5 * uPlot.pxRatio;
      ctx.fillText(`${Math.round(100 * y)}%`, left, top);
    });
    ctx.restore();
  }

  function diagonal(u) {
    const { ctx } = u;
    ctx.save();
    ctx.strokeStyle = ink("muted");
    ctx.lineWidth = uPlot.pxRatio;
    ctx.setLineDash([4 * uPlot.pxRatio, 4 * uPlot.pxRatio]);
    ctx.beginPath();
    ctx.moveTo(u.valToPos(0.5, "x", true), u.valToPos(0.5, "y", true));
    ctx.lineTo(u.valToPos(1, "x", true), u.valToPos(1, "y", true));
    ctx.stroke();
    ctx.restore();
  }

  function dots(u, chart, colour) {
    const { ctx } = u;
    const most = Math.max(...chart.counts);
    ctx.save();
    ctx.fillStyle = colour;
    chart.x.forEach((x, i) => {
      const radius = uPlot.pxRatio * Math.sqrt((12 + 150 * chart.counts[i]) / most / Math.PI + 4);
      ctx.beginPath();
      ctx.arc(u.valToPos(x, "x", true), u.valToPos(chart.y[i], "y", true), radius, 0, 2 * Math.PI);
      ctx.fill();
    });
    ctx.restore();
  }

  function drawAll() {
    charts.forEach((u) => u.destroy());
    charts = figures.map((figure) => {
      const chart = all[Number(figure.dataset.chart)];
      const box = figure.querySelector(".plot");
      const draw = chart.kind === "lines" ? lineChart : shareChart;
      return draw(chart, box, figure);
    });
  }

  drawAll();
  document.querySelectorAll(".controls").forEach((controls) => (controls.hidden = false));
  if (slider) {
    slider.addEventListener("input", () => {
      document.getElementById("smoothing-value").textContent = `${slider.value}%`;
      charts.forEach((u) => u.smooth && u.smooth());
    });
  }
  // Colours are read from the style sheet, so a change of scheme draws everything again.
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  const resized = new ResizeObserver((entries) => {
    for (const entry of entries) {
      const u = charts[figures.findIndex((figure) => figure.contains(entry.target))];
      const width = Math.floor(entry.contentRect.width);
      if (u && width && width !== u.width) u.setSize({ width, height: HEIGHT });
    }
  });
  figures.forEach((figure) => resized.observe(figure.querySelector(".plot")));
})();
