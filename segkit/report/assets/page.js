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
  const list = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) list.push(n * step);
  return list;
};

const logTicks = (low, high) => {
  const list = [];
  for (let n = Math.floor(Math.log10(low)); n <= Math.log10(high); n++) {
    list.push(...[1, 2, 5].map((m) => m * 10 ** n).filter((v) => v >= low && v <= high));
  }
  const decades = list.filter((v) => Number.isInteger(Math.log10(v)));
  return list.length > 6 && decades.length > 1 ? decades : list;
};

/** Index of the value nearest to `place` in ascending `values`. */
const nearest = (values, place) => {
  let [low, high] = [0, values.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] <= place) low = middle;
    else high = middle;
  }
  return place - values[low] <= values[high] - place ? low : high;
};

/** Exponential moving average over about a thirtieth of the curve. */
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

/** Width of a chart's vertical axis, in pixels. */
const LEFT = 70;

/**
 * Draw a chart, again after each resize; pointer or arrow keys read its values.
 *
 * Its JSON has the keys
 *   series: curves, { name, x, y, color }; color is an index, by default that of the curve
 *   choices: in place of series, a list of series for each name in a menu
 *   unit, value: names of the horizontal and of the vertical axis
 *   kind: "line", "dots" (a line with its points), "area", or "log" (a line, on a logarithmic axis
 *     if its values span more than a power of ten)
 *   smooth: true to draw a moving average over the points
 */
