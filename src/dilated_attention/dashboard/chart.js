"use strict";
// Lines over time or over a count, on a canvas. One drags to move or to zoom, points at a run or walks from run to run
// with the arrow keys. Text goes in as text, colours come from the style sheet, times are UTC.

// Of a marker, in a swatch 38 by 14 with its middle at (19, 7).
const SHAPES = {
  circle: "M23 7a4 4 0 1 1-8 0a4 4 0 1 1 8 0", square: "M15 3h8v8h-8z", triangle: "M19 2l5 9h-10z",
  diamond: "M19 1l5 6l-5 6l-5-6z", inverted_triangle: "M19 12l5-9h-10z", hex: "M14.5 7l2.2-4h4.6l2.2 4l-2.2 4h-4.6z",
  plus: "M18 2h2v4h4v2h-4v4h-2v-4h-4v-2h4z", x: "M15 4l1-1l3 3l3-3l1 1l-3 3l3 3l-1 1l-3-3l-3 3l-1-1l3-3z",
  star: "M19 1l1.6 4.2h4.4l-3.5 2.7l1.3 4.3l-3.8-2.6l-3.8 2.6l1.3-4.3l-3.5-2.7h4.4z",
  asterisk: "M18.4 2h1.2v4l3.4-2l.6 1l-3.4 2l3.4 2l-.6 1l-3.4-2v4h-1.2v-4l-3.4 2l-.6-1l3.4-2l-3.4-2l.6-1l3.4 2z",
};
const DASHES = { solid: [], dashed: [6, 4], dotted: [2, 3], dotdash: [2, 3, 6, 3] };

class Chart {
  // `axes`: {x, y}, each {label, kind: "time", "log" or none, ticks, written}. `words(line, index)` gives what is said of
  // a point, as lines of text. A line is {colour, marker, dash, x, y, low, high, mark}; the last three may be missing.
  constructor(holder, label, axes, words) {
    Object.assign(this, { holder, axes, words, lines: [], home: null, view: null, at: null, drag: null, zooms: false, width: 0, height: 0 });
    this.canvas = document.createElement("canvas");
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.setAttribute("role", "status");
    for (const [name, value] of [["tabindex", "0"], ["role", "application"], ["aria-roledescription", "chart"], ["aria-label", label]]) this.canvas.setAttribute(name, value);
    holder.append(this.buttons(), this.canvas, this.tip);
    this.listen();
    this.drawn = new Promise((done) => { this.whenDrawn = done; });
    new ResizeObserver(([{ contentRect: { width, height } }]) => { // its first call comes when the page has been laid out
      Object.assign(this, { width, height });
      this.draw();
    }).observe(this.canvas);
  }

  buttons() {
    const bar = document.createElement("div");
    bar.className = "chartbar";
    const button = (text, act) => {
      const node = document.createElement("button");
      node.type = "button";
      node.textContent = text;
      node.addEventListener("click", act);
      bar.append(node);
      return node;
    };
    const modes = [button("Move", () => choose(false)), button("Zoom", () => choose(true))];
    const choose = (zooms) => {
      this.zooms = zooms;
      modes.forEach((node, index) => node.setAttribute("aria-pressed", String(Boolean(index) === zooms)));
      this.canvas.classList.toggle("zooms", zooms);
    };
    choose(false);
    button("Reset", () => this.reset());
    const hint = document.createElement("span");
    hint.textContent = "Drag to move or zoom. Keys: arrows go from point to point, + and − zoom, 0 resets.";
    bar.append(hint);
    return bar;
  }

  // Shows these lines; `keeps` leaves the part that one chose to look at as it is.
  show(lines, keeps) {
    const chosen = JSON.stringify(this.view) !== JSON.stringify(this.home);
    this.lines = lines;
    this.home = this.bounds();
    if (!keeps || !chosen) this.view = structuredClone(this.home);
    this.point(null);
  }

  reset() {
    this.view = structuredClone(this.home);
    this.draw();
  }

  place(axis, value) {
    return this.axes[axis].kind === "log" ? Math.log10(value) : value;
  }

