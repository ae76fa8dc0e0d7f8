// The panel at the right: what a pass did, or what an op is.

const heading = (title, ...more) => element("h3", {}, title, ...more);

const facts = (rows) =>
  element(
    "dl",
    { class: "facts" },
    rows.filter(Boolean).map(([name, ...value]) => [element("dt", {}, name), element("dd", {}, ...value)]),
  );

const change = (before, after, show) => {
  if (before === undefined || after === undefined) return null;
  if (before === after) return [show(after), element("span", { class: "delta" }, " unchanged")];
  const share = before ? ` ${after > before ? "+" : "−"}${Math.abs((after / before - 1) * 100).toFixed(1)} %` : "";
  return [`${show(before)} → ${show(after)}`, element("span", { class: "delta" }, share)];
};

// A number of ops of each kind, where it differs.
function mixOfOps(before, after) {
  const counts = new Map();
  for (const [snapshot, index] of [
    [before, 0],
    [after, 1],
  ]) {
    for (const op of snapshot.ops.values()) {
      if (!counts.has(op.mnemonic)) counts.set(op.mnemonic, [0, 0, op.family]);
      counts.get(op.mnemonic)[index]++;
    }
  }
  return [...counts]
    .map(([mnemonic, [was, is, family]]) => ({ mnemonic, was, is, family }))
    .sort((a, b) => Math.abs(b.is - b.was) - Math.abs(a.is - a.was) || b.is - a.is);
}

function mixTable(rows, onSearch) {
  if (!rows.length) return null;
  const most = Math.max(...rows.map((row) => Math.max(row.was, row.is)));
  return element(
    "table",
    { class: "mix" },
    element(
      "thead",
      {},
      element(
        "tr",
        {},
        ["op", "before", "after", "", ""].map((name) => element("th", {}, name)),
      ),
    ),
    element(
      "tbody",
      {},
      rows.map(({ mnemonic, was, is, family }) =>
        element(
          "tr",
          {},
          element(
            "td",
            {},
            element(
              "button",
              { type: "button", class: "op", onclick: () => onSearch(mnemonic) },
              dot(family),
              mnemonic,
            ),
          ),
          element("td", {}, text.count(was)),
          element("td", {}, text.count(is)),
          element("td", { class: is < was ? "less" : is > was ? "more" : "" }, is === was ? "" : text.signed(is - was)),
          element(
            "td",
            { class: "bars" },
            element("i", { style: { width: `${(100 * was) / most}%` } }),
            element("i", {
              style: { width: `${(100 * is) / most}%`, background: `var(--family-${family}, var(--family-other))` },
            }),
          ),
        ),
      ),
    ),
  );
}

// The end of a long path, from a folder on.
const shortened = (path) => (path.length > 44 ? `…/${path.split("/").slice(-2).join("/")}` : path);

const dot = (family) =>
  element("i", { class: "dot", style: { background: `var(--family-${family}, var(--family-other))` } });

class Details {
  // `on` are callbacks: select(number), search(text), close().
  constructor(root, model, on) {
    Object.assign(this, { root, model, on });
  }

  showFailure(failure) {
    if (!failure) return null;
    const values = Object.entries(failure.values ?? {});
    return element(
      "div",
      { class: "failure", role: "alert" },
      element("b", {}, failure.what),
      facts(values.map(([name, value]) => [name, value])),
      failure.rule && element("p", {}, failure.rule),
      failure.fix && element("p", {}, failure.fix),
      failure.where && element("p", { class: "where" }, failure.where),
      failure.location && element("p", { class: "where" }, failure.location),
    );
  }

  showRun(entry, marks) {
    const { report, failure } = this.model;
    const first = report.passes[0],
      last = report.passes.at(-1);
    const applied = new Set(report.passes.filter((row) => row.changed).map((row) => row.text));
    this.root.replaceChildren(
      element("h2", {}, "Whole run"),
      element("p", { class: "text" }, report.pipeline || "no passes"),
      failure ? this.showFailure(failure) : "",
      facts([
        first && ["ops", change(entry.before.ops.size, entry.after.ops.size, text.count)],
        first?.macs_before !== undefined && ["MACs", change(first.macs_before, last.macs_after, text.macs)],
        first && ["weights", change(first.weight_bytes_before, last.weight_bytes_after, text.bytes)],
        ["time", `${text.seconds(this.model.seconds)} in all, ${text.seconds(report.check_seconds)} of it for checks`],
        ["passes", `${report.passes.length} applications; ${applied.size} passes changed the module`],
        this.changes(marks),
      ]),
      ...this.notes(report.notes),
      heading("Ops"),
      mixTable(mixOfOps(entry.before, entry.after), this.on.search) ?? "",
    );
  }

