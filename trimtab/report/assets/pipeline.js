// The list of passes at the left.

class PipelineList {
  constructor(root, model, onSelect) {
    Object.assign(this, { root, model, onSelect });
    this.entries = this.makeEntries();
    this.buttons = this.entries.map((entry) => this.button(entry));
    const list = element("ol", {});
    let heading = null,
      here = "";
    this.entries.forEach((entry, index) => {
      const { row } = entry;
      const group = row?.group ? `${row.group}${row.round > 1 ? ` · round ${row.round}` : ""}` : "";
      if (group !== here) list.append((heading = element("li", { class: "group no-change" }, group)));
      here = group;
      const isIdle = row && !row.changed && !entry.failed;
      if (!isIdle) heading?.classList.remove("no-change");
      list.append(element("li", { class: isIdle ? "no-change" : "" }, this.buttons[index]));
    });
    const idle = this.entries.filter((entry) => entry.row && !entry.row.changed && !entry.failed).length;
    const toggle = element("input", {
      type: "checkbox",
      id: "hide-idle",
      onchange: () => root.classList.toggle("busy-only", toggle.checked),
    });
    root.replaceChildren(
      list,
      idle ? element("label", { class: "filter" }, toggle, `Hide ${text.count(idle)} that changed nothing`) : "",
    );
  }

  // The whole run, and each application of a pass.
  makeEntries() {
    const { model } = this;
    const at = (index) => model.snapshot(model.steps[Math.min(index, model.steps.length - 1)]);
    const rows = model.report.passes.map((row, index) => ({
      index,
      row,
      before: at(index),
      after: at(index + 1),
      failed: model.failedRow === index,
    }));
    return [{ index: -1, row: null, before: at(0), after: at(model.steps.length - 1), failed: false }, ...rows];
  }

  button(entry) {
    const { row, before, after } = entry;
    const onclick = () => this.onSelect(entry);
    if (!row) {
      return element(
        "button",
        { type: "button", class: "step run", onclick },
        element("span", { class: "name" }, "Whole run"),
        this.delta(before.ops.size, after.ops.size),
        element(
          "span",
          { class: "facts" },
          this.ops(before.ops.size, after.ops.size),
          element("span", {}, text.seconds(this.model.seconds)),
        ),
        this.bar(before, after),
      );
    }
    const index = element("span", { class: "index" }, `${entry.index + 1}`);
    const rules = row.rules ?? [];
    const misses = rules.reduce((sum, rule) => sum + Object.values(rule.rejected).reduce((a, b) => a + b, 0), 0);
    const matched = rules.reduce((sum, rule) => sum + rule.applied, 0);
    const warning = misses
      ? element("span", { class: "miss", title: "near misses" }, `${text.count(misses)} near`)
      : "";
    const options = row.text.slice(row.name.length);
    const name = element(
      "span",
      { class: "name", title: row.text },
      row.name,
      options ? element("small", {}, options) : "",
    );
    if (!row.changed && !entry.failed) {
      return element(
        "button",
        { type: "button", class: "step idle", onclick },
        index,
        name,
        element("span", { class: "facts" }, warning, element("span", {}, text.seconds(row.seconds))),
      );
    }
    const macs =
      row.macs_before !== undefined && row.macs_before !== row.macs_after
        ? element("span", {}, `${this.percent(row.macs_before, row.macs_after)} MACs`)
        : "";
    const bytes = row.weight_bytes_after - row.weight_bytes_before;
    return element(
      "button",
      { type: "button", class: `step ${entry.failed ? "failed" : "changed"}`, onclick },
      index,
      name,
      this.delta(before.ops.size, after.ops.size),
      element(
        "span",
        { class: "facts" },
        this.ops(before.ops.size, after.ops.size),
        entry.failed ? element("span", { class: "error" }, "failed") : "",
        element("span", {}, text.seconds(row.seconds)),
        macs,
        bytes ? element("span", {}, `${bytes > 0 ? "+" : "−"}${text.bytes(Math.abs(bytes))}`) : "",
        row.drift?.differing ? element("span", {}, `drift ${short(row.drift.relative)}`) : "",
        matched ? element("span", {}, `${text.count(matched)} rewrites`) : "",
        warning,
      ),
      this.bar(before, after),
    );
  }

  percent(before, after) {
    return before ? `${after > before ? "+" : "−"}${Math.abs((after / before - 1) * 100).toFixed(1)} %` : "";
  }

  ops(before, after) {
    return element(
      "span",
      {},
      before === after ? `${text.count(after)} ops` : `${text.count(before)} → ${text.count(after)} ops`,
    );
  }

  delta(before, after) {
    const delta = after - before;
    return element("b", { class: delta < 0 ? "less" : delta > 0 ? "more" : "" }, delta ? text.signed(delta) : "±0");
  }

  // Ops before and after as lengths, on one scale for the whole list.
  bar(before, after) {
    this.most ??= Math.max(1, ...this.entriesSizes());
    const width = (snapshot) => `${(100 * snapshot.ops.size) / this.most}%`;
    return element(
      "span",
      { class: "length", "aria-hidden": true },
      element("i", { class: "was", style: { width: width(before) } }),
      element("i", { style: { width: width(after) } }),
    );
  }

  entriesSizes() {
    return this.entries.flatMap((entry) => [entry.before.ops.size, entry.after.ops.size]);
  }

  mark(entry) {
    this.buttons.forEach((button, index) => {
      if (this.entries[index] === entry) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    });
    const button = this.buttons[this.entries.indexOf(entry)];
    button.scrollIntoView({ block: "nearest" });
  }
}
