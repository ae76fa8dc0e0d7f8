// Draws a picture on its canvas.
//
// Everything outside the window is skipped, and what would be too small to read is left out: first the types, then the
// names, then the edges.

// Scales below which something is left out.
const TOO_SMALL = { types: 0.42, names: 0.28, arrows: 0.3, labels: 0.2, edges: 0.05 };
const SIGNS = { removed: "−", added: "+", changed: "~" };

// How many of some nodes or ops a pass removed, added and changed: pairs of a mark and its count, without zeros.
function countMarks(items, marks) {
  const counts = groups(
    items.filter((item) => marks.has(item.number)),
    (item) => marks.get(item.number),
  );
  return Object.keys(SIGNS).flatMap((mark) => (counts.has(mark) ? [[mark, counts.get(mark).length]] : []));
}

class Painter {
  constructor(picture) {
    this.picture = picture;
    this.context = picture.canvas.getContext("2d");
  }

  paint() {
    const { context, picture } = this;
    const { size, layout, view } = picture;
    const ratio = window.devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, size.width, size.height);
    if (!layout) return;
    context.setTransform(ratio * view.k, 0, 0, ratio * view.k, ratio * view.x, ratio * view.y);
    this.ink = colours();
    const [top, bottom] = picture.window();
    const visible = layout.elements.filter((item) => item.bottom > top - 20 && item.top < bottom + 20);
    this.drawBands(top, bottom);
    if (view.k > TOO_SMALL.edges) this.drawEdges(visible, top, bottom);
    this.drawSelection();
    for (const item of visible) {
      if (item.fold) this.drawFold(item);
      else for (const node of item.stretch.members) this.drawNode(node);
    }
  }

  drawBands(top, bottom) {
    const { context, ink, picture } = this;
    for (const band of picture.layout.bands) {
      if (band.bottom < top || band.top > bottom) continue;
      context.fillStyle = ink.band;
      rounded(context, band.left, band.top, band.right - band.left, band.bottom - band.top, 12);
      context.fill();
      if (picture.view.k < TOO_SMALL.labels) continue;
      context.fillStyle = ink.muted;
      context.font = FONT.note;
      context.textAlign = "left";
      context.textBaseline = "alphabetic";
      context.fillText(`block ${band.block + 1} of ${band.section.times}`, band.left + 12, band.top - 6);
    }
  }

  drawEdges(visible, top, bottom) {
    const { context, ink, picture } = this;
    context.lineWidth = Math.min(1.4, Math.max(0.8, 0.9 / picture.view.k));
    context.strokeStyle = ink.edge;
    context.beginPath();
    for (const [x1, y1, x2, y2] of picture.layout.links) {
      if (y2 < top || y1 > bottom) continue;
      context.moveTo(x1, y1);
      bend(context, x1, y1, x2, y2);
    }
    for (const item of visible) {
      if (item.stretch) for (const line of item.shape.lines) trace(context, line.segments, item.top);
    }
    context.stroke();
    if (picture.view.k < TOO_SMALL.arrows) return;
    context.fillStyle = ink.edge;
    context.beginPath();
    for (const item of visible) {
      if (!item.stretch) continue;
      for (const { segments, hasArrow } of item.shape.lines)
        if (hasArrow) arrowHead(context, segments.at(-1)[0], segments.at(-1)[2] + item.top);
    }
    context.fill();
  }

  // The edges of the selected op: along their lines within a stretch, straight to wherever the other end is elsewhere.
  drawSelection() {
    const { context, ink, picture } = this;
    const node = picture.selected !== null && picture.layout.byNumber.get(picture.selected);
    if (!node) return;
    context.lineWidth = Math.max(2, 1.4 / picture.view.k);
    const item = picture.layout.elements.find((one) => one.stretch?.members.includes(node));
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
    const { graph } = picture.layout;
    const sources = (node.op?.operands ?? []).map(({ value }) => picture.layout.nodeOf(value)).filter(Boolean);
    const results = node.op ? node.op.results.map((result) => result.number) : [node.number];
    const readers = results
      .flatMap((result) => graph.readers.get(result) ?? [])
      .map((op) => picture.layout.byNumber.get(op.number));
    for (const source of new Set(sources)) this.drawJump(source, node, item, ink.reads);
    for (const reader of new Set(readers)) this.drawJump(node, reader, item, ink.feeds);
  }

  drawJump(from, to, item, colour) {
    const { context } = this;
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

  drawNode(node) {
    const { context, ink, picture } = this;
    const { k } = picture.view;
    const { width, height } = node;
    const left = node.x - width / 2,
      top = node.y - height / 2;
    const family = ink.family(node.family);
    const mark = picture.marks.get(node.number);
    if (k < TOO_SMALL.names) {
      context.fillStyle = mark ? ink[mark] : family.line;
      context.fillRect(left, top, width, height);
      this.drawHalo(node, left, top, false);
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
    this.drawHalo(node, left, top, pill);
    this.writeNode(node, left, top, pill);
  }

  drawHalo(node, left, top, pill) {
    const { context, ink, picture } = this;
    const isSelected = node.number === picture.selected && node.number >= 0;
    if (!isSelected && !picture.found.has(node.number)) return;
    context.lineWidth = Math.max(isSelected ? 2.5 : 2, 1.5 / picture.view.k);
    context.strokeStyle = isSelected ? ink.selected : ink.found;
    const out = 4;
    rounded(context, left - out, top - out, node.width + 2 * out, node.height + 2 * out, pill ? node.height : 10);
    context.stroke();
  }

  writeNode(node, left, top, pill) {
    const { context, ink, picture } = this;
    const { title, remark, type, weight, lines, width } = node;
    context.textBaseline = "middle";
    context.textAlign = pill ? "center" : "left";
    const x = pill ? node.x : left + NODE.padding + 4;
    const room = width - 2 * NODE.padding - 4;
    let y = lines === 1 ? node.y + 0.5 : top + 14.5;
    context.font = FONT.title;
    context.fillStyle = ink.text;
    context.fillText(title, x, y, room);
    if (picture.view.k < TOO_SMALL.types) return;
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

  drawFold(item) {
    const { context, ink, picture } = this;
    const { left, right, top, bottom, fold, members } = item;
    for (const step of [8, 4, 0]) {
      rounded(context, left + step, top + step, right - left - 2 * step, bottom - top - 2 * step + step, 12);
      context.fillStyle = step ? ink.band : ink.panel;
      context.fill();
      context.lineWidth = 1;
      context.strokeStyle = ink.border;
      context.stroke();
    }
    if (picture.view.k < TOO_SMALL.labels) return;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillStyle = ink.text;
    context.font = FONT.title;
    const more = fold.times - 1;
    context.fillText(`${more} more block${more > 1 ? "s" : ""} of ${text.count(fold.length)} ops`, 0, top + 27);
    const counts = countMarks(members, picture.marks);
    context.font = FONT.note;
    if (members.some((node) => node.number === picture.selected || picture.found.has(node.number))) {
      context.lineWidth = 2;
      context.strokeStyle = ink.found;
      rounded(context, left - 4, top - 4, right - left + 8, bottom - top + 8, 14);
      context.stroke();
    }
    context.fillStyle = ink.muted;
    context.fillText(
      counts.length ? "click to unfold" : "equal to the one above: click to unfold",
      0,
      top + (counts.length ? 66 : 50),
    );
    const words = counts.map(([mark, count]) => [mark, `${SIGNS[mark]}${text.count(count)}`]);
    let x = -words.reduce((sum, [, word]) => sum + widthOf(FONT.note, word), 0) / 2 - 7 * (words.length - 1);
    context.textAlign = "left";
    for (const [mark, word] of words) {
      context.fillStyle = ink[mark];
      context.fillText(word, x, top + 47);
      x += widthOf(FONT.note, word) + 14;
    }
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
const NAMES = `text muted edge band panel border added removed changed selected found reads feeds lens weight`.split(
  " ",
);

const colours = (() => {
  let theme = null,
    known = null;
  return () => {
    const now = document.documentElement.dataset.theme;
    if (now === theme) return known;
    theme = now;
    const style = getComputedStyle(document.documentElement);
    const get = (name) => style.getPropertyValue(`--${name}`).trim();
    const families = new Map();
    known = Object.fromEntries(NAMES.map((name) => [name, get(name)]));
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