  showPass(entry, marks) {
    const { row } = entry;
    const mix = mixOfOps(entry.before, entry.after).filter((one) => one.was !== one.is);
    this.root.replaceChildren(
      element("h2", {}, row.name),
      element(
        "p",
        { class: "text" },
        element("span", { class: "contract" }, row.contract),
        row.text === row.name ? "" : row.text,
      ),
      entry.failed ? this.showFailure(this.model.failure) : "",
      facts([
        ["ops", change(row.ops_before, entry.after.ops.size, text.count)],
        row.macs_before !== undefined && ["MACs", change(row.macs_before, row.macs_after, text.macs)],
        ["weights", change(row.weight_bytes_before, row.weight_bytes_after, text.bytes)],
        ["drift", text.drift(row.drift), row.drift?.where ? element("small", {}, row.drift.where) : ""],
        row.metric_before !== null &&
          row.metric_before !== undefined && ["metric", `${row.metric_before} → ${row.metric_after}`],
        [
          "time",
          text.seconds(row.seconds),
          row.check_seconds ? element("small", {}, `and ${text.seconds(row.check_seconds)} for checks`) : "",
        ],
        row.group && ["group", `${row.group}, round ${row.round}`],
        this.changes(marks),
      ]),
      ...this.notes(row.notes),
      ...this.layers(row.layers ?? []),
      ...this.rules(row.rules ?? []),
      ...(mix.length ? [heading("Ops that became more or fewer"), mixTable(mix, this.on.search)] : []),
    );
  }

  changes(marks) {
    const words = { added: "added", removed: "removed", changed: "rewired" };
    const ops = [...marks.keys()].map((number) => ({ number }));
    const parts = countMarks(ops, marks).map(([mark, count]) =>
      element("span", { class: `mark ${mark}` }, `${SIGNS[mark]}${text.count(count)} ${words[mark]}`),
    );
    return ["graph", parts.length ? parts : "no changes"];
  }

  notes(notes) {
    return notes.length
      ? [
          heading("Notes"),
          element(
            "ul",
            { class: "notes" },
            notes.map((note) => element("li", {}, note)),
          ),
        ]
      : [];
  }

  /** What a pass says about each layer: its facts as columns, in the order in which they appear. */
  layers(layers) {
    if (!layers.length) return [];
    const columns = [...new Set(["layer", ...layers.flatMap(Object.keys)])];
    const shown = (fact) => {
      if (typeof fact !== "number") return fact ?? "";
      return Number.isInteger(fact) ? text.count(fact) : fact.toPrecision(3);
    };
    return [
      heading("Layers"),
      element(
        "div",
        { class: "wide" },
        element(
          "table",
          { class: "layers" },
          element("thead", {}, element("tr", {}, columns.map((name) => element("th", {}, name.replaceAll("_", " "))))),
          element(
            "tbody",
            {},
            layers.map((layer) =>
              element("tr", {}, columns.map((name) => element("td", { title: layer[name] }, shown(layer[name])))),
            ),
          ),
        ),
      ),
    ];
  }

  rules(rules) {
    if (!rules.length) return [];
    const rows = rules.map((rule) => {
      const reasons = Object.entries(rule.rejected).sort((a, b) => b[1] - a[1]);
      const rejected = reasons.reduce((sum, [, count]) => sum + count, 0);
      const numbers = [
        ["tried", rule.tried],
        ["matched", rule.matched],
        ["applied", rule.applied],
        ["near misses", rejected],
      ];
      const summary = element(
        "summary",
        {},
        element("code", {}, rule.rule),
        element(
          "span",
          { class: "tally" },
          numbers
            .filter(([name, count]) => count || name === "applied")
            .map(([name, count]) =>
              element("span", { class: count ? name.replace(" ", "-") : "" }, `${name} ${text.count(count)}`),
            ),
        ),
      );
      return element(
        "details",
        { class: "rule", open: rejected > 0 && !rule.applied },
        summary,
        reasons.length
          ? element(
              "ul",
              { class: "reasons" },
              reasons.map(([reason, count]) =>
                element("li", {}, element("b", {}, `${text.count(count)} ×`), ` ${reason}`),
              ),
            )
          : "",
        rule.near_misses.map((miss) =>
          element(
            "figure",
            {},
            element(
              "figcaption",
              {},
              `${miss.matched} of ${miss.of} ops matched`,
              miss.location ? element("span", { title: miss.location }, ` · ${shortened(miss.location)}`) : "",
            ),
            element(
              "button",
              { type: "button", class: "code", title: "Show this op", onclick: () => this.on.find(miss.at) },
              miss.at,
            ),
            element("p", {}, miss.reason),
          ),
        ),
      );
    });
    return [heading("Rules"), ...rows];
  }

