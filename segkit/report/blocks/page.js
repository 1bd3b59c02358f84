"use strict";

const svgElement = (name, attributes, text) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
};

const htmlElement = (name, properties, ...children) => {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
};

const shortNumber = (value) => {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1);
  return String(Number(value.toPrecision(size >= 1000 ? 6 : 4)));
};

/** Round values that divide a range into about `count` parts. */
const ticks = (low, high, count) => {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found;
};

const logTicks = (low, high) => {
  const found = [];
  for (let n = Math.floor(Math.log10(low)); n <= Math.log10(high); n++) {
    found.push(...[1, 2, 5].map((m) => m * 10 ** n).filter((v) => v >= low && v <= high));
  }
  const decades = found.filter((v) => Number.isInteger(Math.log10(v)));
  return found.length > 6 && decades.length > 1 ? decades : found;
};

/** Where in ascending `values` the one nearest to `place` stands. */
const nearest = (values, place) => {
  let [low, high] = [0, values.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] <= place) low = middle;
    else high = middle;
  }
  return place - values[low] <= values[high] - place ? low : high;
};

/** Moving average whose memory is a thirtieth of the curve. */
const smoothed = (values) => {
  const keep = 1 - 1 / Math.max(1, values.length / 30);
  let mean = 0;
  let weight = 0;
  return values.map((value) => {
    mean = keep * mean + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return mean / weight;
  });
};

/** A chart: drawn anew at each width; pointer or arrow keys show the values at a place. */
const drawChart = (figure) => {
  const { x: unit, kind, log, smooth, series } = JSON.parse(figure.querySelector("script").textContent);
  const title = figure.querySelector("figcaption").textContent;
  const readout = htmlElement("div", { className: "readout" });
  const svg = svgElement("svg", { tabindex: 0, role: "img" });
  figure.append(readout, svg);
  const shown = series.filter((one) => one.x.length);
  const colors = series.map((one, i) => `var(--s${(one.color ?? i) % 8})`);
  const colorOf = (one) => colors[series.indexOf(one)];
  const places = [...new Set(shown.flatMap((one) => one.x))].sort((a, b) => a - b);
  const values = shown.flatMap((one) => one.y).filter((v) => Number.isFinite(v) && (!log || v > 0));
  let [low, high] = [values, values].map((v, i) => v.reduce((a, b) => (i ? Math.max(a, b) : Math.min(a, b)), v[0]));
  if (!log) {
    if (low > 0 && low < high * 0.5) low = 0;
    if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  } else if (low === high) [low, high] = [low / 2, high * 2];
  const alone = places.length === 1 ? 1 : 0;
  const [first, last] = [places[0] - alone, places.at(-1) + alone];
  let cursor = null;
  let scaleX = () => 0;

  const read = (place) => {
    cursor = place;
    const at = place === null ? [] : [htmlElement("span", {}, `${unit} `, htmlElement("b", { textContent: shortNumber(place) }))];
    readout.replaceChildren(...at, ...shown.map((one) => {
      const index = place === null ? one.x.length - 1 : nearest(one.x, place);
      const dot = htmlElement("i", {});
      dot.style.background = colorOf(one);
      return htmlElement("span", {}, dot, `${one.name} `, htmlElement("b", { textContent: shortNumber(one.y[index]) }));
    }));
    svg.setAttribute("aria-label", `${title}. ${readout.textContent}. Left and right arrows read values.`);
    const line = svg.querySelector(".cursor");
    if (!line) return;
    line.style.display = place === null ? "none" : "";
    if (place !== null) for (const end of ["x1", "x2"]) line.setAttribute(end, scaleX(place));
  };

  const draw = () => {
    const [width, height, left, bottom, top] = [svg.clientWidth || 400, 220, 46, 24, 10];
    const right = width - 8;
    scaleX = (v) => left + ((v - first) / (last - first)) * (right - left);
    const f = log ? Math.log : (v) => v;
    const scaleY = (v) => top + (1 - (f(v) - f(low)) / (f(high) - f(low))) * (height - top - bottom);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    for (const v of log ? logTicks(low, high) : ticks(low, high, 4)) {
      svg.append(
        svgElement("line", { class: "rule", x1: left, x2: right, y1: scaleY(v), y2: scaleY(v) }),
        svgElement("text", { x: left - 6, y: scaleY(v) + 4, "text-anchor": "end" }, shortNumber(v)),
      );
    }
    for (const v of ticks(first, last, Math.max(2, width / 110))) {
      svg.append(svgElement("text", { x: scaleX(v), y: height - 6, "text-anchor": "middle" }, shortNumber(v)));
    }
    for (const one of shown) {
      const path = (ys) => one.x.map((x, i) => `${i ? "L" : "M"}${scaleX(x).toFixed(1)} ${scaleY(Math.max(ys[i], log ? low : -Infinity)).toFixed(1)}`).join("");
      const style = `stroke:${colorOf(one)}`;
      const soft = smooth && one.x.length > 30;
      if (kind === "area") {
        const foot = `L${scaleX(one.x.at(-1))} ${scaleY(low)}L${scaleX(one.x[0])} ${scaleY(low)}Z`;
        svg.append(svgElement("path", { d: path(one.y) + foot, style: `fill:${colorOf(one)};opacity:.15` }));
      }
      svg.append(svgElement("path", { class: soft ? "curve raw" : "curve", d: path(one.y), style, "data-points": one.x.length }));
      if (soft) svg.append(svgElement("path", { class: "curve", d: path(smoothed(one.y)), style }));
      if (kind === "dots" || one.x.length === 1) {
        one.x.forEach((x, i) => svg.append(svgElement("circle", { cx: scaleX(x), cy: scaleY(one.y[i]), r: 3, style: `fill:${colorOf(one)}` })));
      }
    }
    svg.append(svgElement("line", { class: "cursor", y1: top, y2: height - bottom }));
    read(cursor);
  };

  const follow = (event) => {
    const box = svg.getBoundingClientRect();
    const share = (event.clientX - box.left - 46) / (box.width - 54);
    read(places[nearest(places, first + share * (last - first))]);
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", () => read(null));
  svg.addEventListener("blur", () => read(null));
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    const stride = Number.isFinite(move) ? move * Math.max(1, Math.round(places.length / 60)) : move;
    const now = cursor === null ? places.length : places.indexOf(cursor);
    read(places[Math.min(places.length - 1, Math.max(0, now + stride))]);
  });
  new ResizeObserver(draw).observe(svg);
  draw();
};

/** Rows in the order of a column; a second click turns the order round. */
const sortable = (table) => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const turn = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", turn > 0 ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => {
        const [one, two] = [key(a), key(b)];
        const difference = one - two;
        return turn * (Number.isNaN(difference) ? String(one).localeCompare(two) : difference);
      });
      body.append(...rows);
    });
  });
};

document.querySelectorAll(".chart").forEach(drawChart);
document.querySelectorAll("table.sortable").forEach(sortable);
