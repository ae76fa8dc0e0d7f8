// One picture of a graph on a canvas: moving, scaling, drawing, and finding what is under the pointer.
//
// Everything outside the window is skipped, and what would be too small to read is left out: first the types, then the
// names, then the edges.

const MAP_WIDTH = 52;
const SCALES = [0.015, 3];

class Picture {
  // `on` are callbacks: select(number or null), unfold(section), fold(section), moved(picture) by the user.
  constructor(parent, label, on) {
    this.on = on;
    this.label = label;
    this.canvas = element("canvas", { tabindex: 0, role: "img" });
    this.map = element("canvas", { class: "map", "aria-hidden": true, width: MAP_WIDTH });
    this.caption = element("div", { class: "caption" });
    this.hint = element("div", { class: "hint", hidden: true });
    this.root = element("div", { class: "pane" }, this.canvas, this.map, this.caption, this.hint);
    parent.append(this.root);
    this.context = this.canvas.getContext("2d");
    this.layout = null;
    this.marks = new Map();
    this.found = new Set();
    this.selected = null;
    this.view = { x: 0, y: 0, k: 1 };
    this.size = { width: 0, height: 0 };
    this.scheduled = false;
    this.listen();
    new ResizeObserver(() => this.resize()).observe(this.root);
  }