const drawChart = (figure) => {
  const content = JSON.parse(figure.querySelector("script").textContent);
  const { choices, unit = "step", value = "", kind = "line", smooth = false } = content;
  let menu = figure.querySelector("select");
  if (choices && !menu) {
    menu = htmlElement("select", { ariaLabel: "Curve" });
    menu.append(...Object.keys(choices).map((name) => new Option(name)));
    menu.addEventListener("change", () => {
      figure.querySelectorAll(".readout, svg").forEach((item) => item.remove());
      drawChart(figure);
    });
    figure.querySelector("figcaption").after(menu);
  }
  const series = choices ? choices[menu.value] : content.series;
  const title = figure.querySelector("figcaption").textContent;
  const readout = htmlElement("div", { className: "readout" });
  const svg = svgElement("svg", { tabindex: 0, role: "img" });
  figure.append(readout, svg);
  const shown = series.filter((curve) => curve.x.length);
  const colors = series.map((curve, i) => `var(--s${(curve.color ?? i) % 8})`);
  const colorOf = (curve) => colors[series.indexOf(curve)];
  const places = [...new Set(shown.flatMap((curve) => curve.x))].sort((a, b) => a - b);
  const values = shown.flatMap((curve) => curve.y);
  let [low, high] = [values, values].map((v, i) => v.reduce((a, b) => (i ? Math.max(a, b) : Math.min(a, b)), v[0]));
  const log = kind === "log" && low > 0 && high > 10 * low;
  if (!log) {
    if (low > 0 && low < high * 0.5) low = 0;
    if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  }
  const alone = places.length === 1 ? 1 : 0;
  const [first, last] = [places[0] - alone, places.at(-1) + alone];
  let cursor = null;
  let scaleX = () => 0;

  const read = (place) => {
    cursor = place;
    const at = place === null ? [] : [htmlElement("span", {}, `${unit} `, htmlElement("b", { textContent: shortNumber(place) }))];
    readout.replaceChildren(...at, ...shown.map((curve) => {
      const index = place === null ? curve.x.length - 1 : nearest(curve.x, place);
      const dot = htmlElement("i", {});
      dot.style.background = colorOf(curve);
      return htmlElement("span", {}, dot, `${curve.name} `, htmlElement("b", { textContent: shortNumber(curve.y[index]) }));
    }));
    svg.setAttribute("aria-label", `${title}. ${readout.textContent}. Left and right arrows read values.`);
    const line = svg.querySelector(".cursor");
    if (!line) return;
    line.style.display = place === null ? "none" : "";
    if (place !== null) for (const end of ["x1", "x2"]) line.setAttribute(end, scaleX(place));
  };

  const draw = () => {
    const [width, height, left, bottom, top] = [svg.clientWidth || 400, 230, LEFT, 40, 10];
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
      const anchor = scaleX(v) > right - 16 ? "end" : "middle";
      svg.append(svgElement("text", { x: Math.min(scaleX(v), right), y: height - 22, "text-anchor": anchor }, shortNumber(v)));
    }
    const middle = (height - bottom + top) / 2;
    svg.append(
      svgElement("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, unit),
      svgElement("text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, value),
    );
    for (const curve of shown) {
      const path = (ys) => curve.x.map((x, i) => `${i ? "L" : "M"}${scaleX(x).toFixed(1)} ${scaleY(ys[i]).toFixed(1)}`).join("");
      const style = `stroke:${colorOf(curve)}`;
      const soft = smooth && curve.x.length > 30;
      if (kind === "area") {
        const foot = `L${scaleX(curve.x.at(-1))} ${scaleY(low)}L${scaleX(curve.x[0])} ${scaleY(low)}Z`;
        svg.append(svgElement("path", { d: path(curve.y) + foot, style: `fill:${colorOf(curve)};opacity:.15` }));
      }
      svg.append(svgElement("path", { class: soft ? "curve raw" : "curve", d: path(curve.y), style, "data-points": curve.x.length }));
      if (soft) svg.append(svgElement("path", { class: "curve", d: path(smoothed(curve.y)), style }));
      if (kind === "dots" || curve.x.length === 1) {
        curve.x.forEach((x, i) => svg.append(svgElement("circle", { cx: scaleX(x), cy: scaleY(curve.y[i]), r: 3, style: `fill:${colorOf(curve)}` })));
      }
    }
    svg.append(svgElement("line", { class: "cursor", y1: top, y2: height - bottom }));
    read(cursor);
  };

  const follow = (event) => {
    const box = svg.getBoundingClientRect();
    const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - 8);
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

/**
 * Draw a square table of shares; larger shares have stronger colors.
 *
 * Its JSON has the keys
 *   names: names of the rows and of the columns
 *   shares: rows of shares, 0 to 1; null leaves a cell empty
 *   corner: heading of the first column
 *   diagonal: true to color cells off the diagonal as errors
 */
const drawHeatMap = (figure) => {
  const content = JSON.parse(figure.querySelector("script").textContent);
  const { names, shares, corner, diagonal = false } = content;
  const dense = names.length > 20; // values are in tooltips and for screen readers only
  const table = htmlElement("table", { className: dense ? "matrix dense" : "matrix" });
  const head = table.createTHead().insertRow();
  head.append(...[corner, ...names].map((name) => htmlElement("th", { scope: "col" }, name)));
  const body = table.createTBody();
  shares.forEach((line, i) => {
    const row = body.insertRow();
    row.append(htmlElement("th", { scope: "row" }, names[i]));
    line.forEach((share, j) => {
      const cell = row.insertCell();
      if (share === null) return;
      cell.className = diagonal && i !== j ? "heat wrong" : "heat";
      // The square root makes rare confusions visible.
      cell.style.setProperty("--heat", `${Math.round(100 * Math.sqrt(share))}%`);
      cell.title = `${names[i]} → ${names[j]}: ${(100 * share).toFixed(2)} %`;
      const text = share >= 0.005 ? (100 * share).toFixed(0) : "";
      cell.append(dense && text ? htmlElement("span", { className: "unseen" }, text) : text);
    });
  });
  const properties = { className: "scroll", tabIndex: 0, role: "group", ariaLabel: "Table" };
  figure.append(htmlElement("div", properties, table));
};

/** Sort rows by the clicked column; a second click reverses the order. */
const sortable = (table) => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const turn = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", turn > 0 ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => {
        const [first, second] = [key(a), key(b)];
        const difference = first - second;
        return turn * (Number.isNaN(difference) ? String(first).localeCompare(second) : difference);
      });
      body.append(...rows);
    });
  });
};

