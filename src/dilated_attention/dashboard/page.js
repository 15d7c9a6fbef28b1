"use strict";
// Fills the charts and makes the pictures answer. All text goes in as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const MARKERS = ["circle", "square", "triangle", "diamond", "inverted_triangle", "hex", "plus", "x", "star", "asterisk"];
  const DASHES = { solid: [], dashed: [6, 4], dotted: [2, 3], dotdash: [2, 3, 6, 3] };
  const UNITS = {
    ms: ["time, ms", (v) => `${number(v)} ms`],
    peerRatio: ["times as fast as the fastest peer", (v) => `${number(v)} times as fast`],
    floor: ["share of the floor, %", (v) => `${number(v * 100)} % of the floor`],
    tflops: ["TFLOP/s", (v) => `${number(v)} TFLOP/s`],
    memory: ["peak memory, MB", (v) => `${number(v / 1e6)} MB`],
  };
  const SCALES = { floor: 100, memory: 1e-6 };
  const COLUMNS = {
    lines: ["xs", "ys", "color", "dash"],
    points: ["x", "y", "low", "high", "color", "marker", "name", "when", "value", "commit", "said"],
    marks: ["x", "y", "color", "marker"],
  };
  const TABLE_ROWS = 200;
  const charts = [];

  // Made once: a formatter costs more than all its numbers.
  const [rounded, whole] = [new Intl.NumberFormat("en", { maximumSignificantDigits: 4 }), new Intl.NumberFormat("en")];
  const number = (value) => rounded.format(value);

  function make(tag, text, attributes = {}) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  }

  // A line with its marker, as the legend shows it.
  function swatch(index, marker, dash) {
    const shapes = {
      circle: "M23 7a4 4 0 1 1-8 0a4 4 0 1 1 8 0", square: "M15 3h8v8h-8z", triangle: "M19 2l5 9h-10z",
      diamond: "M19 1l5 6l-5 6l-5-6z", inverted_triangle: "M19 12l5-9h-10z", hex: "M14.5 7l2.2-4h4.6l2.2 4l-2.2 4h-4.6z",
      plus: "M18 2h2v4h4v2h-4v4h-2v-4h-4v-2h4z", x: "M15 4l1-1l3 3l3-3l1 1l-3 3l3 3l-1 1l-3-3l-3 3l-1-1l3-3z",
      star: "M19 1l1.6 4.2h4.4l-3.5 2.7l1.3 4.3l-3.8-2.6l-3.8 2.6l1.3-4.3l-3.5-2.7h4.4z",
      asterisk: "M18.4 2h1.2v4l3.4-2l.6 1l-3.4 2l3.4 2l-.6 1l-3.4-2v4h-1.2v-4l-3.4 2l-.6-1l3.4-2l-3.4-2l.6-1l3.4 2z",
    };
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 38 14");
    svg.setAttribute("aria-hidden", "true");
    for (const [d, filled] of [["M0 7h38", false], [shapes[marker], true]]) {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", d);
      path.setAttribute("style", filled ? `fill:var(--s${index})` : `stroke:var(--s${index});stroke-width:2`);
      if (!filled) path.setAttribute("stroke-dasharray", DASHES[dash].join(" "));
      svg.append(path);
    }
    return svg;
  }

  // Bokeh draws on a canvas, which no style sheet reaches: its colours are set before it draws, and again when the
  // scheme changes.
  function paint(root) {
    const [ink, soft, rule, card] = ["ink", "soft", "rule", "card"].map(colour);
    for (const model of root.references()) {
      if (/Axis$/.test(model.type)) {
        model.setv({
          axis_line_color: rule, major_tick_line_color: rule, minor_tick_line_color: null,
          major_label_text_color: soft, axis_label_text_color: ink, axis_label_text_font_style: "normal",
        });
      } else if (model.type === "Grid") {
        model.grid_line_color = rule;
      } else if (model.type === "GlyphRenderer" && model.tags.length) {
        const line = { value: colour(model.tags[0]) };
        for (const glyph of [model.glyph, model.nonselection_glyph, model.muted_glyph]) {
          if (glyph && glyph.setv) glyph.setv("fill_color" in glyph ? { line_color: line, fill_color: line } : { line_color: line });
        }
      }
    }
    root.setv({ background_fill_color: card, border_fill_color: card, outline_line_color: null });
  }

  // No zoom by the wheel, which would catch whoever scrolls past.
  function figure(height, label, options) {
    const chart = Bokeh.Plotting.figure({ height, tools: "pan,box_zoom,reset", sizing_mode: "stretch_width", ...options });
    chart.toolbar.logo = null;
    chart.left[0].axis_label = label;
    return chart;
  }

  function hover(chart, renderers, tooltips) {
    chart.add_tools(new Bokeh.HoverTool({ renderers, tooltips, point_policy: "snap_to_data" }));
  }

  function embed(chart, id) {
    const drawing = new (Bokeh.require("document").Document)();
    drawing.add_root(chart);
    charts.push(chart);
    paint(chart);
    return Bokeh.embed.add_document_standalone(drawing, byId(id));
  }

  const sources = {};
  let yAxis = null;
  let drawHistory = () => undefined; // what was last chosen to be shown
  let off = new Set();

  const chosenSeries = () => data.history[Number(byId("case").value)].series
    .map((series, index) => ({ ...series, index }))
    .filter((series) => series.phase === byId("phase").value);

  // One style a way to compute it, the same in both phases and for all versions of the libraries but the marker.
  function styleOf(series) {
    const names = [...new Set(data.history[Number(byId("case").value)].series.map((s) => `${s.peer} ${s.name}`))];
    const place = names.indexOf(`${series.peer} ${series.name}`);
    return { index: place % 8, marker: MARKERS[(place + 3 * versionOf(series)) % MARKERS.length], dash: series.peer ? "dotted" : ["solid", "dashed", "dotdash"][versionOf(series) % 3] };
  }

  function versionOf(series) {
    const all = [...new Set(data.history[Number(byId("case").value)].series.map((s) => s.versions))];
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
        showHistory();
      });
      const label = make("label");
      const line = make("span", undefined, { class: "swatch" });
      line.append(swatch(style.index, style.marker, style.dash));
      label.append(box, line, `${series.name}${series.peer ? " (peer)" : ""}${several ? ` · ${series.versions}` : ""}`);
      legend.append(label);
    }
  }

  // The runs to show, oldest first, with what the hover and the table say of each.
  function visibleRuns() {
    const metric = byId("metric").value;
    const last = Number(byId("span").value);
    const [factor, said] = [SCALES[metric] ?? 1, UNITS[metric][1]];
    return chosenSeries().filter((series) => !off.has(series.index)).map((series) => {
      const style = styleOf(series);
      const from = last ? Math.max(0, series.x.length - last) : 0;
      const runs = [];
      for (let i = from; i < series.x.length; i += 1) {
        const value = series[metric][i];
        if (value === null) continue;
        const isTime = metric === "ms" && series.low[i] !== null && series.high[i] !== null;
        runs.push({
          x: series.x[i], y: value * factor, low: isTime ? series.low[i] : value * factor, high: isTime ? series.high[i] : value * factor,
          name: series.name, when: new Date(series.x[i]).toISOString().slice(0, 16).replace("T", " "), value: said(value),
          interval: isTime ? `${number(series.low[i])} to ${number(series.high[i])} ms` : "-", commit: series.commit[i], mark: series.mark[i],
        });
      }
      return { series, style, runs };
    });
  }

  function showHistory() {
    const shown = visibleRuns();
    const runs = shown.flatMap(({ style, runs: own }) => own.map((run) => ({ ...run, color: colour(`s${style.index}`), marker: style.marker })));
    const column = (rows, names) => Object.fromEntries(names.map((name) => [name, rows.map((row) => row[name])]));
    const said = runs.map((run) => ({ ...run, said: { slower: "▲ marked slower", faster: "▼ marked faster", "": "" }[run.mark] }));
    describe(shown, runs);
    fillTable(runs);
    drawHistory = () => {
      sources.points.data = column(said, COLUMNS.points);
      sources.lines.data = {
        xs: shown.map(({ runs: own }) => own.map((run) => run.x)), ys: shown.map(({ runs: own }) => own.map((run) => run.y)),
        color: shown.map(({ style }) => colour(`s${style.index}`)), dash: shown.map(({ style }) => DASHES[style.dash]),
      };
      const marked = runs.filter((run) => run.mark);
      sources.marks.data = {
        x: marked.map((run) => run.x), y: marked.map((run) => run.y), color: marked.map((run) => colour(run.mark)),
        marker: marked.map((run) => (run.mark === "slower" ? "triangle" : "inverted_triangle")),
      };
      yAxis.axis_label = UNITS[byId("metric").value][0];
    };
    if (sources.points) drawHistory(); // the chart comes a moment after the page
  }

  function describe(shown, runs) {
    const group = data.history[Number(byId("case").value)];
    const thinned = shown.filter(({ series }) => series.runs > series.x.length);
    const [slower, faster] = ["slower", "faster"].map((word) => runs.filter((run) => run.mark === word).length);
    const words = [`${group.note}.`, `${runs.length === 1 ? "1 result" : `${whole.format(runs.length)} results`} shown, ${slower} marked slower (▲), ${faster} faster (▼).`];
    for (const { series } of thinned) {
      words.push(`${series.name}: ${whole.format(series.x.length)} of ${whole.format(series.runs)} runs, the fastest and the slowest of each stretch and all that are marked.`);
    }
    if (group.leftOut) words.push(`${whole.format(group.leftOut)} older series are left out.`);
    byId("history-note").textContent = words.join(" ");
    byId("history-chart").setAttribute("aria-label", `Chart of runs over time: ${group.label}, ${byId("phase").value}, ${UNITS[byId("metric").value][0]}`);
  }

  function fillTable(runs) {
    const newest = [...runs].sort((a, b) => b.x - a.x).slice(0, TABLE_ROWS);
    const table = byId("history-table").querySelector("table");
    table.caption.textContent = newest.length < runs.length ? `The newest ${newest.length} of ${number(runs.length)}` : "All runs of the chart";
    table.tBodies[0].replaceChildren(...newest.map((run) => {
      const row = make("tr");
      row.append(make("td", run.when), make("th", run.name, { scope: "row" }), make("td", run.value, { class: "num" }), make("td", run.interval, { class: "num" }), make("td", run.commit));
      const mark = make("td");
      if (run.mark) mark.append(make("span", `${run.mark === "slower" ? "▲" : "▼"} ${run.mark}`, { class: `mark ${run.mark}` }));
      row.append(mark);
      return row;
    }));
  }

  function startHistory() {
    if (!data.history.length) return;
    byId("case").append(...data.history.map((group, index) => make("option", group.label, { value: index })));
    for (const id of ["case", "phase"]) byId(id).addEventListener("change", () => { buildLegend(); showHistory(); });
    for (const id of ["metric", "span"]) byId(id).addEventListener("change", showHistory);
    if (!chosenSeries().length) byId("phase").value = "training";
    buildLegend();
    showHistory();
  }

  // Days, with the year below the first; hours and minutes, with the day below the first.
  function datesOfAxis() {
    const small = ["seconds", "minsec", "minutes", "hourmin", "hours"];
    const all = (format, names) => Object.fromEntries(names.map((name) => [name, format]));
    const none = all("", ["microseconds", "milliseconds", "months", "years"]);
    const context = new Bokeh.DatetimeTickFormatter({ ...none, ...all("%b %d, %Y", small), days: "%Y", hide_repeats: true, boundary_scaling: false });
    const times = { ...all("%T", small.slice(0, 2)), ...all("%H:%M", small.slice(2)), days: "%b %d", months: "%b %Y", years: "%Y" };
    return new Bokeh.DatetimeTickFormatter({ ...times, context, context_which: "all", boundary_scaling: false });
  }

  // Lines, intervals, and a triangle on marked runs.
  function historyChart() {
    for (const [name, columns] of Object.entries(COLUMNS)) sources[name] = new Bokeh.ColumnDataSource({ data: Object.fromEntries(columns.map((column) => [column, []])) });
    const { lines, points, marks } = sources;
    const day = 24 * 60 * 60 * 1000; // the span of a single run
    const chart = figure(360, "runs over time", { x_axis_type: "datetime", x_range: new Bokeh.DataRange1d({ default_span: day }) });
    chart.below[0].formatter = datesOfAxis();
    yAxis = chart.left[0];
    const field = (name) => ({ field: name });
    chart.multi_line(field("xs"), field("ys"), { line_color: field("color"), line_dash: field("dash"), line_width: 1.5, line_alpha: 0.8, source: lines });
    chart.segment(field("x"), field("low"), field("x"), field("high"), { line_color: field("color"), line_width: 4, line_alpha: 0.3, source: points });
    const dots = chart.scatter(field("x"), field("y"), { size: 7, marker: field("marker"), color: field("color"), source: points });
    chart.scatter(field("x"), field("y"), { size: 18, marker: field("marker"), line_color: field("color"), fill_alpha: 0, line_width: 2.5, source: marks });
    hover(chart, [dots], [["", "@name"], ["when", "@when"], ["value", "@value"], ["commit", "@commit"], ["", "@said"]]);
    drawHistory();
    return chart;
  }

  function ringChart() {
    const { lines, ranks, ticks } = data.ringChart;
    const chart = figure(340, "bytes of the busiest rank", { x_axis_type: "log", y_axis_type: "log" });
    const dots = lines.map(({ name, marker, dash, x, y }, index) => {
      const source = new Bokeh.ColumnDataSource({ data: { x, y, what: x.map(() => name) } });
      const tags = [`s${index}`];
      chart.line({ field: "x" }, { field: "y" }, { line_width: 2, line_dash: DASHES[dash], source }).tags = tags;
      const drawn = chart.scatter({ field: "x" }, { field: "y" }, { size: 9, marker, fill_alpha: 0.25, line_width: 2, source });
      drawn.tags = tags;
      return drawn;
    });
    hover(chart, dots, [["", "@what"], ["ranks", "@x{0,0}"], ["bytes", "@y{0,0}"]]);
    chart.below[0].setv({ ticker: new Bokeh.FixedTicker({ ticks: ranks }), formatter: new Bokeh.NumeralTickFormatter({ format: "0,0" }), axis_label: "ranks that share the sequence" });
    chart.left[0].setv({ ticker: new Bokeh.FixedTicker({ ticks: ticks.map(([tick]) => tick) }), major_label_overrides: new Map(ticks) });
    return chart;
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
    document.querySelectorAll("#ring-legend .swatch").forEach((node) => node.append(swatch(node.dataset.series, node.dataset.marker, node.dataset.dash)));
    startHistory();
    document.documentElement.dataset.readyMs = Math.round(performance.now());
    requestAnimationFrame(() => setTimeout(drawCharts));
  }

  // The library is the larger part of the page. It waits in its element until everything else can be seen and used; the
  // ring's chart waits until one scrolls near it, or prints.
  async function drawCharts() {
    if (!byId("library")) return;
    document.head.append(make("script", byId("library").textContent));
    Bokeh.set_log_level("error");
    if (data.history.length) await embed(historyChart(), "history-chart");
    document.documentElement.dataset.chartMs = Math.round(performance.now());
    if (data.ringChart) whenNear(byId("ring-chart"), () => embed(ringChart(), "ring-chart"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      charts.forEach(paint);
      if (data.history.length) showHistory();
    });
  }

  function whenNear(node, act) {
    const watch = new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) once(); }, { rootMargin: "600px" });
    const once = () => {
      watch.disconnect();
      removeEventListener("beforeprint", once);
      act();
    };
    watch.observe(node);
    addEventListener("beforeprint", once);
  }

  start();
})();