  listen() {
    // Like other viewers of models: the wheel moves, with Ctrl (or a pinch on a touch pad) it scales.
    this.canvas.addEventListener("wheel", (event) => {
      if (event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      event.stopImmediatePropagation();
      const unit = event.deltaMode === 1 ? 24 : 1;
      const [dx, dy] = event.shiftKey && !event.deltaX ? [event.deltaY, 0] : [event.deltaX, event.deltaY];
      this.moveTo({ ...this.view, x: this.view.x - dx * unit, y: this.view.y - dy * unit });
      this.on.moved(this);
    }, { capture: true, passive: false });
    this.zoom = d3.behavior.zoom().scaleExtent(SCALES).on("zoom", () => {
      const [x, y] = this.zoom.translate();
      this.view = { x, y, k: this.zoom.scale() };
      this.redraw();
      this.on.moved(this);
    });
    d3.select(this.canvas).call(this.zoom).on("dblclick.zoom", null);
    this.canvas.addEventListener("click", (event) => {
      if (event.defaultPrevented) return;
      const hit = this.hit(event.offsetX, event.offsetY);
      if (hit?.fold) this.on.unfold(hit.fold);
      else if (hit?.band) this.on.fold(hit.band.section);
      else this.on.select(hit ? hit.number : null, this);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      const hit = event.buttons ? null : this.hit(event.offsetX, event.offsetY);
      this.canvas.style.cursor = hit ? "pointer" : "";
      this.showHint(hit?.op ? hit : null, event.offsetX, event.offsetY);
    });
    this.canvas.addEventListener("pointerleave", () => this.showHint(null));
    const jump = (event) => {
      if (!event.buttons || !this.layout) return;
      const y = event.offsetY / this.mapScale;
      this.moveTo({ ...this.view, y: this.size.height / 2 - y * this.view.k });
      this.on.moved(this);
    };
    this.map.addEventListener("pointerdown", (event) => {
      this.map.setPointerCapture(event.pointerId);
      jump(event);
    });
    this.map.addEventListener("pointermove", jump);
  }

  show(layout, marks) {
    this.layout = layout;
    this.marks = marks;
    this.refresh();
  }

  // Folds, marks, search results or colours are new.
  refresh() {
    this.mapIsOld = true;
    this.redraw();
  }

  resize() {
    const { width, height } = this.root.getBoundingClientRect();
    if (!width || !height) return;
    const first = !this.size.width;
    this.size = { width: width - MAP_WIDTH, height };
    const ratio = window.devicePixelRatio || 1;
    for (const [canvas, w] of [[this.canvas, this.size.width], [this.map, MAP_WIDTH]]) {
      canvas.width = Math.round(w * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.width = `${w}px`;
      canvas.style.height = `${height}px`;
    }
    this.zoom.size([this.size.width, height]);
    this.mapIsOld = true;
    if (first) this.on.ready?.(this);
    this.draw();
  }

  // -- moving -----------------------------------------------------------------------------------------------------

  moveTo(view, animate = false) {
    const k = Math.min(SCALES[1], Math.max(SCALES[0], view.k));
    const from = this.view;
    this.zoom.translate([view.x, view.y]).scale(k);
    const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (animate && !still && this.size.width && !document.hidden) {
      this.canvas.__chart__ = { ...from }; // where d3 begins its flight
      d3.select(this.canvas).interrupt().transition().duration(400).call(this.zoom.event);
    } else {
      d3.select(this.canvas).interrupt().transition();
      this.view = { x: view.x, y: view.y, k };
      this.redraw();
    }
  }

  scaleBy(factor) {
    const { width, height } = this.size;
    const k = Math.min(SCALES[1], Math.max(SCALES[0], this.view.k * factor));
    const change = k / this.view.k;
    this.moveTo({
      k, x: width / 2 - (width / 2 - this.view.x) * change, y: height / 2 - (height / 2 - this.view.y) * change,
    }, true);
  }

  // The top of the graph, its whole width in the window when that can be read.
  fit(animate = false) {
    if (!this.layout) return;
    const { width, height } = this.size;
    const { left, right } = this.layout;
    const k = Math.min(1, Math.max(0.65, (width - 40) / (right - left)));
    const fits = this.layout.height * k < height - 96;
    const y = fits ? (height - this.layout.height * k) / 2 : 64;
    this.moveTo({ k, x: width / 2 - ((left + right) / 2) * k, y }, animate);
  }

  isVisible({ x, y }) {
    const { width, height } = this.size, { view } = this;
    const left = x * view.k + view.x, top = y * view.k + view.y;
    return left > 30 && left < width - 30 && top > 60 && top < height * 0.85;
  }

  centre(node, animate = true, scale = Math.max(this.view.k, 0.7)) {
    const { width, height } = this.size;
    this.moveTo({ k: scale, x: width / 2 - node.x * scale, y: height * 0.42 - node.y * scale }, animate);
  }

  // -- drawing ----------------------------------------------------------------------------------------------------

  redraw() {
    if (this.scheduled) return;
    this.scheduled = true;
    requestAnimationFrame(() => {
      this.scheduled = false;
      this.draw();
    });
  }

  draw() {
    const { context, size, layout, view } = this;
    if (!size.width || !layout) return;
    const ratio = window.devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, size.width, size.height);
    context.setTransform(ratio * view.k, 0, 0, ratio * view.k, ratio * view.x, ratio * view.y);
    const top = -view.y / view.k, bottom = (size.height - view.y) / view.k;
    const visible = layout.elements.filter((item) => item.bottom > top - 20 && item.top < bottom + 20);
    const ink = colours();
    this.drawBands(context, ink, top, bottom);
    if (view.k > 0.05) this.drawEdges(context, ink, visible, top, bottom);
    this.drawSelection(context, ink);
    for (const item of visible) {
      if (item.fold) this.drawFold(context, ink, item);
      else for (const node of item.stretch.members) this.drawNode(context, ink, node);
    }
    this.drawMap(ink, top, bottom);
  }

  drawBands(context, ink, top, bottom) {
    for (const band of this.layout.bands) {
      if (band.bottom < top || band.top > bottom || band.fold) continue;
      context.fillStyle = ink.band;
      rounded(context, band.left, band.top, band.right - band.left, band.bottom - band.top, 12);
      context.fill();
      if (this.view.k < 0.2) continue;
      context.fillStyle = ink.muted;
      context.font = FONT.note;
      context.textAlign = "left";
      context.textBaseline = "alphabetic";
      context.fillText(`block ${band.block + 1} of ${band.section.times}`, band.left + 12, band.top - 6);
    }
  }

  drawEdges(context, ink, visible, top, bottom) {
    context.lineWidth = Math.min(1.4, Math.max(0.8, 0.9 / this.view.k));
    context.strokeStyle = ink.edge;
    context.beginPath();
    for (const [x1, y1, x2, y2] of this.layout.links) {
      if (y2 < top || y1 > bottom) continue;
      context.moveTo(x1, y1);
      bend(context, x1, y1, x2, y2);
    }
    for (const item of visible) {
      if (item.stretch) for (const line of item.shape.lines) trace(context, line.segments, item.top);
    }
    context.stroke();
    if (this.view.k < 0.3) return;
    context.fillStyle = ink.edge;
    context.beginPath();
    for (const item of visible) {
      if (!item.stretch) continue;
      for (const { segments, hasArrow } of item.shape.lines) if (hasArrow) arrowHead(context, segments.at(-1)[0], segments.at(-1)[2] + item.top);
    }
    context.fill();
  }

  // The edges of the selected op: along their lines within a stretch, straight to wherever the other end is elsewhere.
  drawSelection(context, ink) {
    const node = this.selected !== null && this.layout.byNumber.get(this.selected);
    if (!node) return;
    context.lineWidth = Math.max(2, 1.4 / this.view.k);
    const item = this.layout.elements.find((one) => one.stretch?.members.includes(node));
    const place = item ? item.stretch.members.indexOf(node) : -1;
    for (const line of item?.shape.lines ?? []) {
      if (line.from === undefined || line.to === undefined || (line.from !== place && line.to !== place)) continue;
      context.strokeStyle = context.fillStyle = line.to === place ? ink.reads : ink.feeds;
      context.beginPath();
      trace(context, line.segments, item.top);
      context.stroke();
      context.beginPath();
      arrowHead(context, line.segments.at(-1)[0], line.segments.at(-1)[2] + item.top, 1.4);
      context.fill();
    }
    const { graph } = this.layout;
    const sources = (node.op?.operands ?? []).map(({ value }) => this.layout.nodeOf(value)).filter(Boolean);
    const results = node.op ? node.op.results.map((result) => result.number) : [node.number];
    const readers = results.flatMap((result) => graph.readers.get(result) ?? []).map((op) => this.layout.byNumber.get(op.number));
    for (const source of new Set(sources)) this.drawJump(context, source, node, item, ink.reads);
    for (const reader of new Set(readers)) this.drawJump(context, node, reader, item, ink.feeds);
  }

  drawJump(context, from, to, item, colour) {
    const isDrawn = item && item.stretch.members.includes(from) && item.stretch.members.includes(to);
    if (isDrawn || (from.fold && from.fold === to.fold)) return;
    const y1 = from.fold ? from.fold.bottom : from.y + from.height / 2;
    const y2 = to.fold ? to.fold.top : to.y - to.height / 2;
    context.strokeStyle = context.fillStyle = colour;
    context.setLineDash([6, 4]);
    context.beginPath();
    context.moveTo(from.x, y1);
    const sag = Math.max(24, Math.min(90, Math.abs(y2 - y1) / 2));
    context.bezierCurveTo(from.x, y1 + sag, to.x, y2 - sag, to.x, y2);
    context.stroke();
    context.setLineDash([]);
    context.beginPath();
    arrowHead(context, to.x, y2, 1.4);
    context.fill();
  }

  drawNode(context, ink, node) {
    const { k } = this.view;
    const { width, height } = node;
    const left = node.x - width / 2, top = node.y - height / 2;
    const family = ink.family(node.family);
    const mark = this.marks.get(node.number);
    if (k < 0.28) { // too small for words: colour is all there is
      context.fillStyle = mark ? ink[mark] : family.line;
      context.fillRect(left, top, width, height);
      this.drawHalo(context, ink, node, left, top, false);
      return;
    }
    const pill = node.kind !== "op";
    rounded(context, left, top, width, height, pill ? height / 2 : 7);
    context.fillStyle = family.fill;
    context.fill();
    if (mark) {
      context.fillStyle = ink.wash(mark);
      context.fill();
    }
    context.lineWidth = mark ? 2.2 : 1;
    context.strokeStyle = mark ? ink[mark] : family.edge;
    context.stroke();
    if (!pill) {
      context.fillStyle = family.line;
      rounded(context, left + 3.5, top + 5, 3.5, height - 10, 1.75);
      context.fill();
    }
    this.drawHalo(context, ink, node, left, top, pill);
    this.writeNode(context, ink, node, left, top, pill);
  }

  drawHalo(context, ink, node, left, top, pill) {
    const isSelected = node.number === this.selected && node.number >= 0;
    if (!isSelected && !this.found.has(node.number)) return;
    context.lineWidth = Math.max(isSelected ? 2.5 : 2, 1.5 / this.view.k);
    context.strokeStyle = isSelected ? ink.selected : ink.found;
    const out = 4;
    rounded(context, left - out, top - out, node.width + 2 * out, node.height + 2 * out, pill ? node.height : 10);
    context.stroke();
  }

  writeNode(context, ink, node, left, top, pill) {
    const { title, remark, type, weight, lines, width } = node;
    context.textBaseline = "middle";
    context.textAlign = pill ? "center" : "left";
    const x = pill ? node.x : left + NODE.padding + 4;
    const room = width - 2 * NODE.padding - 4;
    let y = lines === 1 ? node.y + 0.5 : top + 14.5;
    context.font = FONT.title;
    context.fillStyle = ink.text;
    context.fillText(title, x, y, room);
    if (this.view.k < 0.42) return;
    context.font = FONT.note;
    context.fillStyle = ink.muted;
    if (remark) context.fillText(remark, x + widthOf(FONT.title, title) + 6, y + 0.5);
    if (lines === 1) return;
    context.fillText(fitted(type, room, "end"), x, (y += 15));
    if (lines === 3) {
      context.fillStyle = ink.weight;
      context.fillText(fitted(`@${weight}`, room, "start"), x, y + 13.5);
    }
  }

  drawFold(context, ink, item) {
    const { left, right, top, bottom, fold, members } = item;
    const { k } = this.view;
    for (const step of [8, 4, 0]) {
      rounded(context, left + step, top + step, right - left - 2 * step, bottom - top - 2 * step + step, 12);
      context.fillStyle = step ? ink.band : ink.panel;
      context.fill();
      context.lineWidth = 1;
      context.strokeStyle = ink.border;
      context.stroke();
    }
    if (k < 0.2) return;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillStyle = ink.text;
    context.font = FONT.title;
    const more = fold.times - 1;
    context.fillText(`${more} more block${more > 1 ? "s" : ""} of ${text.count(fold.length)} ops`, 0, top + 27);
    const counts = { added: 0, removed: 0, changed: 0 };
    for (const node of members) if (this.marks.has(node.number)) counts[this.marks.get(node.number)]++;
    const parts = [["added", "+"], ["removed", "−"], ["changed", "~"]].filter(([mark]) => counts[mark]);
    context.font = FONT.note;
    if (members.some((node) => node.number === this.selected || this.found.has(node.number))) {
      context.lineWidth = 2;
      context.strokeStyle = ink.found;
      rounded(context, left - 4, top - 4, right - left + 8, bottom - top + 8, 14);
      context.stroke();
    }
    if (!parts.length) {
      context.fillStyle = ink.muted;
      context.fillText("equal to the one above: click to unfold", 0, top + 50);
      return;
    }
    context.fillStyle = ink.muted;
    context.fillText("click to unfold", 0, top + 66);
    const words = parts.map(([mark, sign]) => [mark, `${sign}${text.count(counts[mark])}`]);
    let x = -words.reduce((sum, [, word]) => sum + widthOf(FONT.note, word), 0) / 2 - 7 * (words.length - 1);
    context.textAlign = "left";
    for (const [mark, word] of words) {
      context.fillStyle = ink[mark];
      context.fillText(word, x, top + 47);
      x += widthOf(FONT.note, word) + 14;
    }
  }

  // -- the map at the side: the whole height, with the changes -------------------------------------------------------

  drawMap(ink, top, bottom) {
    const ratio = window.devicePixelRatio || 1;
    const { height } = this.size;
    if (this.mapIsOld) {
      this.mapIsOld = false;
      this.mapScale = Math.min(height / this.layout.height, 0.35);
      this.mapImage = document.createElement("canvas");
      this.mapImage.width = this.map.width;
      this.mapImage.height = this.map.height;
      this.paintMap(this.mapImage.getContext("2d"), ink, ratio);
    }
    const context = this.map.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.map.width, this.map.height);
    context.drawImage(this.mapImage, 0, 0);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const y = Math.max(0, top * this.mapScale);
    const extent = Math.min(height, bottom * this.mapScale) - y;
    context.fillStyle = ink.lens;
    context.strokeStyle = ink.selected;
    context.lineWidth = 1;
    rounded(context, 1.5, y + 0.5, MAP_WIDTH - 3, Math.max(6, extent - 1), 3);
    context.fill();
    context.stroke();
  }