/** Show an element of a given aspect ratio in the whole window; wheel, keys, drag and pinch move it. */
const openViewer = (content, name, aspect, views = []) => {
  const button = (text, label, act) => {
    const made = htmlElement("button", { className: "plain", ariaLabel: label, title: label }, text);
    made.addEventListener("click", act);
    return made;
  };
  const dialog = htmlElement("dialog", { className: "viewer", ariaLabel: name });
  let [scale, x, y] = [1, 0, 0];
  const place = () => (content.style.transform = `translate(${x}px, ${y}px) scale(${scale})`);
  /** Zoom; the point at (left, top) of the window stays where it is. */
  const zoom = (by, left = innerWidth / 2, top = innerHeight / 2) => {
    const box = ground.getBoundingClientRect();
    const [u, v] = [left - box.left - box.width / 2, top - box.top - box.height / 2];
    const after = Math.min(40, Math.max(1, scale * by));
    [x, y] = after === 1 ? [0, 0] : [u - (u - x) * (after / scale), v - (v - y) * (after / scale)];
    scale = after;
    place();
  };
  const menu = htmlElement("select", { ariaLabel: "Content of the picture", hidden: !views.length });
  menu.append(...views.map((view) => new Option(view === "predicted" ? "prediction" : view, view)));
  const show = () => (dialog.dataset.view = menu.value);
  menu.addEventListener("change", show);
  const ground = htmlElement("div", { className: "ground" }, content);
  const bar = htmlElement(
    "div", { className: "bar-of-viewer" }, htmlElement("span", {}, name), menu,
    button("+", "Zoom in", () => zoom(1.5)), button("−", "Zoom out", () => zoom(1 / 1.5)),
    button("Close", "Close", () => dialog.close()),
  );
  dialog.append(bar, ground);
  content.style.aspectRatio = aspect;
  content.style.width = `min(100%, calc((100dvh - 4rem) * ${aspect}))`;
  const pointers = new Map();
  ground.addEventListener("pointerdown", (event) => {
    ground.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, event);
  });
  ground.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const other = [...pointers.values()].find((pointer) => pointer.pointerId !== event.pointerId);
    const distance = (pointer) => Math.hypot(pointer.clientX - other.clientX, pointer.clientY - other.clientY);
    x += (event.clientX - before.clientX) / pointers.size;
    y += (event.clientY - before.clientY) / pointers.size;
    if (other) zoom(distance(event) / Math.max(1, distance(before)), other.clientX, other.clientY);
    pointers.set(event.pointerId, event);
    place();
  });
  for (const end of ["pointerup", "pointercancel"]) ground.addEventListener(end, (event) => pointers.delete(event.pointerId));
  ground.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), event.clientX, event.clientY);
  }, { passive: false });
  dialog.addEventListener("keydown", (event) => {
    if (event.target === menu) return;
    if (event.key === "+" || event.key === "-") zoom(event.key === "+" ? 1.5 : 1 / 1.5);
    const [right, down] = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[event.key] ?? [0, 0];
    [x, y] = [x + right, y + down];
    place();
  });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  if (views.length) show();
  dialog.showModal();
};

/** Open a picture in the viewer by a click or the Enter key. */
const openable = (image) => {
  Object.assign(image, { tabIndex: 0, role: "button" });
  const open = () => openViewer(image.cloneNode(), image.alt, image.naturalWidth / image.naturalHeight);
  image.addEventListener("click", open);
  image.addEventListener("keydown", (event) => event.key === "Enter" && open());
};

document.querySelectorAll(".tiles img, .strip img, .sheet img").forEach(openable);
document.querySelectorAll(".chart").forEach(drawChart);
document.querySelectorAll(".heat-map").forEach(drawHeatMap);
document.querySelectorAll("table.sortable").forEach(sortable);

/** Number of pictures shown until the button for all is clicked, and of classes named below each. */
const [FEW, MAX_CHIPS] = [8, 4];

/** A class name after a square of its color. */
const classLabel = (name, color) => {
  const square = htmlElement("i", { className: "swatch" });
  square.style.background = `rgb(${color})`;
  return [square, name];
};