  bounds() {
    const found = {};
    for (const [axis, names] of [["x", ["x"]], ["y", ["y", "low", "high"]]]) {
      let [low, high] = [Infinity, -Infinity];
      for (const line of this.lines) {
        for (const name of names) {
          for (const value of line[name] ?? []) {
            low = Math.min(low, value);
            high = Math.max(high, value);
          }
        }
      }
      if (low > high) [low, high] = axis === "x" && this.axes.x.kind === "time" ? [Date.now() - DAY, Date.now()] : [1, 2];
      [low, high] = [this.place(axis, low), this.place(axis, high)];
      const same = this.axes[axis].kind === "time" ? DAY / 2 : Math.abs(low) / 10 || 1;
      const margin = high > low ? (high - low) * (axis === "x" ? 0.03 : 0.08) : same;
      found[axis] = [low - margin, high + margin];
    }
    return found;
  }

  // The frame of the drawing, in pixels of the page.
  frame() {
    return { left: 72, top: 8, right: this.width - 36, bottom: this.height - (this.axes.x.label ? 44 : 28) };
  }

  // A function from values to pixels.
  scale(axis) {
    const { left, top, right, bottom } = this.frame();
    const [low, high] = this.view[axis];
    const [from, size] = axis === "x" ? [left, right - left] : [bottom, top - bottom];
    return (value) => from + ((this.place(axis, value) - low) / (high - low)) * size;
  }

  ticks(axis) {
    const { kind, ticks, written } = this.axes[axis];
    const [low, high] = this.view[axis];
    const { left, right, top, bottom } = this.frame();
    const room = axis === "x" ? Math.max(2, (right - left) / 110) : Math.max(2, (bottom - top) / 50);
    if (ticks) return ticks.map((value) => [this.place(axis, value), written(value)]).filter(([at]) => at >= low && at <= high);
    if (kind === "time") return timeTicks(low, high, room);
    if (kind !== "log") return numberTicks(low, high, room);
    const powers = powerTicks(low, high, written);
    return powers.length > 1 ? powers : numberTicks(10 ** low, 10 ** high, room).map(([value]) => [Math.log10(value), written(value)]);
  }

