// The image with what lies over it: the grid, the boxes and maps of looks, and the region a person marks: in cells of
// the model's grid, or, where answers are collected, in cells of one pixel.

const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

// An element of HTML: el("p", {class: "soft", onclick: f}, "text", child). Text goes in as text, never as markup.
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

function shape(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// [x, y, width, height] in pixels of a box (its right and lower edge exclusive), and of cells (both ends inclusive).
const ofBox = ([x1, y1, x2, y2]) => [x1, y1, x2 - x1, y2 - y1];
// Cells count in a frame, a box: the whole image, or the view before where regions nest.
const whole = ({ width, height }) => [0, 0, width, height];
const ofCells = ([x0, y0, x1, y1], [left, top, right, bottom], [across, down]) => ofBox([x0, y0, x1 + 1, y1 + 1]
  .map((at, i) => (i % 2 ? top + Math.floor((at * (bottom - top)) / down) : left + Math.floor((at * (right - left)) / across))));
export const nests = ({ frame }, size) => frame != null && frame.some((at, i) => at !== whole(size)[i]);
const rect = (kind, [x, y, width, height]) => shape("rect", { class: kind, x, y, width, height });

function gridPath([left, top, right, bottom], grid) {
  const lines = [], [across, down] = [(right - left) / grid, (bottom - top) / grid];
  for (let i = 0; i <= grid; i++) lines.push(`M${left + i * across} ${top}V${bottom}M${left} ${top + i * down}H${right}`);
  return shape("path", { class: "grid", d: lines.join("") });
}

// The path of all that lies in none of the boxes, which may lie in one another.
function outside({ width, height }, boxes) {
  const [xs, ys] = [width, height].map((end, axis) => [...new Set([0, end, ...boxes.flatMap((box) => [box[axis], box[axis + 2]])])]
    .sort((a, b) => a - b));
  const pieces = xs.slice(1).flatMap((right, i) => ys.slice(1).map((bottom, j) => [xs[i], ys[j], right, bottom]));
  const lit = ([left, top, right, bottom]) => boxes.some(([x1, y1, x2, y2]) => x1 <= left && y1 <= top && x2 >= right && y2 >= bottom);
  return pieces.filter((each) => !lit(each)).map(([x1, y1, x2, y2]) => `M${x1} ${y1}H${x2}V${y2}H${x1}Z`).join("");
}

// Draws what `looks` saw over an image of `size`: a region's box lit up in its grid, a re-encoding's map as heat.
// `marked` counts in `counts` cells across and down.
export function overlay(svg, size, grid, looks, marked = null, counts = [grid, grid]) {
  const { width, height } = size;
  const seen = looks.filter((look) => look.box && !look.problem);
  const boxes = seen.filter((look) => look.kind === "region");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const parts = [];
  for (const look of seen.filter((each) => each.map)) {
    const [x, y, w, h] = ofBox(look.box);
    parts.push(shape("image", { class: "heat", href: look.map, x, y, width: w, height: h, preserveAspectRatio: "none" }));
  }
  if (boxes.length) parts.push(shape("path", { class: "dim", d: outside(size, boxes.map(({ box }) => box)) }));
  if (boxes.length || (marked && counts[0] === grid)) parts.push(gridPath(whole(size), grid));
  parts.push(...boxes.filter((look) => nests(look, size)).map(({ frame }) => gridPath(frame, grid)));
  for (const { cells, box, frame } of boxes) {
    if (cells) parts.push(rect("cells", ofCells(cells, frame ?? whole(size), [grid, grid])));
    parts.push(rect("halo", ofBox(box)), rect("box", ofBox(box)));
  }
  if (marked) parts.push(...["mark-halo", "mark"].map((kind) => rect(kind, ofCells(marked, whole(size), counts))));
  svg.replaceChildren(...parts);
}

// "columns 1–14, row 10"
export function named([x0, y0, x1, y1]) {
  const span = (word, a, b) => (a === b ? `${word} ${a}` : `${word}s ${a}–${b}`);
  return `${span("column", x0, x1)}, ${span("row", y0, y1)}`;
}

export const touch = () => matchMedia("(pointer: coarse)").matches;
export const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// The large image. `changed(cells | null)` is called when the marked region changes.
export class Stage {
  constructor(changed) {
    Object.assign(this, { changed, image: null, looks: [], caption: "", region: null, grid: 8, takes: false, pixels: false });
    this.inputs = [...$("region").querySelectorAll("input")];
    $("mark").addEventListener("click", () => this.marking(!this.open));
    for (const input of this.inputs) input.addEventListener("input", () => this.typed());
    this.pointers();
    $("frame").addEventListener("keydown", (event) => this.key(event));
  }

  setModel({ grid, looks, collects = false }) {
    Object.assign(this, { grid, takes: looks.includes("region"), pixels: collects });
    $("marking").hidden = !this.marks;
    $("frame").tabIndex = this.marks ? 0 : -1;
    if (collects) $("region").firstElementChild.textContent = "Pixels of the image, both ends included";
  }

  get marks() { return this.takes || this.pixels; }

  // How many cells a region counts in, across and down.
  get counts() { return this.pixels ? [this.image.width, this.image.height] : [this.grid, this.grid]; }

  // The marked region in cells of the model's grid; null where there is none, or the model looks at no regions.
  get cells() {
    if (!this.region || !this.takes) return null;
    return this.region.map((at, i) => (this.pixels ? Math.floor(((at + 1) * this.grid - 1) / this.counts[i % 2]) : at));
  }

  // In words.
  named(region) { return (this.pixels ? `pixels ${region[0]}–${region[2]} across, ${region[1]}–${region[3]} down` : named(region)); }

  openImage(image) {
    this.image = image;
    $("picture").src = image.shown;
    $("picture").alt = image.alt;
    this.inputs.forEach((input, i) => { input.max = this.counts[i % 2] - 1; });
    this.marking(false);
    this.mark(null);
    this.show([], "");
  }

  show(looks, caption) {
    Object.assign(this, { looks, caption });
    this.draw();
  }

  draw() {
    if (this.image) overlay($("overlay"), this.image, this.grid, this.region ? [] : this.looks, this.region, this.counts);
    $("caption").textContent = this.region ? `Marked: ${this.named(this.region)}` : this.caption;
  }

  get open() { return $("mark").getAttribute("aria-expanded") === "true"; }

  marking(open) {
    $("mark").setAttribute("aria-expanded", open);
    $("mark").textContent = open ? "Done" : this.pixels ? "Mark the right box" : "Mark a region";
    $("region").hidden = !open;
    document.body.classList.toggle("marking", open); // on a phone the image grows, and dragging marks
  }

  mark(cells) {
    this.region = cells;
    this.inputs.forEach((input, i) => { if (document.activeElement !== input) input.value = cells ? cells[i] : ""; });
    this.draw();
    this.changed(cells);
  }

  typed() {
    const cells = this.inputs.map((input) => input.valueAsNumber);
    const fits = cells.every((v) => Number.isInteger(v) && v >= 0) && cells.every((v, i) => v < this.counts[i % 2]);
    if (fits && cells[0] <= cells[2] && cells[1] <= cells[3]) this.mark(cells);
    else if (this.region) this.mark(null);
  }

  // Where the image is on the screen, without the bars beside a very tall one.
  area() {
    const around = $("picture").getBoundingClientRect(), { width, height } = this.image;
    const scale = Math.min(around.width / width, around.height / height);
    return { scale, left: around.left + (around.width - width * scale) / 2, top: around.top + (around.height - height * scale) / 2 };
  }

  place(box) {
    const { scale, left, top } = this.area(), [x, y, width, height] = ofBox(box).map((pixels) => pixels * scale);
    return { left: left + x, top: top + y, width, height };
  }

  cellAt(event) {
    const { scale, left, top } = this.area(), { width, height } = this.image;
    return [(event.clientX - left) / width, (event.clientY - top) / height]
      .map((at, i) => Math.min(Math.max(Math.floor((at / scale) * this.counts[i]), 0), this.counts[i] - 1));
  }

  pointers() {
    let from = null, begun = false, start = null;
    const frame = $("frame");
    frame.addEventListener("pointerdown", (event) => {
      if (!this.marks || event.button !== 0 || (event.pointerType === "touch" && !this.open)) return;
      [from, begun, start] = [this.cellAt(event), this.open, [event.clientX, event.clientY]];
      frame.setPointerCapture(event.pointerId);
      if (begun) this.mark([...from, ...from]);
    });
    frame.addEventListener("pointermove", (event) => {
      if (!from) return;
      begun ||= Math.hypot(event.clientX - start[0], event.clientY - start[1]) > 5;
      const [x, y] = this.cellAt(event);
      if (begun) this.mark([Math.min(x, from[0]), Math.min(y, from[1]), Math.max(x, from[0]), Math.max(y, from[1])]);
    });
    for (const end of ["pointerup", "pointercancel"]) frame.addEventListener(end, () => { from = null; });
  }

  key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Escape" && this.region) return this.mark(null);
    if (!step || !this.marks || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const [right, bottom] = this.counts.map((count) => count - 1), [x, y] = this.counts.map((count) => Math.floor(count / 3));
    if (!this.region) return this.mark([x, y, right - x, bottom - y]);
    const [x0, y0, x1, y1] = this.region;
    step.forEach((way, i) => { step[i] = way * Math.max(1, Math.round(this.counts[i] / 64)); });
    const within = (value, low, high) => Math.min(Math.max(value, low), high);
    if (event.shiftKey) return this.mark([x0, y0, within(x1 + step[0], x0, right), within(y1 + step[1], y0, bottom)]);
    const dx = within(step[0], -x0, right - x1), dy = within(step[1], -y0, bottom - y1);
    this.mark([x0 + dx, y0 + dy, x1 + dx, y1 + dy]);
  }
}
