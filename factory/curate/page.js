// The page: a grid that fills the window, one picture at a time, and every step by a key. Text of the data set only ever
// becomes textContent. A view's order is fixed by the server, so nothing moves while someone decides.

import { Filters, byId, make, words } from "./filters.js";
import { Marks, Refusal, ask } from "./marks.js";

const PRESETS = ["does not match the prompt", "broken anatomy", "artefacts or blur", "text or watermark", "unsafe or offensive", "poor composition"];
const SIZES = ["120", "168", "248"];
const LABEL_PX = 80;
const MOST_ROWS = 400;

const state = { view: "", total: 0, at: 0, start: 0, count: 12, columns: 4, rows: new Map(), single: false, asked: 0 };
let filters, marks, about;

const current = () => state.rows.get(state.at);
const kept = {
  get: (store, key) => { try { return store.getItem(key); } catch { return null; } },
  set: (store, key, value) => { try { store.setItem(key, value); } catch { /* a private window forgets */ } },
};

async function begin() {
  document.documentElement.dataset.theme = kept.get(localStorage, "theme") || "";
  byId("size").value = kept.get(localStorage, "size") || "168";
  about = await ask("api/about");
  document.title = `Curate ${about.name}`;
  byId("name").textContent = about.name;
  byId("who").value = kept.get(localStorage, "who") || about.who;
  marks = new Marks({ changed: redraw, status: showStatus, progress: showProgress, note, who: () => byId("who").value.trim() });
  marks.number = about.number;
  showProgress(about.progress);
  filters = new Filters(about, () => look(0));
  PRESETS.forEach((reason, i) => byId("presets").append(make("li", {}, make("button", { type: "button", onclick: () => reject(reason) }, make("kbd", {}, String(i + 1)), ` ${reason}`))));
  wire();
  await look(Number(kept.get(sessionStorage, "at")) || 0);
  byId("grid").focus();
}

// Ask for the list that the filters describe and show it from row `at`.
async function look(at) {
  const mine = ++state.asked;
  document.body.classList.add("busy");
  try {
    const { view, total } = await ask("api/view", filters.read());
    if (mine !== state.asked) return;
    Object.assign(state, { view, total, rows: new Map() });
    byId("found").textContent = total === about.total ? `${total.toLocaleString()} pictures` : `${total.toLocaleString()} of ${about.total.toLocaleString()} pictures`;
    byId("nothing").hidden = total > 0;
    byId("place").max = Math.max(0, total - 1);
    await go(Math.min(at, Math.max(0, total - 1)));
  } catch (error) {
    note(`Cannot show this: ${error.message}.`);
  } finally {
    if (mine === state.asked) document.body.classList.remove("busy");
  }
}

function measure() {
  const grid = byId("grid"), size = Number(byId("size").value), style = getComputedStyle(grid);
  const inner = grid.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  const gap = parseFloat(style.columnGap) || 0;
  state.columns = Math.max(1, Math.floor((inner + gap) / (size + gap)));
  const edge = (inner + gap) / state.columns - gap;
  const tall = grid.clientHeight - parseFloat(style.paddingTop) - parseFloat(style.paddingBottom);
  state.count = Math.min(MOST_ROWS, state.columns * Math.max(1, Math.floor((tall + gap) / (edge + LABEL_PX + gap))));
  grid.style.setProperty("--columns", state.columns);
}

async function fetchRows(start, count) {
  const wanted = Math.min(count, state.total - start);
  let missing = false;
  for (let i = start; i < start + wanted; i++) missing ||= !state.rows.has(i);
  if (start < 0 || wanted <= 0 || !missing) return;
  const { rows } = await ask(`api/rows?view=${state.view}&start=${start}&count=${wanted}`);
  rows.forEach((row, i) => {
    state.rows.set(start + i, row);
    if (row.decision) marks.learn(row.decision);
  });
}

async function go(at) {
  state.at = Math.max(0, Math.min(at, state.total - 1));
  if (!state.single) measure();
  const start = Math.floor(state.at / state.count) * state.count, view = state.view;
  kept.set(sessionStorage, "at", String(state.at));
  try {
    await fetchRows(start, state.count);
    if (view !== state.view || start > state.at || state.at >= start + state.count) return; // moved on meanwhile
  } catch (error) {
    if (error instanceof Refusal && error.status === 410) return look(at); // many views later the server forgot this one
    return note(`Cannot read on: ${error.message}.`);
  }
  state.start = start;
  draw();
  if (state.rows.size > 4000) state.rows = new Map([...state.rows].filter(([i]) => Math.abs(i - state.at) < 1500));
  fetchRows(start + state.count, state.count).then(() => {
    for (let i = start + state.count; i < start + 2 * state.count; i++) if (state.rows.has(i)) new Image().src = `thumb/${state.rows.get(i).id}`;
  }, () => {});
}

