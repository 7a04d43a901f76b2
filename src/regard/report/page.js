"use strict";
// Draws the figures of the page and wires its controls. All text comes from the page's data, escaped where it was written.
const data = JSON.parse(document.getElementById("report-data").textContent);
// Only "save as picture": Plotly's own bar has a button that sends the chart to a server.
const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]], plotlyServerURL: "" };
const plots = data.figures.map((id) => document.getElementById(id));
const hidden = new Set();
let budget = data.budget;
let intervals = false;
let drawn = false;
let figures = {}; // they lie packed in the page too

let shade = "auto";
let printing = false;
const system = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  return !printing && (shade === "dark" || (shade === "auto" && system.matches));
}

// A copy of a part of a figure in the colours of the page; rgba() keeps how faint it is.
function coloured(part, dark) {
  if (Array.isArray(part)) return part.map((inner) => coloured(inner, dark));
  if (part && typeof part === "object") return Object.fromEntries(Object.entries(part).map(([key, inner]) => [key, coloured(inner, dark)]));
  if (typeof part !== "string" || !dark) return part;
  const faint = /^rgba\((\d+),(\d+),(\d+),([\d.]+)\)$/.exec(part);
  if (!faint) return data.dark[part] ?? part;
  const parts = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const hex = "#" + faint.slice(1, 4).map((c) => Number(c).toString(16).padStart(2, "0")).join("");
  return `rgba(${parts(data.dark[hex] ?? hex).join(",")},${faint[4]})`;
}

function shown(meta) {
  return !meta || (!hidden.has(meta.method) && (meta.budget === null || meta.budget === budget));
}

function barred(meta) {
  return Boolean(meta) && intervals;
}

function refresh() {
  for (const plot of plots) {
    const metas = plot.data.map((trace) => trace.meta);
    Plotly.restyle(plot, { visible: metas.map(shown), "error_y.visible": metas.map(barred) });
  }
  for (const button of document.querySelectorAll("[data-method]"))
    button.setAttribute("aria-pressed", String(!hidden.has(Number(button.dataset.method))));
}

function draw() {
  for (const plot of plots) {
    const { data: traces, layout } = coloured(figures[plot.id], isDark());
    for (const trace of traces) {
      trace.visible = shown(trace.meta);
      if (trace.error_y) trace.error_y.visible = barred(trace.meta);
    }
    if (printing) Object.assign(layout, { width: 340, autosize: false });
    Plotly.react(plot, traces, layout, config);
  }
}

function asked(which) {
  shade = which;
  document.documentElement.dataset.shade = which;
  if (drawn) draw();
}

function toggle(method) {
  if (!hidden.delete(method)) hidden.add(method);
  refresh();
}

function everyMethod(show) {
  for (const button of document.querySelectorAll("[data-method]"))
    show ? hidden.delete(Number(button.dataset.method)) : hidden.add(Number(button.dataset.method));
  refresh();
}

function value(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent : cell.dataset.value === "" ? null : Number(cell.dataset.value);
}

function sortBy(head) {
  const table = head.closest("table");
  const down = head.getAttribute("aria-sort") !== "descending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const order = (a, b) => {
    const [x, y] = [value(a, head.cellIndex), value(b, head.cellIndex)];
    if (x === null || y === null) return (x === null) - (y === null); // the unmeasured last, either way
    return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
  };
  // sorted, the table is one: families of rows end
  const rows = [...table.querySelectorAll("tbody tr:not(.title)")];
  for (const title of table.querySelectorAll("tr.title")) title.remove();
  table.tBodies[0].classList.remove("folded", "family");
  table.tBodies[0].append(...rows.sort(order));
  for (const body of [...table.tBodies].slice(1)) body.remove();
}

// Paper is light, and as wide as it is.
function print(now) {
  printing = now;
  if (drawn) draw();
}

// The library lies packed in the page; what follows works without it.
async function unpacked(text) {
  const signs = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;,=>?@^_`{|}~"; // base85; a comma for <
  const digit = Object.fromEntries([...signs].map((sign, value) => [sign, value]));
  const short = (5 - (text.length % 5)) % 5;
  const full = text + "~".repeat(short);
  const bytes = new DataView(new ArrayBuffer((full.length / 5) * 4));
  for (let at = 0; at < full.length; at += 5) {
    let four = 0;
    for (let i = at; i < at + 5; i++) four = four * 85 + digit[full[i]];
    bytes.setUint32((at / 5) * 4, four);
  }
  const stream = new Blob([bytes.buffer.slice(0, bytes.byteLength - short)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

async function begin() {
  const library = document.getElementById("library");
  if (library.textContent) {
    const script = document.createElement("script");
    script.textContent = await unpacked(library.textContent);
    document.head.append(script);
    library.remove();
    figures = JSON.parse(await unpacked(document.getElementById("figures").textContent));
    drawn = true;
    draw();
  }
  document.body.dataset.drawn = "true";
  dispatchEvent(new Event("drawn"));
}

// The table and the legend show what has the words that are sought; folded families that have any open.
function search(text) {
  const sought = text.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (label) => sought.every((word) => label.toLowerCase().includes(word));
  for (const row of document.querySelectorAll(".results tr[data-label]")) row.hidden = !fits(row.dataset.label);
  for (const button of document.querySelectorAll("[data-method]")) button.hidden = !fits(button.textContent);
  for (const family of document.querySelectorAll(".results tbody.family")) {
    const found = family.querySelector("tr[data-label]:not([hidden])") !== null;
    family.hidden = !found;
    fold(family, sought.length ? false : family.dataset.folded === "true");
  }
}

function fold(family, folded) {
  family.classList.toggle("folded", folded);
  family.querySelector("button.fold")?.setAttribute("aria-expanded", String(!folded));
}

// The card that is asked for opens.
function openCard() {
  const card = location.hash ? document.getElementById(location.hash.slice(1)) : null;
  if (card?.tagName === "DETAILS") card.open = true;
}

begin();
openCard();
addEventListener("hashchange", openCard);
for (const link of document.querySelectorAll('a[href^="#card-"]')) link.addEventListener("click", () => setTimeout(openCard));
for (const button of document.querySelectorAll("button.fold")) {
  const family = button.closest("tbody");
  button.addEventListener("click", () => {
    const folded = !family.classList.contains("folded");
    family.dataset.folded = String(folded);
    fold(family, folded);
  });
}
document.getElementById("search")?.addEventListener("input", (event) => search(event.target.value));
for (const button of document.querySelectorAll("[data-method]")) button.addEventListener("click", () => toggle(Number(button.dataset.method)));
for (const button of document.querySelectorAll("[data-all]")) button.addEventListener("click", () => everyMethod(button.dataset.all === "true"));
for (const head of document.querySelectorAll("th[data-sort]")) head.querySelector("button").addEventListener("click", () => sortBy(head));
for (const radio of document.querySelectorAll("input[name=budget]")) radio.addEventListener("change", () => { budget = Number(radio.value); refresh(); });
document.getElementById("intervals")?.addEventListener("change", (event) => { intervals = event.target.checked; refresh(); });
for (const box of document.querySelectorAll(".drawing")) box.scrollLeft = (box.scrollWidth - box.clientWidth) / 2; // a narrow screen begins at its middle
for (const radio of document.querySelectorAll("input[name=shade]")) radio.addEventListener("change", () => asked(radio.value));
system.addEventListener("change", () => { if (drawn) draw(); });
addEventListener("beforeprint", () => print(true));
addEventListener("afterprint", () => print(false));
