"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dialog = document.querySelector("dialog");
const panel = document.getElementById("panel");
const BINS = 12; // up to data.k; one more is for what lies above
const GAP = 24;

// Everything from a report goes in as text, never as markup.
function make(name, attributes = {}, ...children) {
  const space = attributes.svg ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(space, name);
  for (const [key, value] of Object.entries(attributes)) if (key !== "svg") element.setAttribute(key, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}
const svg = (name, attributes, ...children) => make(name, { svg: true, ...attributes }, ...children);

// An id breaks at its slashes.
function code(id) {
  return make("code", {}, ...id.split("/").flatMap((part, i) => (i ? ["/", make("wbr"), part] : [part])));
}

function table(heads, rows) {
  const head = make("tr", {}, ...heads.map((h) => make("th", { scope: "col" }, h)));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
}

function number(value, digits) {
  return value === null ? "–" : value.toFixed(digits);
}

const KIND = { fail: "failed", error: "failed", not_run: "not_run", waived: "waived", unsupported: "declined", pass: "pass" };
const ORDER = Object.keys(KIND);

function caseRow([id, status, seconds, ratio, detail, waiver, problem]) {
  const name = make("td", {}, code(id));
  if (detail) name.append(make("p", { class: "detail" }, detail));
  if (waiver) name.append(make("p", { class: "detail" }, `Waiver: ${waiver.reason} (${waiver.device}, until ${waiver.expires}) ${waiver.link}`));
  if (problem && ["pass", "unsupported", "waived"].includes(status)) name.append(make("p", { class: "failed" }, `Does not count: ${problem}`));
  const state = make("td", { class: KIND[status] }, `${data.symbols[KIND[status]]} ${data.words[status]}`);
  return make("tr", {}, name, state, make("td", { class: "n" }, number(seconds, 3)), make("td", { class: "n" }, number(ratio, 2)));
}

function histogram(ratios) {
  const counts = new Array(BINS + 1).fill(0);
  for (const r of ratios) counts[r > data.k ? BINS : Math.max(0, Math.ceil((r / data.k) * BINS) - 1)] += 1;
  const width = 36, height = 90, top = Math.max(...counts), base = height + 16;
  const over = counts[BINS];
  const words = `Error to floor of ${ratios.length} cases: largest ${number(Math.max(...ratios), 2)}, ${over} above ${data.k}`;
  const out = svg("svg", { viewBox: `0 0 ${width * (BINS + 1) + GAP} ${base + 22}`, role: "img", "aria-label": words });
  counts.forEach((count, i) => {
    const x = i * width + (i === BINS ? GAP : 0), tall = (count / top) * height;
    out.append(svg("rect", { x: x + 2, y: base - tall, width: width - 4, height: tall, class: i === BINS ? "over" : "bar" }));
    if (count) out.append(svg("text", { x: x + width / 2, y: base - tall - 4, class: "count" }, String(count)));
  });
  out.append(svg("line", { x1: 0, x2: width * (BINS + 1) + GAP, y1: base, y2: base, class: "axis" }));
  const limit = width * BINS + 2;
  out.append(svg("line", { x1: limit, x2: limit, y1: 4, y2: base, class: "limit" }));
  for (let i = 0; i <= BINS; i += BINS / 3)
    out.append(svg("text", { x: Math.min(Math.max(i * width, 10), limit), y: base + 16 }, `${number((data.k * i) / BINS, 0)}×`));
  out.append(svg("text", { x: width * (BINS + 0.5) + GAP, y: base + 16 }, `>${data.k}×`));
  return out;
}

function perfRow([id, status, seconds, share, bound, detail]) {
  const name = make("td", {}, code(id), detail ? make("p", { class: "detail" }, detail) : null);
  const good = status === "pass";
  const bar = good ? make("meter", { value: share, min: 0, max: 1 }) : null;
  const text = good ? `${(100 * share).toFixed(0)} %` : status;
  const cell = make("td", { class: "n" }, bar, ` ${text}`);
  return make("tr", {}, name, make("td", {}, bound), make("td", { class: "n" }, good ? (1000 * seconds).toFixed(3) : "–"), cell);
}

function ceilings(c) {
  const flops = Object.entries(c.gflop_s).map(([dtype, value]) => `${value.toFixed(0)} GFLOP/s in ${dtype}`);
  return `Measured on this device: reads ${c.read_gb_s.toFixed(1)} GB/s; ${flops.join("; ")} (${c.how}).`;
}

function show(cell) {
  const column = data.columns[cell.column];
  const cases = cell.cases.map((i) => column.cases[i]).sort((a, b) => !a[6] - !b[6] || ORDER.indexOf(a[1]) - ORDER.indexOf(b[1]));
  const ratios = cases.map((c) => c[3]).filter((r) => r !== null);
  const perf = cell.perf.map((i) => column.perf[i]);
  const none = perf.length ? "Timed only." : "No report has a case for this.";
  const tally = ORDER.map((s) => [s, cases.filter((c) => c[1] === s).length]).filter(([, n]) => n);
  const tag = column.emulated ? make("span", { class: "tag" }, "emulated") : null;
  panel.replaceChildren(
    make("h2", { id: "panel-title" }, `${cell.row} on ${column.name} `, tag),
    make("p", { class: "device" }, column.device),
    make("p", {}, tally.map(([s, n]) => `${n} ${data.words[s]}`).join(", ") || none),
  );
  if (ratios.length) {
    const rest = cases.length - ratios.length;
    const note = `Largest error of each case, as a multiple of the rounding floor; up to ${data.k}× is right.`;
    const exact = rest ? ` ${rest} other cases compare exactly, or were not answered.` : "";
    panel.append(make("h3", {}, "Error to floor"), histogram(ratios), make("p", { class: "device" }, note + exact));
  }
  if (perf.length) {
    panel.append(make("h3", {}, "Share of roofline"), table(["Case", "Bound", "ms", "Share"], perf.map(perfRow)));
    panel.append(...column.ceilings.map((c) => make("p", { class: "device" }, ceilings(c))));
  }
  if (cases.length) panel.append(make("h3", {}, "Cases"), table(["Case", "Status", "Seconds", "Error / floor"], cases.map(caseRow)));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

const id = () => decodeURIComponent(location.hash.slice(1));

function sync() {
  if (!(id() in data.cells)) return dialog.close();
  document.getElementById(id()).scrollIntoView({ block: "center" });
  show(data.cells[id()]);
}

dialog.addEventListener("close", () => {
  if (!(id() in data.cells)) return;
  document.getElementById(id()).focus({ preventScroll: true });
  history.replaceState(null, "", location.pathname + location.search);
});
// A click opens its cell without moving the page.
document.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || !(link.hash.slice(1) in data.cells) || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  history.pushState(null, "", link.hash);
  show(data.cells[id()]);
});
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
document.querySelector(".matrix").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  const from = event.target.closest("td");
  if (!step || !from) return;
  const rows = [...document.querySelectorAll(".matrix tbody tr")].filter((row) => row.querySelector("a"));
  const row = rows[rows.indexOf(from.parentElement) + step[0]];
  const to = row && row.cells[from.cellIndex + step[1]]?.querySelector("a");
  if (to) to.focus();
  event.preventDefault();
});
addEventListener("hashchange", sync);
sync();
