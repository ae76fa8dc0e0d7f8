// The strip beside a picture: the whole graph with its changes, and which part of it is in the window.

const MAP_WIDTH = 52;

class Overview {
  // `jump(y)` is called with the height in the graph that was clicked.
  constructor(picture, jump) {
    this.picture = picture;
    this.canvas = element("canvas", { class: "map", "aria-hidden": true });
    this.isOld = true;
    const go = (event) => {
      if (event.buttons && picture.layout) jump(event.offsetY / this.scale);
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      go(event);
    });
    this.canvas.addEventListener("pointermove", go);
  }

  paint() {
    const { picture, canvas } = this;
    const { layout, size } = picture;
    const ratio = window.devicePixelRatio || 1;
    const ink = colours();
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!layout) return;
    if (this.isOld) {
      this.isOld = false;
      this.scale = Math.min(size.height / layout.height, 0.35);
      this.image = element("canvas", { width: canvas.width, height: canvas.height });
      this.paintGraph(this.image.getContext("2d"), ink, ratio);
    }
    context.drawImage(this.image, 0, 0);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const [top, bottom] = picture.window();
    const y = Math.max(0, top * this.scale);
    const extent = Math.min(size.height, bottom * this.scale) - y;
    context.fillStyle = ink.lens;
    context.strokeStyle = ink.selected;
    context.lineWidth = 1;
    rounded(context, 1.5, y + 0.5, MAP_WIDTH - 3, Math.max(6, extent - 1), 3);
    context.fill();
    context.stroke();
  }

  paintGraph(context, ink, ratio) {
    const { scale } = this;
    const { layout, marks, found } = this.picture;
    const wide = layout.right - layout.left || 1;
    const acrossScale = Math.min((MAP_WIDTH - 20) / wide, 0.2);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    for (const item of layout.elements) {
      if (!item.fold) continue;
      context.fillStyle = ink.border;
      context.fillRect(5, item.top * scale, MAP_WIDTH - 18, Math.max(2, (item.bottom - item.top) * scale));
    }
    const marked = [];
    for (const node of layout.nodes) {
      const mark = marks.get(node.number);
      if (mark || found.has(node.number)) marked.push([node, mark]);
      if (node.fold) continue;
      context.fillStyle = ink.family(node.family).line;
      const x = 4 + (node.x - node.width / 2 - layout.left) * acrossScale;
      const tall = Math.max(0.6, node.height * scale * 0.8);
      context.fillRect(x, (node.y - node.height / 2) * scale, Math.max(1.5, node.width * acrossScale), tall);
    }
    for (const [node, mark] of marked) {
      const y = node.y * scale - 1;
      if (mark) {
        context.fillStyle = ink[mark];
        context.fillRect(MAP_WIDTH - 11, y, 5, 2);
      }
      if (found.has(node.number)) {
        context.fillStyle = ink.found;
        context.fillRect(MAP_WIDTH - 5, y, 4, 2);
      }
    }
  }
}
