// The filter panel: built from what the data set holds, read into one plain object, remembered for a reload.

export function make(tag, facts = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(facts)) {
    if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...inside);
  return element;
}

export const byId = (id) => document.getElementById(id);
const SIMPLE = ["text", "people", "outcome", "reason", "group", "crop"];

export class Filters {
  constructor(about, changed) {
    this.about = about;
    this.changed = changed;
    this.descending = false;
    this.choose("outcome", about.outcomes);
    this.choose("reason", about.reasons);
    this.choose("group", about.groups);
    this.choose("crop", about.crops);
    for (const [name, range] of Object.entries(about.scores)) byId("scores").append(this.score(name, range));
    for (const [name, values] of Object.entries(about.attributes)) byId("attributes").append(this.attribute(name, values));
    byId("scores").hidden = !Object.keys(about.scores).length;
    byId("attributes").hidden = !Object.keys(about.attributes).length;
    byId("sort").append(...["plan", ...Object.keys(about.scores), "shuffle"].map((name) => new Option(words(name), name)));
    this.restore();
    let timer = 0;
    byId("filters").addEventListener("input", (event) => {
      clearTimeout(timer);
      timer = setTimeout(() => this.changed(), event.target.matches("select") ? 0 : 150); // while someone types, wait for the word
    });
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("filters").addEventListener("reset", () => setTimeout(() => this.changed()));
    byId("sort").addEventListener("change", () => this.changed());
    byId("direction").addEventListener("click", () => {
      this.descending = !this.descending;
      this.arrow();
      this.changed();
    });
    this.arrow();
  }

  choose(id, values) {
    byId(id).append(new Option(id === "outcome" ? "anything but dead" : "anything", ""), ...values.map(([value, count]) => new Option(`${value} (${count.toLocaleString()})`, value)));
    byId(id).closest("label").hidden = !values.length;
  }

  score(name, { min, max, bars }) {
    const most = Math.max(1, ...bars);
    const picture = make("div", { className: "bars", ariaHidden: "true" });
    picture.append(...bars.map((n) => {
      const bar = make("i");
      bar.style.height = `${n ? Math.max(4, (100 * Math.sqrt(n)) / Math.sqrt(most)) : 0}%`;
      return bar;
    }));
    const field = (side, hint) => make("input", {
      type: "number", step: "any", placeholder: hint, className: "bound", "data-score": name, "data-side": side, ariaLabel: `${words(name)}, ${side}`,
    });
    return make("div", { className: "score" }, make("span", {}, words(name)), picture,
      make("div", { className: "row" }, field("least", min.toFixed(2)), make("span", {}, "to"), field("most", max.toFixed(2))));
  }

  attribute(name, values) {
    const select = make("select", { "data-attribute": name });
    select.append(new Option("anything", ""), ...values.map(([value, count]) => new Option(`${value} (${count.toLocaleString()})`, value)));
    return make("label", { className: "wide" }, words(name), select);
  }

  arrow() {
    byId("direction").textContent = this.descending ? "↓ high to low" : "↑ low to high";
  }

  read() {
    const found = { scores: {}, attributes: {}, sort: byId("sort").value, descending: this.descending };
    for (const id of SIMPLE) found[id] = byId(id).value;
    for (const input of document.querySelectorAll("input.bound")) {
      if (input.value === "" || !Number.isFinite(input.valueAsNumber)) continue;
      const bounds = (found.scores[input.dataset.score] ||= [null, null]);
      bounds[input.dataset.side === "least" ? 0 : 1] = input.valueAsNumber;
    }
    for (const select of document.querySelectorAll("select[data-attribute]")) {
      if (select.value) found.attributes[select.dataset.attribute] = [select.value];
    }
    try {
      sessionStorage.setItem("filter", JSON.stringify(found));
    } catch {
      // a reload then starts without filters
    }
    return found;
  }

  restore() {
    let kept = {};
    try {
      kept = JSON.parse(sessionStorage.getItem("filter")) || {};
    } catch {
      return;
    }
    for (const id of SIMPLE) if (kept[id]) byId(id).value = kept[id];
    for (const input of document.querySelectorAll("input.bound")) {
      input.value = kept.scores?.[input.dataset.score]?.[input.dataset.side === "least" ? 0 : 1] ?? "";
    }
    for (const select of document.querySelectorAll("select[data-attribute]")) {
      select.value = kept.attributes?.[select.dataset.attribute]?.[0] || "";
    }
    if (kept.sort in { ...this.about.scores, plan: 1, shuffle: 1 }) byId("sort").value = kept.sort;
    this.descending = kept.descending === true;
  }
}

export function words(name) {
  return name.replaceAll("_", " ");
}
