// The page: the slide on view, its position, and the colours of its classes. The address of the page
// holds slide and position.

import { Density, GRADIENT } from "./density.js";
import { address } from "./labels.js";
import { Pane } from "./pane.js";

const POLL_MS = 2000; // while a run is writing
const HASH_MS = 350; // Safari lets an address change 100 times in 30 s
const OPACITIES = [60, 100, 0, 30];
const at = (id) => document.getElementById(id);

const classes = new Map(); // by name: {color, shown}; the same for all runs
let runs = [];
let panes = [];
let leader = null; // the pane that was touched last; the other follows
let opening = 0; // counts the calls of open(), so that late answers to an earlier call are dropped
let clicked = null;

// ---- addresses

function readHash() {
  const params = new URLSearchParams(location.hash.slice(1));
  const number = (name) => (params.has(name) ? Number(params.get(name)) : NaN);
  const place = { x: number("x"), y: number("y"), zoom: number("zoom") };
  const isValid = Object.values(place).every(Number.isFinite) && place.zoom > 0;
  return { slide: params.get("slide"), compare: params.get("compare"), place: isValid ? place : null };
}

function writeHash() {
  if (!leader) return;
  const { x, y, zoom } = leader.place;
  const params = new URLSearchParams({ slide: panes[0].run.key });
  params.set("x", x.toFixed(2));
  params.set("y", y.toFixed(2));
  params.set("zoom", String(Number(zoom.toPrecision(6))));
  if (panes[1]) params.set("compare", panes[1].run.key);
  const hash = `#${String(params).replaceAll("%2F", "/")}`;
  if (hash !== location.hash) history.replaceState(null, "", hash);
}

let writing = 0;
function writeHashSoon() {
  writing ||= setTimeout(() => {
    writing = 0;
    writeHash();
  }, HASH_MS);
}

// ---- the server

