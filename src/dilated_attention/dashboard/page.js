"use strict";
// Fills the charts and makes the pictures answer. All text goes in as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const MARKERS = Object.keys(SHAPES);
  const UNITS = {
    ms: ["time, ms", (v) => `${number(v)} ms`],
    peerRatio: ["times as fast as the fastest peer", (v) => `${number(v)} times as fast`],
    floor: ["share of the floor, %", (v) => `${number(v * 100)} % of the floor`],
    tflops: ["TFLOP/s", (v) => `${number(v)} TFLOP/s`],
    memory: ["peak memory, MB", (v) => `${number(v / 1e6)} MB`],
  };
  const SCALES = { floor: 100, memory: 1e-6 };
  const SIGNS = { slower: "▲", faster: "▼" };
  const TABLE_ROWS = 200;

  // Made once: a formatter costs more than all its numbers.
  const [rounded, whole] = [new Intl.NumberFormat("en", { maximumSignificantDigits: 4 }), new Intl.NumberFormat("en")];
  const number = (value) => rounded.format(value);

  function bytes(value) {
    const power = Math.max(0, Math.min(5, Math.floor(Math.log10(value) / 3 + 1e-9)));
    return `${number(value / 1000 ** power)} ${["", "k", "M", "G", "T", "P"][power]}B`;
  }

  function make(tag, text, attributes = {}) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  }

  // A line with its marker, as the legend shows it.
  function swatch(index, marker, dash) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 38 14");
    svg.setAttribute("aria-hidden", "true");
    for (const [d, filled] of [["M0 7h38", false], [SHAPES[marker], true]]) {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", d);
      path.setAttribute("style", filled ? `fill:var(--s${index})` : `stroke:var(--s${index});stroke-width:2`);
      if (!filled) path.setAttribute("stroke-dasharray", DASHES[dash].join(" "));
      svg.append(path);
    }
    return svg;
  }

  let off = new Set();
  let historyChart = null;
  let ringChart = null;
  let visible = [];

  const chosenGroup = () => data.history[Number(byId("case").value)];
  const chosenSeries = () => chosenGroup().series
    .map((series, index) => ({ ...series, index }))
    .filter((series) => series.phase === byId("phase").value);

  // One style a way to compute it, the same in both phases and for all versions of the libraries but the marker.
  function styleOf(series) {
    const names = [...new Set(chosenGroup().series.map((s) => `${s.peer} ${s.name}`))];
    const place = names.indexOf(`${series.peer} ${series.name}`);
    return { index: place % 8, marker: MARKERS[(place + 3 * versionOf(series)) % MARKERS.length], dash: series.peer ? "dotted" : ["solid", "dashed", "dotdash"][versionOf(series) % 3] };
  }

  function versionOf(series) {
    const all = [...new Set(chosenGroup().series.map((s) => s.versions))];
    return all.indexOf(series.versions);
  }

  function buildLegend() {
    const legend = byId("legend");
    legend.replaceChildren(legend.firstElementChild);
    const several = new Set(chosenSeries().map((series) => series.versions)).size > 1;
    const lone = !chosenSeries().some((series) => !series.peer);
    off = new Set();
    for (const series of chosenSeries()) {
      const style = styleOf(series);
      const box = make("input", undefined, { type: "checkbox" });
      box.checked = lone || !series.peer;
      if (!box.checked) off.add(series.index);
      box.addEventListener("change", () => {
        box.checked ? off.delete(series.index) : off.add(series.index);
        showHistory(true);
      });
      const label = make("label");
      const line = make("span", undefined, { class: "swatch" });
      line.append(swatch(style.index, style.marker, style.dash));
      label.append(box, line, `${series.name}${series.peer ? " (peer)" : ""}${several ? ` · ${series.versions}` : ""}`);
      legend.append(label);
    }
  }

  // The lines to draw, oldest run first; `at` says which runs of the series they are.
  function visibleLines() {
    const metric = byId("metric").value;
    const last = Number(byId("span").value);
    const factor = SCALES[metric] ?? 1;
    return chosenSeries().filter((series) => !off.has(series.index)).map((series) => {
      const style = styleOf(series);
      const at = [...series.run.keys()].slice(last ? -last : 0).filter((i) => series[metric][i] !== null);
      const of = (column) => at.map((i) => series[column][i]);
      const [y, low, high] = [of(metric).map((value) => value * factor), of("low"), of("high")];
      const timed = metric === "ms";
      return {
        series, at, colour: `s${style.index}`, marker: style.marker, dash: style.dash, x: at.map((i) => chosenGroup().x[series.run[i]]), y, mark: at.map((i) => series.mark[i] ?? ""),
        low: timed ? low.map((value, i) => value ?? y[i]) : undefined, high: timed ? high.map((value, i) => value ?? y[i]) : undefined,
      };
    });
  }

  // What is said of a run: made for those that are asked for, since a page of words costs more than the chart.
  function wordsOf({ series, at }, place) {
    const [i, metric] = [at[place], byId("metric").value];
    const timed = metric === "ms" && series.low[i] !== null && series.high[i] !== null;
    const { x, commit } = chosenGroup();
    return {
      when: new Date(x[series.run[i]]).toISOString().slice(0, 16).replace("T", " "), name: series.name, value: UNITS[metric][1](series[metric][i]),
      interval: timed ? `${number(series.low[i])} to ${number(series.high[i])} ms` : "-", commit: commit[series.run[i]], mark: series.mark[i] ?? "",
    };
  }

  function tipOf(line, place) {
    const run = wordsOf(line, place);
    const interval = run.interval === "-" ? "" : ` (${run.interval})`;
    return [run.name, `${run.value}${interval}`, `${run.when}, commit ${run.commit}`, ...(run.mark ? [`${SIGNS[run.mark]} marked ${run.mark}`] : [])];
  }

  function showHistory(keeps) {
    visible = visibleLines();
    historyChart.axes.y.label = UNITS[byId("metric").value][0];
    historyChart.show(visible, keeps);
    describe();
    if (byId("history-table").open) fillTable();
  }

  function describe() {
    const group = chosenGroup();
    const marks = visible.flatMap((line) => line.mark);
    const [slower, faster] = ["slower", "faster"].map((word) => marks.filter((mark) => mark === word).length);
    const words = [`${group.note}.`, `${marks.length === 1 ? "1 result" : `${whole.format(marks.length)} results`} shown, ${slower} marked slower (▲), ${faster} faster (▼).`];
    if (group.leftOut) words.push(`${whole.format(group.leftOut)} older series are left out.`);
    byId("history-note").textContent = words.join(" ");
    historyChart.canvas.setAttribute("aria-label", `Chart of runs over time: ${group.label}, ${byId("phase").value}, ${UNITS[byId("metric").value][0]}`);
  }

  function fillTable() {
    const runs = visible.flatMap((line) => line.x.map((x, place) => ({ x, line, place })));
    const newest = runs.sort((a, b) => b.x - a.x).slice(0, TABLE_ROWS).map(({ line, place }) => wordsOf(line, place));
    const table = byId("history-table").querySelector("table");
    table.caption.textContent = newest.length < runs.length ? `The newest ${newest.length} of ${number(runs.length)}` : "All runs of the chart";
    table.tBodies[0].replaceChildren(...newest.map((run) => {
      const row = make("tr");
      row.append(make("td", run.when), make("th", run.name, { scope: "row" }), make("td", run.value, { class: "num" }), make("td", run.interval, { class: "num" }), make("td", run.commit));
      const mark = make("td");
      if (run.mark) mark.append(make("span", `${SIGNS[run.mark]} ${run.mark}`, { class: `mark ${run.mark}` }));
      row.append(mark);
      return row;
    }));
  }

  function startHistory() {
    historyChart = new Chart(byId("history-chart"), "", { x: { kind: "time" }, y: {} }, tipOf);
    byId("case").append(...data.history.map((group, index) => make("option", group.label, { value: index })));
    for (const id of ["case", "phase"]) byId(id).addEventListener("change", () => { buildLegend(); showHistory(); });
    for (const id of ["metric", "span"]) byId(id).addEventListener("change", () => showHistory());
    byId("history-table").addEventListener("toggle", () => { if (byId("history-table").open) fillTable(); });
    if (!chosenSeries().length) byId("phase").value = "training";
    buildLegend();
    showHistory();
    historyChart.drawn.then(() => { document.documentElement.dataset.chartMs = Math.round(performance.now()); });
  }

  function startRing() {
    const axes = {
      x: { kind: "log", label: "ranks that share the sequence", ticks: data.ring.ranks, written: whole.format },
      y: { kind: "log", label: "bytes of the busiest rank", written: bytes },
    };
    const words = ({ name, x, y }, i) => [name, `${whole.format(x[i])} ranks, ${whole.format(y[i])} bytes`];
    const label = byId("ring-chart").dataset.label;
    ringChart = new Chart(byId("ring-chart"), label, axes, words);
    ringChart.show(data.ring.lines);
    document.querySelectorAll("#ring-legend .swatch").forEach((node, index) => {
      const line = data.ring.lines[index];
      node.append(swatch(index, line.marker, line.dash));
    });
  }

  function startPicture(svg) {
    const picture = data.pictures[Number(svg.dataset.picture)];
    const side = Math.round(Math.sqrt(picture.seen.length));
    const [cursor, readout] = [svg.querySelector(".cursor"), svg.parentElement.querySelector(".readout")];
    let [row, col] = [0, 0];
    const range = (i) => `${whole.format(i * picture.tile)} to ${whole.format(Math.min(picture.length, (i + 1) * picture.tile) - 1)}`;
    const show = () => {
      const [seen, allowed] = [picture.seen[row * side + col], picture.allowed[row * side + col]];
      const share = allowed ? `${whole.format(seen)} of ${whole.format(allowed)} pairs seen (${number((seen / allowed) * 100)} %)` : "in the future";
      readout.textContent = `Queries ${range(row)}, keys ${range(col)}: ${share}`;
      cursor.setAttribute("x", col);
      cursor.setAttribute("y", row);
      cursor.setAttribute("visibility", "visible");
    };
    const clamp = (value) => Math.max(0, Math.min(side - 1, value));
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      row = clamp(Math.floor(((event.clientY - box.top) / box.height) * side));
      col = clamp(Math.floor(((event.clientX - box.left) / box.width) * side));
      show();
    });
    svg.addEventListener("focus", show);
    svg.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? 8 : 1;
      const move = { ArrowUp: [-step, 0], ArrowDown: [step, 0], ArrowLeft: [0, -step], ArrowRight: [0, step], Home: [-row, -col], End: [side, side] }[event.key];
      if (!move) return;
      event.preventDefault();
      [row, col] = [clamp(row + move[0]), clamp(col + move[1])];
      show();
    });
  }

  function start() {
    document.querySelectorAll(".needs-script").forEach((node) => { node.hidden = false; });
    document.querySelectorAll(".without-script").forEach((node) => { node.hidden = true; });
    document.querySelectorAll(".map").forEach(startPicture);
    if (data.history.length) startHistory();
    if (data.ring) startRing();
    document.documentElement.dataset.readyMs = Math.round(performance.now());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => [historyChart, ringChart].forEach((chart) => chart?.draw()));
  }

  start();
})();