  showOp(graph, number, mark, back) {
    const value = graph.values.get(number);
    const op = value?.op;
    const link = (other) => this.valueLink(graph, other);
    const parts = [element("button", { type: "button", class: "back", onclick: this.on.close }, `← ${back}`)];
    if (!op) {
      const readers = graph.readers.get(number) ?? [];
      parts.push(
        element("h2", {}, dot("input"), graph.nameOf(number)),
        facts([
          ["kind", "input of the graph"],
          ["type", element("code", {}, value.type)],
          ["read by", this.readers(graph, readers)],
        ]),
      );
      this.root.replaceChildren(...parts);
      return;
    }
    const words = {
      added: "added by this pass",
      removed: "removed by this pass",
      changed: "reads other values after this pass",
    };
    const location = text.location(op.location);
    parts.push(
      element("h2", {}, dot(op.family), op.mnemonic),
      mark ? element("p", {}, element("span", { class: `mark ${mark}` }, words[mark])) : "",
      element("pre", { class: "code" }, graph.textOf(op)),
      facts([
        ["family", op.family],
        [
          "source",
          location
            ? [
                element("code", { class: "place", title: location }, shortened(location)),
                op.location.function ? element("small", {}, `in ${op.location.function}`) : "",
              ]
            : "unknown",
        ],
        ["made by", op.madeBy || "the importer"],
        op.macs ? ["MACs", text.macs(op.macs), op.macs > 999 ? element("small", {}, text.count(op.macs)) : ""] : null,
      ]),
      heading("Operands"),
      op.operands.length
        ? this.values(
            op.operands.map(({ field, value: read }) => [
              field,
              link(read),
              graph.typeOf(read),
              this.model.weights.has(read) ? text.bytes(this.model.weights.get(read).bytes) : "",
            ]),
          )
        : element("p", { class: "none" }, "none"),
      heading("Attributes"),
      op.attributes.length
        ? element(
            "table",
            { class: "values" },
            element(
              "tbody",
              {},
              op.attributes.map((attribute) =>
                element(
                  "tr",
                  { class: attribute.isDefault ? "default" : "" },
                  element("th", {}, attribute.name),
                  element(
                    "td",
                    {},
                    element("code", {}, attribute.value),
                    attribute.isDefault ? element("small", {}, "default") : "",
                  ),
                ),
              ),
            ),
          )
        : element("p", { class: "none" }, "none"),
      heading("Results"),
      this.values(
        op.results.map((result, index) => [
          op.results.length > 1 ? `${index}` : "",
          element("code", {}, graph.nameOf(result.number)),
          result.type,
          "",
          this.readers(graph, graph.readers.get(result.number) ?? [], result.number),
        ]),
      ),
    );
    this.root.replaceChildren(...parts);
    this.root.scrollTop = 0;
  }

  values(rows) {
    return element(
      "table",
      { class: "values" },
      element(
        "tbody",
        {},
        rows.map(([name, value, type, size, readers]) =>
          element(
            "tr",
            {},
            element("th", {}, name),
            element(
              "td",
              {},
              value,
              element("code", { class: "type" }, type),
              size ? element("small", {}, size) : "",
              readers ?? "",
            ),
          ),
        ),
      ),
    );
  }

  readers(graph, readers, number) {
    const shown = readers.slice(0, 12);
    const isOutput = graph.outputs.filter((output) => output.number === number).map((output) => output.name);
    return element(
      "div",
      { class: "readers" },
      isOutput.map((name) => element("span", {}, `returned as ${name}`)),
      shown.map((op) =>
        element(
          "button",
          { type: "button", class: "op", onclick: () => this.on.select(op.number) },
          dot(op.family),
          op.mnemonic,
        ),
      ),
      readers.length > shown.length ? element("span", {}, `and ${text.count(readers.length - shown.length)} more`) : "",
      readers.length || isOutput.length ? "" : element("span", {}, "read by nobody"),
    );
  }

  valueLink(graph, number) {
    const name = graph.nameOf(number);
    const value = graph.values.get(number);
    if (!value) return element("span", { class: "weight" }, name);
    const target = value.op ? value.op.number : number;
    return element("button", { type: "button", class: "value", onclick: () => this.on.select(target) }, name);
  }
}