async function ask(path) {
  const answer = await fetch(`api/${path}`).catch(() => {
    throw new Error("The viewer does not answer: check that histo-infer view still runs.");
  });
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

// ---- opening

async function open() {
  const mine = ++opening;
  writing = clearTimeout(writing);
  clearTimeout(polling);
  const { slide, compare, place } = readHash();
  try {
    ({ runs } = await ask("runs"));
    if (mine !== opening) return;
    const alone = runs.length === 1 ? runs[0].key : null;
    if (slide ?? alone) await openSlide(slide ?? alone, compare, place, mine);
    else showList();
  } catch (error) {
    if (mine === opening) {
      closePanes();
      show("list");
      at("list").replaceChildren();
      notice(error.message);
    }
  }
  if (mine === opening) pollLater();
}

function show(part) {
  at("list").hidden = part !== "list";
  at("view").hidden = at("tools").hidden = part !== "view";
  at("all").hidden = part === "list" || runs.length === 1;
  if (part !== "view") at("compare-label").hidden = true;
}

function closePanes() {
  for (const pane of panes) pane.close();
  panes = [];
  leader = null;
  clicked = null;
}

async function openSlide(key, compare, place, mine) {
  const keys = compare && compare !== key ? [key, compare] : [key];
  const opened = await Promise.all(keys.map((name) => ask(`run/${address(name)}`)));
  if (mine !== opening) return;
  closePanes();
  show("view");
  const sections = opened.map(() => element("section", "", "pane"));
  at("panes").append(...sections);
  panes = opened.map((run, i) => new Pane(sections[i], run, { moved, clicked: readPlace, touched }));
  leader = panes[0];
  at("differences").checked = false;
  fillDensity();
  at("place").replaceChildren(element("p", "Click the slide, or press Enter to read its centre.", "hint"));
  document.title = `${opened[0].name} - HistoStream`;
  at("title").textContent = opened[0].name;
  fillCompare();
  applyOpacity();
  applyOutline();
  showRuns();
  await Promise.all(panes.map((pane) => pane.opened));
  if (mine !== opening) return;
  if (place) for (const pane of panes) pane.goTo(place);
  writeHash();
}

// ---- while a run is writing

let polling = 0;
function pollLater() {
  clearTimeout(polling);
  const open = panes.length ? panes.map((pane) => pane.run) : runs;
  if (open.some((run) => run.status !== "done")) polling = setTimeout(poll, POLL_MS);
}

async function poll() {
  const mine = opening;
  try {
    if (panes.length) {
      for (const pane of [...panes]) {
        if (pane.run.status === "done") continue;
        const run = await ask(`run/${address(pane.run.key)}`);
        if (mine !== opening) return;
        pane.update(run);
        if (run.density) fillDensity();
      }
      notice("");
      showRuns();
    } else {
      ({ runs } = await ask("runs"));
      if (mine !== opening) return;
      showList();
    }
  } catch (error) {
    // Between the last strip and the finished files there is a moment of neither.
    if (mine === opening && !error.message.includes("nothing of it")) notice(error.message);
  }
  if (mine === opening) pollLater();
}

// ---- the list

function showList() {
  closePanes();
  show("list");
  notice("");
  document.title = "HistoStream";
  at("title").textContent = `${runs.length} slides`;
  at("list").replaceChildren(...runs.map(card));
}

function card(run) {
  const link = element("a", "", "card");
  link.href = `#slide=${address(run.key)}`;
  if (run.overview) {
    const image = element("img");
    image.src = `overview/${address(run.key)}`;
    image.alt = "";
    image.loading = "lazy";
    link.append(image);
  } else link.append(element("div", "", "blank"));
  link.append(element("h2", run.name));
  const several = new Set(runs.map((other) => other.in)).size > 1;
  const details = [several ? run.in : "", run.status === "done" ? "" : run.status, run.error ?? ""];
  link.append(element("p", details.filter(Boolean).join(", "), "status"));
  for (const { name, color, background, area_mm2, share, objects } of run.classes ?? []) {
    if (background) continue;
    const line = element("p", ` ${name} ${area(area_mm2)} mm² (${percent(share)})`);
    const dot = element("i");
    dot.style.background = color;
    line.prepend(dot);
    if (objects !== null) line.append(`, ${objects} objects`);
    link.append(line);
  }
  return link;
}

// ---- the panel

function fillCompare() {
  const [{ run }] = panes;
  const same = (other) =>
    other.key !== run.key &&
    (run.slide && other.slide ? String(run.slide) === String(other.slide) : run.name === other.name);
  const others = runs.filter(same);
  const options = [new Option("nothing", ""), ...others.map((r) => new Option(`${r.in} / ${r.name}`, r.key))];
  at("compare").replaceChildren(...options);
  at("compare").value = panes[1]?.run.key ?? "";
  at("compare-label").hidden = !others.length;
}

function showRuns() {
  const unfinished = panes.map((pane) => pane.run).find((run) => run.status !== "done");
  at("state").hidden = !unfinished;
  if (unfinished) {
    at("progress").value = unfinished.progress;
    at("status").textContent = `${unfinished.status}, ${percent(unfinished.progress)}`;
  }
  const [{ run }] = panes;
  if (!run.image) notice(`The slide is not shown: ${run.why}.`);
  for (const { run } of panes) {
    for (const { name, color, background } of run.classes) {
      if (!classes.has(name)) classes.set(name, { color, shown: !background }); // the background is hidden at first
    }
  }
  showClasses();
  applyClasses();
  at("differences-label").hidden = panes.length < 2;
}

function shownNames() {
  return [...new Set(panes.flatMap((pane) => pane.run.classes.map(({ name }) => name)))];
}

function showClasses() {
  const names = shownNames();
  const focused = document.activeElement?.id; // a poll must not take the focus away
  if (at("classes").dataset.names !== JSON.stringify(names)) {
    at("classes").dataset.names = JSON.stringify(names);
    at("classes").replaceChildren(...names.map(classRow));
  }
  const heads = panes.length > 1 ? ["mm²", "left", "right"] : ["class", "mm²", "%"];
  const head = element("tr");
  head.append(...heads.map((text) => element("th", text)));
  at("classes-head").replaceChildren(head);
  names.forEach((name, i) => {
    const row = at("classes").rows[i];
    while (row.cells.length > 1) row.deleteCell(1);
    for (const { run } of panes) {
      const entry = run.classes.find((c) => c.name === name);
      row.append(element("td", entry ? area(entry.area_mm2) : ""));
      if (panes.length === 1) row.append(element("td", entry ? percent(entry.share, "") : ""));
    }
    const { color, shown } = classes.get(name);
    row.querySelector("[type=checkbox]").checked = shown;
    row.querySelector("[type=color]").value = color;
  });
  if (focused) at(focused)?.focus();
}

function classRow(name, i) {
  const row = element("tr");
  const head = element("th");
  head.scope = "row";
  const box = element("input");
  box.type = "checkbox";
  box.id = `class-${i}`;
  box.addEventListener("change", () => setClass(name, { shown: box.checked }));
  const color = element("input");
  color.type = "color";
  color.id = `color-${i}`;
  color.ariaLabel = `Colour of ${name}`;
  color.addEventListener("input", () => setClass(name, { color: color.value }));
  const label = element("label", name);
  label.htmlFor = box.id;
  if (i < 9) label.append(" ", element("kbd", String(i + 1)));
  head.append(box, color, label);
  row.append(head);
  return row;
}

function setClass(name, change) {
  Object.assign(classes.get(name), change);
  showClasses();
  applyClasses();
}

function applyClasses() {
  for (const pane of panes) pane.colour(pane.run.classes.map(({ name }) => classes.get(name)));
}

function applyOutline() {
  for (const pane of panes) pane.outline(at("outline").checked);
}

function applyOpacity() {
  const percent = at("opacity").value;
  at("percent").value = `${percent} %`;
  for (const pane of panes) pane.fade(percent / 100);
}

// ---- two panes

function touched(pane) {
  leader = pane;
}

function moved(pane) {
  if (pane !== leader) return;
  for (const other of panes) {
    if (other === pane || !other.viewer.isOpen()) continue;
    const [here, there] = [pane.place, other.place];
    const apart = Math.max(Math.abs(here.x - there.x), Math.abs(here.y - there.y)) * here.zoom;
    if (apart > 0.01 || Math.abs(here.zoom / there.zoom - 1) > 1e-6) other.goTo(here);
  }
  writeHashSoon();
}

function compareWith(key) {
  if (!panes.length) return;
  writeHash();
  const hash = location.hash.replace(/&compare=[^&]*/, "");
  location.hash = key ? `${hash}&compare=${key}` : hash;
}

async function showDifferences() {
  const wanted = at("differences").checked && panes.length === 2;
  panes[0].compareWith(wanted ? panes[1] : null);
  panes[1]?.compareWith(wanted ? panes[0] : null);
  at("share").textContent = "";
  if (!wanted) return;
  const mine = opening;
  try {
    const difference = await ask(`difference/${panes.map((pane) => address(pane.run.key)).join("/")}`);
    const sampled = difference.every > 1 ? `, counted at every ${difference.every}th pixel` : "";
    const text = `${percent(difference.share)} of the pixels that both analysed${sampled}`;
    if (mine === opening) at("share").textContent = text;
  } catch (error) {
    if (mine === opening) at("share").textContent = error.message;
  }
}

// ---- the density of objects

let densities = 0; // counts the calls of showDensity(), so that late answers to an earlier call are dropped

function fillDensity() {
  const names = [...new Set(panes.flatMap(({ run }) => (run.density?.classes ?? []).map(({ name }) => name)))];
  at("density").replaceChildren(new Option("not shown", ""), ...names.map((name) => new Option(name, name)));
  at("density-section").hidden = !names.length;
  showDensity();
}

async function showDensity() {
  const mine = ++densities;
  const name = at("density").value;
  at("density-scale").hidden = !name;
  at("density-error").textContent = "";
  const shown = [...panes];
  try {
    const maps = await Promise.all(shown.map(({ run }) => (name && run.density ? Density.load(run, name) : null)));
    if (mine !== densities) return;
    const high = Math.max(0, ...maps.map((map) => map?.high ?? 0)); // one scale for both panes
    shown.forEach((pane, i) => pane.showDensity(maps[i], high));
    at("density-high").textContent = high.toLocaleString("en");
    at("density-bar").style.background = GRADIENT;
    const totals = shown.map(({ run }) => run.classes.find((entry) => entry.name === name)).filter(Boolean);
    at("density-total").textContent = totals.map(objectsText).filter(Boolean).join("; ");
  } catch (error) {
    if (mine === densities) at("density-error").textContent = error.message;
  }
}

function objectsText({ objects, objects_per_mm2, touching_share }) {
  if (objects === null) return "";
  const several = touching_share === null ? "" : `, ${percent(touching_share)} touching`;
  return `${objects.toLocaleString("en")} objects, ${Math.round(objects_per_mm2 ?? 0)} per mm²${several}`;
}

// ---- a pixel

async function readPlace(pane, x, y) {
  if (x < 0 || y < 0 || x >= pane.width || y >= pane.height) return;
  const mine = (clicked = {});
  const um = pane.run.mpp / pane.run.downsample;
  for (const other of panes) other.mark(x, y);
  const answers = await Promise.all(
    panes.map(async (other) => {
      const { run } = other;
      const [i, j] = [Math.floor(x / run.downsample), Math.floor(y / run.downsample)];
      const [right, bottom] = [run.width - 1, run.height - 1];
      try {
        const query = `x=${Math.min(i, right)}&y=${Math.min(j, bottom)}`;
        const density = other.density ? { name: other.density.name, per_mm2: other.density.at(x, y) } : null;
        return { run, density, ...(await ask(`place/${address(run.key)}?${query}`)) };
      } catch (error) {
        return { run, error: error.message };
      }
    }),
  );
  if (mine !== clicked) return;
  const where = `${Math.floor(x)}, ${Math.floor(y)} px; ${(x * um).toFixed(1)}, ${(y * um).toFixed(1)} µm`;
  at("place").replaceChildren(element("p", where, "where"), ...answers.flatMap(placeLines));
}

function placeLines({ run, error, label, name, scores, density }) {
  const lines = panes.length > 1 ? [element("h3", `${run.in} / ${run.name}`)] : [];
  if (error) return [...lines, element("p", error)];
  const unfinished = run.status === "done" ? "" : " or not finished";
  const text = name === null ? `not analysed${unfinished}` : `${name} (label ${label})`;
  lines.push(element("p", text, "label"));
  if (density) {
    const value = Number.isNaN(density.per_mm2) ? "too little analysed" : `${Math.round(density.per_mm2)} per mm²`;
    lines.push(element("p", `${density.name}: ${value}`, "density"));
  }
  scores?.forEach((score, i) => {
    const line = element("label", run.classes[i].name, "score");
    const meter = element("meter");
    meter.value = score;
    line.append(meter, element("span", score.toFixed(3)));
    lines.push(line);
  });
  return lines;
}

// ---- small things

function element(tag, text = "", className = "") {
  return Object.assign(document.createElement(tag), { textContent: text, className });
}

function percent(share, unit = " %") {
  return share === null ? "-" : `${(100 * share).toFixed(1)}${unit}`;
}

function area(mm2) {
  return mm2 === 0 ? "0" : mm2.toPrecision(3).includes("e") ? mm2.toExponential(1) : mm2.toPrecision(3);
}

// ---- keys and buttons

const KEYS = {
  ArrowLeft: ({ shiftKey }) => leader?.move(shiftKey ? -0.8 : -0.15, 0),
  ArrowRight: ({ shiftKey }) => leader?.move(shiftKey ? 0.8 : 0.15, 0),
  ArrowUp: ({ shiftKey }) => leader?.move(0, shiftKey ? -0.8 : -0.15),
  ArrowDown: ({ shiftKey }) => leader?.move(0, shiftKey ? 0.8 : 0.15),
  "+": () => leader?.zoomBy(1.5),
  "=": () => leader?.zoomBy(1.5),
  "-": () => leader?.zoomBy(1 / 1.5),
  0: () => leader?.home(),
  Enter: () => leader && readPlace(leader, leader.place.x, leader.place.y),
  o: nextOpacity,
  c: () => compareWith(panes[1] ? "" : (at("compare").options[1]?.value ?? "")),
  d: () => panes.length === 2 && at("differences").click(),
  h: nextDensity,
  "?": () => (at("keys").open ? at("keys").close() : at("keys").showModal()),
};

function nextOpacity() {
  const i = OPACITIES.indexOf(Number(at("opacity").value));
  at("opacity").value = OPACITIES[(i + 1) % OPACITIES.length];
  applyOpacity();
}

function nextDensity() {
  const { options, selectedIndex } = at("density");
  at("density").selectedIndex = (selectedIndex + 1) % options.length;
  showDensity();
}

function toggleClass(number) {
  const name = shownNames()[number - 1];
  if (panes.length && name !== undefined) setClass(name, { shown: !classes.get(name).shown });
}

// OpenSeadragon gives its canvas the focus when it is clicked; only keys make that visible.
document.addEventListener("pointerdown", () => document.body.classList.add("by-pointer"), true);
document.addEventListener("keydown", () => document.body.classList.remove("by-pointer"), true);

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (at("keys").open && key !== "?") return;
  const takesKeys = target.matches("select, input:not([type=checkbox])");
  if (takesKeys && (key.startsWith("Arrow") || target.matches("select"))) return;
  if (key === "Enter" && target.matches("a, button, input, select")) return;
  const act = KEYS[key] ?? (/^[1-9]$/.test(key) ? () => toggleClass(Number(key)) : null);
  if (!act || (!panes.length && key !== "?")) return;
  event.preventDefault();
  act(event);
});

at("in").addEventListener("click", () => leader?.zoomBy(1.5));
at("out").addEventListener("click", () => leader?.zoomBy(1 / 1.5));
at("home").addEventListener("click", () => leader?.home());
at("help").addEventListener("click", () => at("keys").showModal());
at("opacity").addEventListener("input", applyOpacity);
at("compare").addEventListener("change", () => compareWith(at("compare").value));
at("differences").addEventListener("change", showDifferences);
at("outline").addEventListener("change", applyOutline);
at("density").addEventListener("change", showDensity);
window.addEventListener("hashchange", open);
open();
