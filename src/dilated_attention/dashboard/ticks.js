"use strict";
// Where an axis has its ticks, and what they are called: pairs of a place and a text.

const SECOND = 1000, MINUTE = 60 * SECOND, HOUR = 60 * MINUTE, DAY = 24 * HOUR;
const TIME_STEPS = [1, 5, 15, 30].map((n) => n * SECOND).concat([1, 5, 15, 30].map((n) => n * MINUTE), [1, 3, 6, 12].map((n) => n * HOUR), [1, 2, 7, 14].map((n) => n * DAY));
const MONTH_STEPS = [1, 3, 6, 12, 24, 60, 120];

// At most about `room` round numbers from `low` to `high`, each with what it is called.
function numberTicks(low, high, room) {
  const rough = (high - low) / room;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough) ?? 10 * power;
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const written = (v) => (digits > 6 || Math.abs(v) >= 1e9 ? String(Number(v.toPrecision(6))) : v.toLocaleString("en", { maximumFractionDigits: digits }));
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high && ticks.length < 100; i += 1) ticks.push([i * step, written(i * step)]);
  return ticks;
}

function timeTicks(low, high, room) {
  const rough = (high - low) / room;
  const iso = (t) => new Date(t).toISOString();
  const step = TIME_STEPS.find((n) => n >= rough);
  const ticks = [];
  if (step) {
    const written = step < MINUTE ? (t) => iso(t).slice(11, 19) : step < DAY ? (t) => (t % DAY ? iso(t).slice(11, 16) : iso(t).slice(5, 10)) : (t) => iso(t).slice(0, 10);
    for (let t = Math.ceil(low / step) * step; t <= high; t += step) ticks.push([t, ticks.length || step >= DAY ? written(t) : iso(t).slice(5, step < MINUTE ? 19 : 16).replace("T", " ")]);
    return ticks;
  }
  const months = MONTH_STEPS.find((n) => n * 30 * DAY >= rough) ?? MONTH_STEPS.at(-1);
  const from = new Date(low), year = from.getUTCFullYear();
  for (let month = Math.floor(from.getUTCMonth() / months) * months, t; (t = Date.UTC(year, month, 1)) <= high; month += months) {
    if (t >= low) ticks.push([t, months < 12 ? iso(t).slice(0, 7) : iso(t).slice(0, 4)]);
  }
  return ticks;
}

// 1, 2 and 5 times the powers of ten; low and high are logarithms.
function powerTicks(low, high, written) {
  const digits = high - low > 5 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let power = Math.floor(low); power <= high; power += 1) {
    for (const digit of digits) ticks.push([Math.log10(digit) + power, written(digit * 10 ** power)]);
  }
  return ticks.filter(([place]) => place >= low && place <= high);
}