function draw() {
  const cards = [];
  for (let i = state.start; i < Math.min(state.start + state.count, state.total); i++) if (state.rows.has(i)) cards.push(card(i, state.rows.get(i)));
  byId("grid").replaceChildren(...cards);
  byId("place").value = state.at;
  const last = Math.min(state.start + state.count, state.total);
  byId("where").textContent = state.total ? `${(state.start + 1).toLocaleString()}–${last.toLocaleString()} of ${state.total.toLocaleString()}` : "";
  byId("before").disabled = state.start === 0;
  byId("after").disabled = last >= state.total;
  select();
}

function card(i, row) {
  const image = make("img", { src: `thumb/${row.id}`, alt: "", decoding: "async" });
  image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth < 200));
  image.addEventListener("error", () => image.replaceWith(make("span", { className: "gone" }, row.outcome === "dead" ? "no picture: dead row" : "no picture")));
  const box = make("div", { id: `card-${i}`, className: "card", role: "option" }, make("div", { className: "frame" }, image), make("p", { className: "prompt" }), make("p", { className: "chips" }));
  box.addEventListener("click", () => { state.at = i; select(); byId("grid").focus(); });
  box.addEventListener("dblclick", () => open(true));
  dress(box, row);
  return box;
}

// The parts of a card that a decision changes.
function dress(box, row) {
  const decision = marks.of(row.id);
  box.dataset.verdict = decision?.verdict || "";
  box.querySelector(".prompt").textContent = decision?.caption || row.prompt;
  const chips = [];
  if (decision?.verdict === "keep") chips.push(chip("keep", "✓ keep"));
  if (decision?.verdict === "reject") chips.push(chip("reject", `✕ ${decision.reason}`));
  if (decision?.caption) chips.push(chip("caption", "✎ caption"));
  const score = Object.values(row.scores)[0];
  if (score != null && !chips.some((one) => one.matches(".reject, .caption"))) chips.push(chip("", score.toFixed(2)));
  if (!chips.some((one) => one.matches(".keep, .reject, .caption")) && row.outcome !== "made") chips.push(chip(row.outcome, row.outcome === "kept" ? "rules: kept" : row.reason || row.outcome));
  box.querySelector(".chips").replaceChildren(...chips);
  box.setAttribute("aria-label", `${decision?.caption || row.prompt}. ${chips.map((one) => one.textContent).join(", ")}`);
}

const chip = (kind, text) => make("span", { className: `chip ${kind}`, title: text }, text);

function select() {
  for (const box of byId("grid").children) {
    const chosen = box.id === `card-${state.at}`;
    box.setAttribute("aria-selected", String(chosen));
    if (chosen) byId("grid").setAttribute("aria-activedescendant", box.id);
  }
  byId("place").value = state.at;
  kept.set(sessionStorage, "at", String(state.at));
  if (state.single) drawSingle();
}

