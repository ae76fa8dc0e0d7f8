// One picture of a graph: moving, scaling, and finding what is under the pointer.

const SCALES = [0.015, 3];
const FOCUS = 0.42; // where in the window, from its top, people look

class Picture {
  // `on` are callbacks: select(number or null), unfold(section), fold(section), moved(picture) by the user.
  constructor(parent, label, on) {
    this.on = on;
    this.label = label;
    this.canvas = element("canvas", { tabindex: 0, role: "img" });
    this.overview = new Overview(this, (y) => {
      this.moveTo({ ...this.view, y: this.size.height / 2 - y * this.view.k });
      this.on.moved(this);
    });
    this.caption = element("div", { class: "caption" });
    this.hint = element("div", { class: "hint", hidden: true });
    this.root = element("div", { class: "pane" }, this.canvas, this.overview.canvas, this.caption, this.hint);
    parent.append(this.root);
    this.painter = new Painter(this);
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
    this.canvas.addEventListener(
      "wheel",
      (event) => {
        if (event.ctrlKey || event.metaKey) return;
        event.preventDefault();
        event.stopImmediatePropagation();
        const unit = event.deltaMode === 1 ? 24 : 1;
        const [dx, dy] = event.shiftKey && !event.deltaX ? [event.deltaY, 0] : [event.deltaX, event.deltaY];
        this.moveTo({ ...this.view, x: this.view.x - dx * unit, y: this.view.y - dy * unit });
        this.on.moved(this);
      },
      { capture: true, passive: false },
    );
    this.zoom = d3.behavior
      .zoom()
      .scaleExtent(SCALES)
      .on("zoom", () => {
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
  }

  show(layout, marks) {
    this.layout = layout;
    this.marks = marks;
    this.refresh();
  }

  highlight(numbers) {
    this.found = numbers;
    this.refresh();
  }

  // Folds, marks, search results or colours are new.
  refresh() {
    this.overview.isOld = true;
    this.redraw();
  }

  resize() {
    const { width, height } = this.root.getBoundingClientRect();
    if (!width || !height) return;
    const first = !this.size.width;
    this.size = { width: width - MAP_WIDTH, height };
    const ratio = window.devicePixelRatio || 1;
    for (const [canvas, w] of [
      [this.canvas, this.size.width],
      [this.overview.canvas, MAP_WIDTH],
    ]) {
      canvas.width = Math.round(w * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.width = `${w}px`;
      canvas.style.height = `${height}px`;
    }
    this.zoom.size([this.size.width, height]);
    this.overview.isOld = true;
    if (first) this.on.ready(this);
    this.paint();
  }

  redraw() {
    if (this.scheduled) return;
    this.scheduled = true;
    requestAnimationFrame(() => {
      this.scheduled = false;
      this.paint();
    });
  }

  paint() {
    if (!this.size.width) return;
    this.painter.paint();
    this.overview.paint();
  }

  // The heights in the graph that are at the top and at the bottom of the window.
  window() {
    return [-this.view.y / this.view.k, (this.size.height - this.view.y) / this.view.k];
  }

  // The height in the graph that people look at.
  get focus() {
    return (this.size.height * FOCUS - this.view.y) / this.view.k;
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
    this.moveTo(
      {
        k,
        x: width / 2 - (width / 2 - this.view.x) * change,
        y: height / 2 - (height / 2 - this.view.y) * change,
      },
      true,
    );
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
    const { width, height } = this.size;
    const [left, top] = [x * this.view.k + this.view.x, y * this.view.k + this.view.y];
    return left > 30 && left < width - 30 && top > 60 && top < height * 0.85;
  }

  centre(node, animate = true, scale = Math.max(this.view.k, 0.7)) {
    const { width, height } = this.size;
    this.moveTo({ k: scale, x: width / 2 - node.x * scale, y: height * FOCUS - node.y * scale }, animate);
  }

  // -- what is where ------------------------------------------------------------------------------------------------

  // The node, fold or label of a block at a point of the canvas.
  hit(offsetX, offsetY) {
    if (!this.layout) return null;
    const [x, y] = [(offsetX - this.view.x) / this.view.k, (offsetY - this.view.y) / this.view.k];
    for (const item of this.layout.elements) {
      if (item.bottom < y || item.top > y) continue;
      if (item.fold) return x > item.left && x < item.right ? item : null;
      for (const node of item.stretch.members) {
        if (Math.abs(node.x - x) <= node.width / 2 && Math.abs(node.y - y) <= node.height / 2) return node;
      }
    }
    for (const band of this.layout.bands) {
      if (y > band.top - 18 && y < band.top && x > band.left && x < band.left + 130) return { band };
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
    this.hint.hidden = !node || this.view.k >= TOO_SMALL.types;
    if (this.hint.hidden) return;
    this.hint.replaceChildren(element("b", {}, node.title), ` ${node.type}`);
    this.hint.style.left = `${Math.min(x + 14, this.size.width - 220)}px`;
    this.hint.style.top = `${y + 14}px`;
  }
}