  paintMap(context, ink, ratio) {
    const { layout, mapScale } = this;
    const wide = layout.right - layout.left || 1;
    const acrossScale = Math.min((MAP_WIDTH - 20) / wide, 0.2);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    for (const item of layout.elements) {
      if (!item.fold) continue;
      context.fillStyle = ink.border;
      context.fillRect(5, item.top * mapScale, MAP_WIDTH - 18, Math.max(2, (item.bottom - item.top) * mapScale));
    }
    const marked = [];
    for (const node of layout.nodes) {
      const mark = this.marks.get(node.number);
      if (mark || this.found.has(node.number)) marked.push([node, mark]);
      if (node.fold) continue;
      context.fillStyle = ink.family(node.family).line;
      const x = 4 + (node.x - node.width / 2 - layout.left) * acrossScale;
      const tall = Math.max(0.6, node.height * mapScale * 0.8);
      context.fillRect(x, (node.y - node.height / 2) * mapScale, Math.max(1.5, node.width * acrossScale), tall);
    }
    for (const [node, mark] of marked) {
      const y = node.y * mapScale - 1;
      if (mark) {
        context.fillStyle = ink[mark];
        context.fillRect(MAP_WIDTH - 11, y, 5, 2);
      }
      if (this.found.has(node.number)) {
        context.fillStyle = ink.found;
        context.fillRect(MAP_WIDTH - 5, y, 4, 2);
      }
    }
  }