function drawSingle() {
  const row = current();
  if (!row) return;
  const decision = marks.of(row.id), big = byId("big");
  if (!big.src.endsWith(`picture/${row.id}`)) {
    big.hidden = row.outcome === "dead";
    big.src = `picture/${row.id}`;
    big.onload = () => big.classList.toggle("tiny", big.naturalWidth < 300);
  }
  big.alt = decision?.caption || row.prompt;
  byId("nth").textContent = `${(state.at + 1).toLocaleString()} of ${state.total.toLocaleString()}`;
  byId("single").dataset.verdict = decision?.verdict || "";
  byId("standing").textContent = decision?.verdict ? `${decision.verdict === "keep" ? "✓ Keep" : `✕ Reject: ${decision.reason}`} (${decision.who})` : "Nobody decided yet";
  if (document.activeElement !== byId("caption")) byId("caption").value = decision?.caption || row.prompt;
  byId("original").hidden = !decision?.caption;
  byId("original").textContent = `The prompt was: ${row.prompt}`;
  const facts = [["the rules said", row.reason ? `${row.outcome}: ${row.reason}` : row.outcome], ...Object.entries(row.scores).map(([name, score]) => [words(name), score == null ? "none" : score.toFixed(4)]), ["group", row.group], ...Object.entries(parsed(row.attributes)).map(([name, value]) => [words(name), String(value)]), ...cameWith(row), ["seed", String(row.seed)], ["unit", row.unit], ["id", row.id]];
  byId("facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value ?? "")]));
}

// What a taken-in picture came with; its metadata is asked for when the picture is looked at.
function cameWith(row) {
  if (row.raw_caption == null) return [];
  if (!row.more) {
    row.more = {};
    ask(`api/more?id=${row.id}`).then((more) => {
      row.more = more;
      if (state.single && current()?.id === row.id) drawSingle();
    }, () => {});
  }
  const { size = [], source, metadata = {} } = row.more;
  const known = [["came with the text", row.raw_caption], ["crop", row.crop], ["original path", row.original_path], ["original size", size[0] ? `${size[0]} × ${size[1]}` : ""], ["source", source]];
  const more = Object.entries(metadata).map(([name, value]) => [words(name), typeof value === "string" ? value : JSON.stringify(value)]);
  return [...known, ...more].filter(([, value]) => value != null && value !== "");
}

function parsed(text) {
  try { return JSON.parse(text) || {}; } catch { return {}; }
}

function redraw(id) {
  for (const box of byId("grid").children) {
    const row = state.rows.get(Number(box.id.slice(5)));
    if (row?.id === id) dress(box, row);
  }
  if (state.single && current()?.id === id) drawSingle();
}

function open(single) {
  state.single = single && state.total > 0;
  byId("single").hidden = !state.single;
  for (const id of ["grid", "pager"]) byId(id).hidden = state.single;
  if (state.single) drawSingle();
  document.activeElement.blur();
  if (!state.single) {
    byId("grid").focus();
    return go(state.at);
  }
}

async function decide(changes, onward) {
  const row = current();
  if (!row) return;
  if (row.outcome === "dead") return note("A dead row has no picture to decide about.");
  marks.mark(row.id, changes);
  if (onward && state.at < state.total - 1) await move(1);
}

const keep = () => decide({ verdict: "keep" }, true);
const unmark = () => decide({ verdict: null }, false);

function reject(reason) {
  if (byId("reasons").open) byId("reasons").close();
  if (reason.trim()) inTurn(() => decide({ verdict: "reject", reason: reason.trim() }, true));
}

function askReason() {
  if (!current() || current().outcome === "dead") return;
  byId("own").value = "";
  byId("reasons").showModal();
  byId("own").focus();
}

function editCaption() {
  if (!current() || current().outcome === "dead") return;
  if (!state.single) open(true);
  byId("caption").focus();
  byId("caption").select();
}

function saveCaption() {
  const row = current(), text = byId("caption").value.split(/\s+/).filter(Boolean).join(" ");
  const caption = text && text !== row.prompt ? text : null;
  byId("caption").blur();
  if (caption !== (marks.of(row.id)?.caption ?? null)) marks.mark(row.id, { caption });
  drawSingle();
}

async function undo() {
  const id = await marks.undo();
  const found = id && [...state.rows].find(([, row]) => row.id === id);
  if (found) await go(found[0]);
}

async function move(by) {
  const to = Math.max(0, Math.min(state.total - 1, state.at + by));
  if (to === state.at) return;
  if (to >= state.start && to < state.start + state.count && state.rows.has(to)) {
    state.at = to;
    select();
  } else await go(to);
}

function resize(step) {
  const size = byId("size");
  size.value = SIZES[Math.max(0, Math.min(2, SIZES.indexOf(size.value) + step))];
  kept.set(localStorage, "size", size.value);
  go(state.at);
}

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches, now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  kept.set(localStorage, "theme", document.documentElement.dataset.theme);
}

function showStatus(waiting, trouble) {
  byId("saved").textContent = trouble ? `${waiting ? `${waiting} not saved yet: ` : ""}${trouble}` : waiting ? "saving …" : "all saved";
  byId("saved").classList.toggle("trouble", Boolean(trouble));
}

