// The page: asks the worker for pictures, shows how far it is and what it took.

const at = (id) => document.getElementById(id);
const waiting = new Map();
let facts = null;
let asked = 0;
const worker = new Worker("./worker.js", { type: "module" });

/** A picture from the worker: {pixels, width, height, one, timings}, `one` the height of one of the pictures that a build draws at once. `guidance`: a scale, or undefined for the build's own. `where` is the element that tells of the steps. */
function draw(prompt, seed, guidance, where) {
  const id = ++asked;
  worker.postMessage({ kind: "draw", id, prompt, seed, guidance });
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject, where }));
}

worker.onmessage = ({ data }) => {
  if (data.kind === "progress") progress(data.what, data.share);
  if (data.kind === "step") waiting.get(data.id).where.textContent = `step ${data.done} of ${data.steps}`;
  if (data.kind === "ready") ready(data);
  if (data.kind === "picture") settle(data.id, (one) => one.resolve(data));
  if (data.kind === "error") {
    trouble(data.message);
    settle(data.id, (one) => one.reject(new Error(data.message)));
  }
};
worker.onerror = (event) => trouble(event.message ?? "the worker did not start");

function settle(id, how) {
  const one = waiting.get(id);
  waiting.delete(id);
  if (one) how(one);
}

function trouble(message) {
  at("loading").hidden = true;
  at("trouble").textContent = message;
  at("trouble").hidden = false;
}

function progress(what, share) {
  at("loading").hidden = false;
  at("bar").style.width = `${100 * share}%`;
  at("bar").parentElement.setAttribute("aria-valuenow", Math.round(100 * share));
  at("doing").textContent = what;
}

function ready(opened) {
  at("loading").hidden = true;
  busy(false);
  const place = opened.backend === "webgpu" ? "WebGPU" : `WebAssembly, ${opened.threads} thread${opened.threads > 1 ? "s" : ""}`;
  const size = Object.values(facts.models).reduce((sum, model) => sum + model.bytes, 0) / 2 ** 20;
  const took = `${(opened.download_ms / 1000).toFixed(1)} s to fetch, ${(opened.compile_ms / 1000).toFixed(1)} s to compile`;
  at("facts").textContent =
    `Runs on: ${place}. ${opened.note} Model: ${facts.build}, ${size.toFixed(1)} MiB, ${took}. ` +
    `onnxruntime-web ${facts.onnxruntime_web.version} (${facts.onnxruntime_web.licence} licence).`;
  document.body.dataset.backend = opened.backend;
}

function busy(on) {
  at("draw").disabled = at("prove").disabled = on;
}

function paint(canvas, picture, label) {
  [canvas.width, canvas.height] = [picture.width, picture.height];
  canvas.getContext("2d").putImageData(new ImageData(picture.pixels, picture.width, picture.height), 0, 0);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  return canvas;
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function showTimings(timings) {
  const rows = [
    ["text encoder", timings.text_encoder_ms],
    ...timings.unet_ms.map((ms, i) => [`UNet, step ${i + 1}`, ms]),
    ["decoder", timings.vae_decoder_ms],
    ["picture", timings.picture_ms],
  ];
  at("timings").tBodies[0].replaceChildren(
    ...rows.map(([name, ms]) => {
      const row = document.createElement("tr");
      row.append(element("td", name), element("td", `${ms.toFixed(1)} ms`));
      row.lastChild.className = "n";
      return row;
    }),
  );
}

at("form").onsubmit = async (event) => {
  event.preventDefault();
  const prompt = at("prompt").value.trim();
  if (!prompt) return at("prompt").focus();
  const seed = Number(at("seed").value);
  const guidance = facts.scheduler.guidance ? Number(at("guidance").value) : undefined;
  busy(true);
  at("trouble").hidden = true;
  try {
    const picture = await draw(prompt, seed, guidance, at("caption"));
    const label = `${prompt} (seed ${seed}${guidance === undefined ? "" : `, guidance ${guidance}`})`;
    paint(at("picture"), picture, label);
    at("caption").textContent = label;
    showTimings(picture.timings);
    const small = document.createElement("figure");
    small.append(paint(document.createElement("canvas"), picture, label), element("figcaption", label));
    at("none").hidden = true;
    at("drawn").prepend(small);
    Object.assign(at("save"), { href: at("picture").toDataURL("image/png"), download: `seed-${seed}.png`, hidden: false });
    if (at("fresh").checked) at("seed").value = Math.floor(Math.random() * 2 ** 32);
  } catch {
    // trouble() has said it.
  }
  busy(false);
};

/** Decibels between RGBA pictures of one size, alpha left out; 99 stands for equal. */
function psnr(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) if (i % 4 < 3) sum += (a[i] - b[i]) ** 2;
  return sum ? 10 * Math.log10(255 ** 2 / (sum / (a.length * 0.75))) : 99;
}

at("prove").onclick = async () => {
  busy(true);
  at("verdict").textContent = "drawing";
  const found = [];
  try {
    for (const [i, one] of facts.references.entries()) {
      const figure = at("pairs").children[i];
      const picture = await draw(one.prompt, one.seed, undefined, figure.querySelector("figcaption"));
      const wanted = new OffscreenCanvas(picture.width, picture.one).getContext("2d");
      wanted.drawImage(figure.querySelector("img"), 0, 0);
      const seen = wanted.getImageData(0, 0, picture.width, picture.one).data;
      found.push(psnr(picture.pixels.subarray(0, seen.length), seen)); // of a batch the first: it has the seed
      paint(figure.querySelector("canvas"), picture, one.prompt);
      figure.querySelector("figcaption").textContent = `${found.at(-1).toFixed(1)} dB · ${one.prompt}`;
    }
    const least = Math.min(...found);
    at("verdict").textContent = least >= 35 ? `Yes: at least ${least.toFixed(1)} dB` : `No: only ${least.toFixed(1)} dB`;
    document.body.dataset.least = least;
  } catch {
    at("verdict").textContent = "not finished";
  }
  busy(false);
};

/** A field for the guidance scale; the browser itself refuses one outside the range. */
function offerGuidance({ scale, low, high }) {
  Object.assign(at("guidance"), { min: low, max: high, value: scale, disabled: false });
  at("range").textContent = `${low} to ${high}; a higher one follows the words more closely`;
  at("guided").hidden = false;
}

async function begin() {
  at("unserved").hidden = true;
  progress("reading what there is to load", 0);
  const answer = await fetch("demo.json");
  if (!answer.ok) return trouble(`demo.json: the server says ${answer.status}`);
  facts = await answer.json();
  at("prompt").value = facts.prompts[0];
  if (facts.scheduler.guidance) offerGuidance(facts.scheduler.guidance);
  at("ideas").replaceChildren(
    ...facts.prompts.slice(0, 6).map((prompt) => {
      const idea = element("button", prompt);
      idea.type = "button";
      idea.onclick = () => (at("prompt").value = prompt);
      return idea;
    }),
  );
  at("pairs").replaceChildren(
    ...facts.references.map((one) => {
      const figure = document.createElement("figure");
      const image = Object.assign(document.createElement("img"), { src: one.file, alt: `Python's picture: ${one.prompt}` });
      figure.append(image, document.createElement("canvas"), element("figcaption", `${one.prompt}, seed ${one.seed}`));
      return figure;
    }),
  );
  const wanted = new URLSearchParams(location.search).get("backend");
  worker.postMessage({ kind: "open", backend: ["wasm", "webgpu"].includes(wanted) ? wanted : "auto" });
}

begin().catch((error) => trouble(String(error?.message ?? error)));