  // -- what is where ------------------------------------------------------------------------------------------------

  // The node, fold or label of a block at a point of the canvas.
  hit(offsetX, offsetY) {
    if (!this.layout) return null;
    const x = (offsetX - this.view.x) / this.view.k, y = (offsetY - this.view.y) / this.view.k;
    for (const item of this.layout.elements) {
      if (item.bottom < y || item.top > y) continue;
      if (item.fold) return x > item.left && x < item.right ? item : null;
      for (const node of item.stretch.members) {
        if (Math.abs(node.x - x) <= node.width / 2 && Math.abs(node.y - y) <= node.height / 2) return node;
      }
    }
    for (const band of this.layout.bands) {
      if (!band.fold && y > band.top - 18 && y < band.top && x > band.left && x < band.left + 130) return { band };
    }
    return null;
  }

  // Where a node is on the screen; for tests and for the page's own links.
  placeOf(number) {
    const node = this.layout?.byNumber.get(number);
    if (!node) return null;
    const box = this.canvas.getBoundingClientRect();
    return { x: box.left + node.x * this.view.k + this.view.x, y: box.top + node.y * this.view.k + this.view.y };
  }

  showHint(node, x, y) {
    this.hint.hidden = !node || this.view.k >= 0.42;
    if (this.hint.hidden) return;
    this.hint.replaceChildren(element("b", {}, node.title), ` ${node.type}`);
    this.hint.style.left = `${Math.min(x + 14, this.size.width - 220)}px`;
    this.hint.style.top = `${y + 14}px`;
  }
}