  draw() {
    const { width, height } = this;
    if (!width || !this.view) return;
    const frame = this.frame();
    const dots = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * dots) || this.canvas.height !== Math.round(height * dots)) {
      [this.canvas.width, this.canvas.height] = [Math.round(width * dots), Math.round(height * dots)];
    }
    const style = getComputedStyle(this.canvas);
    const known = new Map();
    const colour = (name) => {
      if (!known.has(name)) known.set(name, style.getPropertyValue(`--${name}`).trim());
      return known.get(name);
    };
    const pen = this.canvas.getContext("2d");
    pen.setTransform(dots, 0, 0, dots, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = `12px ${style.fontFamily}`;
    this.drawAxes(pen, frame, colour);
    pen.save();
    pen.beginPath();
    pen.rect(frame.left, frame.top, frame.right - frame.left, frame.bottom - frame.top);
    pen.clip();
    for (const line of this.lines) this.drawLine(pen, line, colour);
    for (const line of this.lines) this.drawMarks(pen, line, colour);
    this.drawHand(pen, frame, colour);
    pen.restore();
    this.whenDrawn();
  }

  drawAxes(pen, { left, top, right, bottom }, colour) {
    const [across, up] = [right - left, bottom - top];
    pen.lineWidth = 1;
    pen.textBaseline = "middle";
    const line = (x0, y0, x1, y1) => { pen.beginPath(); pen.moveTo(x0, y0); pen.lineTo(x1, y1); pen.stroke(); };
    pen.strokeStyle = colour("rule");
    for (const axis of ["x", "y"]) {
      const [low, high] = this.view[axis];
      pen.textAlign = axis === "x" ? "center" : "right";
      pen.fillStyle = colour("soft");
      for (const [at, text] of this.ticks(axis)) {
        const share = (at - low) / (high - low);
        const place = Math.round(axis === "x" ? left + share * across : bottom - share * up) + 0.5;
        if (axis === "x") line(place, top, place, bottom + 5);
        else line(left - 5, place, right, place);
        axis === "x" ? pen.fillText(text, place, bottom + 15) : pen.fillText(text, left - 9, place);
      }
    }
    pen.strokeRect(left + 0.5, top + 0.5, across, up);
    pen.fillStyle = colour("ink");
    pen.textAlign = "center";
    pen.fillText(this.axes.x.label ?? "", left + across / 2, bottom + 34);
    pen.save();
    pen.translate(11, top + up / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText(this.axes.y.label ?? "", 0, 0);
    pen.restore();
  }

  drawLine(pen, line, colour) {
    const [toX, toY] = [this.scale("x"), this.scale("y")];
    pen.strokeStyle = pen.fillStyle = colour(line.colour);
    pen.beginPath();
    for (let i = 0; i < line.x.length; i += 1) pen.lineTo(toX(line.x[i]), toY(line.y[i]));
    pen.setLineDash(DASHES[line.dash]);
    pen.globalAlpha = 0.8;
    pen.lineWidth = 1.5;
    pen.stroke();
    pen.setLineDash([]);
    if (line.low) {
      pen.beginPath();
      for (let i = 0; i < line.x.length; i += 1) {
        pen.moveTo(toX(line.x[i]), toY(line.low[i]));
        pen.lineTo(toX(line.x[i]), toY(line.high[i]));
      }
      pen.globalAlpha = 0.3;
      pen.lineWidth = 4;
      pen.stroke();
    }
    pen.globalAlpha = 1;
    const shape = new Path2D(SHAPES[line.marker]);
    for (let i = 0; i < line.x.length; i += 1) this.stamp(pen, shape, toX(line.x[i]), toY(line.y[i]), 0.85, "fill");
  }

  drawMarks(pen, line, colour) {
    const [toX, toY] = [this.scale("x"), this.scale("y")];
    for (let i = 0; i < (line.mark?.length ?? 0); i += 1) {
      if (!line.mark[i]) continue;
      pen.strokeStyle = colour(line.mark[i]);
      pen.lineWidth = 1.3;
      this.stamp(pen, new Path2D(SHAPES[line.mark[i] === "slower" ? "triangle" : "inverted_triangle"]), toX(line.x[i]), toY(line.y[i]), 2, "stroke");
    }
  }

  stamp(pen, shape, x, y, size, how) {
    pen.save();
    pen.translate(x, y);
    pen.scale(size, size);
    pen.translate(-19, -7);
    pen[how](shape);
    pen.restore();
  }

  // The point that is spoken of, and the box that is being drawn.
  drawHand(pen, frame, colour) {
    pen.lineWidth = 2;
    if (this.at) {
      const { x, y } = this.at.line;
      pen.strokeStyle = colour("ink");
      pen.beginPath();
      pen.arc(this.scale("x")(x[this.at.index]), this.scale("y")(y[this.at.index]), 8, 0, 2 * Math.PI);
      pen.stroke();
    }
    if (this.drag?.box) {
      const [x0, y0, x1, y1] = this.drag.box;
      pen.strokeStyle = pen.fillStyle = colour("accent");
      pen.lineWidth = 1;
      pen.globalAlpha = 0.15;
      pen.fillRect(x0, y0, x1 - x0, y1 - y0);
      pen.globalAlpha = 1;
      pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
  }

  listen() {
    const here = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    const on = (name, act) => this.canvas.addEventListener(name, act);
    on("pointerdown", (event) => {
      if (event.button !== 0 || !this.view) return;
      this.canvas.setPointerCapture(event.pointerId);
      this.drag = { from: here(event), view: structuredClone(this.view), box: null };
    });
    on("pointermove", (event) => (this.drag ? this.pull(...here(event)) : this.seek(...here(event))));
    on("pointerup", (event) => this.drop(...here(event)));
    on("pointercancel", () => { this.drag = null; this.draw(); });
    on("pointerleave", (event) => { if (!this.drag && event.pointerType === "mouse") this.point(null); });
    on("dblclick", () => this.reset());
    on("blur", () => this.point(null));
    on("keydown", (event) => { if (!event.ctrlKey && !event.metaKey && !event.altKey && this.key(event.key)) event.preventDefault(); });
  }

  pull(x, y) {
    const { left, right, top, bottom } = this.frame();
    const [x0, y0] = this.drag.from;
    if (this.zooms) {
      const within = (value, low, high) => Math.max(low, Math.min(high, value));
      this.drag.box = [within(x0, left, right), within(y0, top, bottom), within(x, left, right), within(y, top, bottom)];
    } else {
      for (const [axis, share] of [["x", (x0 - x) / (right - left)], ["y", (y - y0) / (bottom - top)]]) {
        const [low, high] = this.drag.view[axis];
        this.view[axis] = [low + share * (high - low), high + share * (high - low)];
      }
    }
    this.point(null);
  }

  // A box too thin to be meant in one direction zooms in the other alone; a tap speaks of the point below it.
  drop(x, y) {
    if (!this.drag) return;
    const { box, from } = this.drag;
    this.drag = null;
    if (box) {
      const { left, right, top, bottom } = this.frame();
      const [x0, y0, x1, y1] = box;
      if (Math.abs(x1 - x0) > 8) this.cut("x", (Math.min(x0, x1) - left) / (right - left), (Math.max(x0, x1) - left) / (right - left));
      if (Math.abs(y1 - y0) > 8) this.cut("y", (bottom - Math.max(y0, y1)) / (bottom - top), (bottom - Math.min(y0, y1)) / (bottom - top));
    }
    this.draw();
    if (Math.hypot(x - from[0], y - from[1]) < 4) this.seek(x, y);
  }

  // Looks at this part of what one looks at; never closer than numbers can tell apart.
  cut(axis, from, to) {
    const [low, high] = this.view[axis];
    const size = (high - low) * (to - from);
    if (size > Math.max(Math.abs(low), Math.abs(high)) * 1e-12) this.view[axis] = [low + (high - low) * from, low + (high - low) * from + size];
  }

  // The points within a few pixels of the nearest one, and that one first.
  near(x, y) {
    const [toX, toY] = [this.scale("x"), this.scale("y")];
    const found = [];
    for (const line of this.lines) {
      for (let i = 0; i < line.x.length; i += 1) {
        const far = Math.hypot(toX(line.x[i]) - x, toY(line.y[i]) - y);
        if (far < 12) found.push({ line, index: i, far });
      }
    }
    found.sort((a, b) => a.far - b.far);
    return found.filter(({ far }) => far < found[0].far + 3);
  }

  seek(x, y) {
    if (!this.view) return;
    const [at = null, ...others] = this.near(x, y);
    if (at?.line !== this.at?.line || at?.index !== this.at?.index) this.point(at, others);
  }

  // Speaks of a point, or of none.
  point(at, others = []) {
    this.at = at;
    this.tip.hidden = !at;
    this.draw();
    if (!at) return;
    const said = [at, ...others.slice(0, 2)].flatMap((point) => this.words(point.line, point.index));
    if (others.length > 2) said.push(`and ${others.length - 2} more here`);
    this.tip.replaceChildren(...said.map((text) => Object.assign(document.createElement("div"), { textContent: text })));
    const [x, y] = [this.scale("x")(at.line.x[at.index]), this.scale("y")(at.line.y[at.index])];
    this.tip.style.left = `${Math.max(0, x + 16 + this.tip.offsetWidth > this.width ? x - 16 - this.tip.offsetWidth : x + 16)}px`;
    this.tip.style.top = `${this.canvas.offsetTop + Math.max(0, y - this.tip.offsetHeight / 2)}px`;
  }

  key(name) {
    if (name === "+" || name === "=" || name === "-" || name === "−") {
      const wide = name === "-" || name === "−";
      for (const axis of ["x", "y"]) this.cut(axis, wide ? -0.5 : 0.25, wide ? 1.5 : 0.75);
      this.draw();
    } else if (name === "0") {
      this.reset();
    } else if (name === "Escape") {
      this.point(null);
    } else {
      return this.walk(name);
    }
    return true;
  }

  // From run to run, or to the run of another line that is nearest in x.
  walk(name) {
    const lines = this.lines.filter((line) => line.x.length);
    const way = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1, Home: 0, End: 0 }[name];
    if (way === undefined || !lines.length) return false;
    let { line, index } = this.at ?? { line: lines[0], index: lines[0].x.length };
    if (name === "ArrowUp" || name === "ArrowDown") {
      const x = line.x[Math.min(index, line.x.length - 1)];
      line = lines[(lines.indexOf(line) + way + lines.length) % lines.length];
      index = line.x.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(line.x[best] - x) ? i : best), 0);
    } else {
      index = name === "Home" ? 0 : name === "End" ? line.x.length - 1 : Math.max(0, Math.min(line.x.length - 1, index + way));
    }
    for (const axis of ["x", "y"]) this.reveal(axis, line[axis][index]);
    this.point({ line, index });
    return true;
  }

  // Moves as far as a point needs to be seen.
  reveal(axis, value) {
    const [low, high] = this.view[axis];
    const place = this.place(axis, value);
    const shift = Math.min(0, place - low) + Math.max(0, place - high);
    if (shift) this.view[axis] = [low + shift + (Math.sign(shift) * (high - low)) / 10, high + shift + (Math.sign(shift) * (high - low)) / 10];
  }
}