function showProgress({ kept: keeps, rejected, captions }) {
  const decided = keeps + rejected, share = (n) => (100 * n) / Math.max(1, about.total);
  byId("counts").textContent = `${decided.toLocaleString()} of ${about.total.toLocaleString()} decided: ${keeps.toLocaleString()} keep, ${rejected.toLocaleString()} reject, ${captions.toLocaleString()} captions`;
  document.querySelector(".track").setAttribute("aria-valuenow", share(decided).toFixed(1));
  document.querySelector(".track .keep").style.width = `${share(keeps)}%`;
  document.querySelector(".track .reject").style.width = `${share(rejected)}%`;
}

let hide = 0;
function note(text) {
  byId("note").textContent = text;
  byId("note").classList.add("shown");
  clearTimeout(hide);
  hide = setTimeout(() => byId("note").classList.remove("shown"), 6000);
}

const KEYS = {
  ArrowLeft: () => move(-1), ArrowRight: () => move(1),
  ArrowUp: () => move(state.single ? -1 : -state.columns), ArrowDown: () => move(state.single ? 1 : state.columns),
  PageUp: () => move(-state.count), PageDown: () => move(state.count), Home: () => go(0), End: () => go(state.total - 1),
  Enter: () => open(!state.single), Escape: () => state.single && open(false),
  k: keep, x: askReason, r: askReason, e: editCaption, c: editCaption, u: undo, 0: unmark, Delete: unmark, Backspace: unmark,
  "/": () => byId("text").focus(), f: () => byId("people").focus(), "?": () => byId("help").showModal(),
  "+": () => resize(1), "=": () => resize(1), "-": () => resize(-1), d: theme,
  ...Object.fromEntries(PRESETS.map((reason, i) => [String(i + 1), () => reject(reason)])),
};

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  const typing = event.target.closest("input, select, textarea");
  if (typing) {
    if (event.key === "Escape") {
      typing.blur();
      event.preventDefault();
      if (typing.id === "caption") drawSingle();
      if (!state.single) byId("grid").focus();
    } else if (event.key === "Enter" && typing.id === "caption" && !event.isComposing) {
      event.preventDefault();
      saveCaption();
    }
    return;
  }
  const control = event.ctrlKey || event.metaKey;
  if (control && event.key.toLowerCase() === "z" && !event.shiftKey) return event.preventDefault(), undo();
  if (control || event.altKey || event.isComposing) return;
  // A button in focus keeps Enter for itself.
  if (event.key === "Enter" && event.target.closest("button")) return;
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (act && !(event.repeat && !event.key.startsWith("Arrow") && !event.key.startsWith("Page"))) {
    event.preventDefault();
    inTurn(act);
  }
}

// A key that comes while a page is still loading waits for it: fast fingers must neither lose a mark nor put it on another picture.
let turn = Promise.resolve(), waiting = 0;
function inTurn(act) {
  if (!waiting) {
    const done = act(); // at once, so that the next key already finds the new focus
    if (!(done instanceof Promise)) return;
    waiting += 1;
    turn = done;
  } else if (waiting < 30) {
    waiting += 1;
    turn = turn.then(act);
  } else return;
  turn = turn.catch((error) => note(error.message)).finally(() => { waiting -= 1; });
}

function wire() {
  document.addEventListener("keydown", onKey);
  const clicks = { before: () => move(-state.count), after: () => move(state.count), back: () => open(false), keep, reject: askReason, unmark, undo, theme, helper: () => byId("help").showModal(), noreason: () => byId("reasons").close() };
  for (const [id, act] of Object.entries(clicks)) byId(id).addEventListener("click", act);
  byId("place").addEventListener("change", () => go(Number(byId("place").value)));
  byId("place").addEventListener("input", () => { byId("where").textContent = `${(Number(byId("place").value) + 1).toLocaleString()} of ${state.total.toLocaleString()}`; });
  byId("size").addEventListener("change", () => { kept.set(localStorage, "size", byId("size").value); go(state.at); });
  byId("who").addEventListener("change", () => kept.set(localStorage, "who", byId("who").value.trim()));
  byId("caption").addEventListener("blur", () => state.single && drawSingle());
  byId("own").addEventListener("keydown", (event) => {
    const preset = PRESETS[Number(event.key) - 1];
    if (preset && !byId("own").value) event.preventDefault(), reject(preset);
  });
  byId("reasons").querySelector("form").addEventListener("submit", () => reject(byId("own").value));
  let timer = 0;
  new ResizeObserver(() => { clearTimeout(timer); timer = setTimeout(() => { if (!state.single) go(state.at); }, 120); }).observe(byId("grid"));
}

begin().catch((error) => note(`The page cannot start: ${error.message}`));