function rounded(context, x, y, width, height, radius) {
  context.beginPath();
  context.roundRect(x, y, width, height, Math.min(radius, width / 2, height / 2));
}

// The segments of a line and the bends between them.
function trace(context, segments, top) {
  segments.forEach(([x, y1, y2], index) => {
    const before = segments[index - 1];
    if (before) bend(context, before[0], before[2] + top, x, y1 + top);
    else context.moveTo(x, y1 + top);
    context.lineTo(x, y2 + top);
  });
}

// From one upright line to another.
function bend(context, x1, y1, x2, y2) {
  const middle = (y1 + y2) / 2;
  if (x1 === x2) context.lineTo(x2, y2);
  else context.bezierCurveTo(x1, middle, x2, middle, x2, y2);
}

function arrowHead(context, x, y, size = 1) {
  context.moveTo(x, y + 0.5);
  context.lineTo(x - 3.4 * size, y - 6 * size);
  context.lineTo(x + 3.4 * size, y - 6 * size);
  context.closePath();
}

// The text, or as much of it as has room; `from` says which end is left out.
function fitted(label, room, from) {
  if (widthOf(FONT.note, label) <= room) return label;
  const letters = Math.max(1, Math.floor(room / widthOf(FONT.note, "0")) - 1);
  return from === "end" ? `${label.slice(0, letters)}…` : `…${label.slice(-letters)}`;
}

// The colours of the style sheet, for the canvas.
const colours = (() => {
  let theme = null, known = null;
  return () => {
    const now = document.documentElement.dataset.theme;
    if (now === theme) return known;
    theme = now;
    const style = getComputedStyle(document.documentElement);
    const get = (name) => style.getPropertyValue(`--${name}`).trim();
    const families = new Map();
    known = Object.fromEntries(
      ["text", "muted", "edge", "band", "panel", "border", "added", "removed", "changed", "selected", "found", "reads",
        "feeds", "lens", "weight"].map((name) => [name, get(name)]));
    const dark = now === "dark";
    const mix = (colour, alpha) => {
      const { r, g, b } = d3.rgb(colour);
      return `rgba(${r},${g},${b},${alpha})`;
    };
    const over = (colour, share) => d3.interpolateRgb(known.panel, colour)(share);
    known.wash = (mark) => mix(known[mark], dark ? 0.2 : 0.12);
    known.family = (name) => {
      if (!families.has(name)) {
        const line = get(`family-${name}`) || get("family-other");
        families.set(name, { line, fill: over(line, dark ? 0.2 : 0.09), edge: over(line, dark ? 0.55 : 0.45) });
      }
      return families.get(name);
    };
    return known;
  };
})();