/** A picture with its layers, a slider and a caption. */
const makeCard = (picture, { classes, colors }) => {
  const { name, miou, iou, fold, worst, size } = picture;
  const layers = ["photograph", "truth", "predicted", "errors"].map((layer) =>
    htmlElement("img", { className: layer, src: picture[layer], alt: "" }));
  const slider = htmlElement("input", {
    type: "range", min: 0, max: 100, value: 50,
    ariaLabel: `${name}: truth to the left, prediction to the right`,
  });
  const stage = htmlElement("div", { className: "stage" }, ...layers, slider);
  stage.style.aspectRatio = size.join("/");
  const ranked = Object.entries(iou).sort(([, a], [, b]) => a - b);
  const chips = ranked.slice(0, MAX_CHIPS).map(([c, value]) =>
    htmlElement("li", {}, ...classLabel(classes[c], colors[c]), " ", htmlElement("b", {}, value.toFixed(2))));
  const more = ranked.length - chips.length;
  if (more > 0) chips.push(htmlElement("li", {}, `and ${more} more`));
  const open = htmlElement("button", { className: "plain open", ariaLabel: `${name} in full size`, title: "Full size" }, "⤢");
  open.addEventListener("click", () => {
    const whole = htmlElement("div", { className: "stage" }, ...layers.map((layer) => layer.cloneNode()));
    openViewer(whole, name, size[0] / size[1], ["truth", "predicted", "errors", "photograph"]);
  });
  const caption = htmlElement(
    "figcaption", {}, open,
    htmlElement("b", { className: "score" }, miou.toFixed(3)), ` ${name} `,
    htmlElement("span", { className: "muted" }, `fold ${fold}`),
    ...(worst ? [" ", htmlElement("span", { className: "mark" }, "most wrong")] : []),
    htmlElement("ul", { className: "chips" }, ...chips),
  );
  const panels = htmlElement("div", { className: "panels" }, stage);
  return htmlElement("figure", { className: "card" }, panels, caption);
};

/** Show the pictures and their controls: view, class and order. */
const openGallery = (gallery) => {
  const content = JSON.parse(gallery.querySelector("script").textContent);
  const { classes, colors, error, pictures } = content;
  const ofClass = document.getElementById("of-class");
  const order = document.getElementById("order");
  const more = document.getElementById("more");
  const cards = new Map();
  let all = false;
  classes.forEach((name, c) => ofClass.append(new Option(name, c)));
  document.getElementById("key").append(...[...classes, "an error"].map((name, c) =>
    htmlElement("li", {}, ...classLabel(name, colors[c] ?? error))));

  const arrange = () => {
    const c = ofClass.value;
    const value = (picture) => (c === "" ? picture.miou : picture.iou[c]);
    const rules = {
      worst: (a, b) => value(a) - value(b),
      best: (a, b) => value(b) - value(a),
      name: (a, b) => a.name.localeCompare(b.name),
    };
    const chosen = pictures.filter((picture) => value(picture) !== undefined).sort(rules[order.value]);
    const shown = chosen.slice(0, all ? chosen.length : FEW);
    for (const picture of shown) {
      if (!cards.has(picture)) cards.set(picture, makeCard(picture, content));
    }
    gallery.replaceChildren(...shown.map((picture) => cards.get(picture)));
    if (gallery.dataset.view === "all") layOut();
    document.getElementById("count").textContent = `${chosen.length} of ${pictures.length} pictures`;
    more.hidden = shown.length === chosen.length;
    more.textContent = `Show all ${chosen.length}`;
  };

  /** Add four panels per card, when they are shown for the first time. */
  const layOut = () => {
    for (const panels of gallery.querySelectorAll(".panels")) {
      if (panels.children.length > 1) continue;
      for (const layer of ["photograph", "truth", "prediction", "errors"]) {
        const panel = panels.firstElementChild.cloneNode(true);
        panel.lastElementChild.remove();
        panel.dataset.layer = layer;
        panels.append(panel);
      }
    }
  };

  for (const radio of document.querySelectorAll("[name=view]")) {
    radio.addEventListener("change", () => {
      gallery.dataset.view = radio.value;
      if (radio.value === "all") layOut();
    });
  }
  gallery.addEventListener("input", (event) => {
    event.target.parentElement.style.setProperty("--at", `${event.target.value}%`);
  });
  document.getElementById("strength").addEventListener("input", (event) => {
    gallery.style.setProperty("--strength", event.target.value / 100);
  });
  more.addEventListener("click", () => {
    all = true;
    arrange();
  });
  ofClass.addEventListener("change", arrange);
  order.addEventListener("change", arrange);
  arrange();
};

const gallery = document.getElementById("gallery");
if (gallery) openGallery(gallery);
