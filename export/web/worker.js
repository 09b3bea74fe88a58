// Holds the models, so that the page stays awake. Asked by {kind: "open" | "draw"}; answers by progress, ready, step, picture, error.

import { denoise, embedScale, toPixels } from "./sampler.js";
import { Tokenizer } from "./tokenizer.js";

const GRAPHS = ["text_encoder", "unet", "vae_decoder"];
const state = {};

self.onmessage = async ({ data }) => {
  try {
    if (data.kind === "open") self.postMessage({ kind: "ready", ...(await open(data.backend)) });
    if (data.kind === "draw") self.postMessage({ kind: "picture", id: data.id, ...(await draw(data)) });
  } catch (error) {
    self.postMessage({ kind: "error", id: data.id, message: String(error?.message ?? error) });
  }
};

async function open(wanted) {
  state.facts = await (await get("demo.json")).json();
  state.tokenizer = new Tokenizer(await (await get("tokenizer/tokenizer.json")).json(), state.facts.tokenizer);
  const began = performance.now();
  const files = await download();
  const downloaded = performance.now();
  let note = "";
  if (wanted !== "wasm") {
    try {
      return { ...(await compile("webgpu", files)), note, download_ms: downloaded - began };
    } catch (error) {
      if (wanted === "webgpu") throw error;
      note = `WebGPU is not to be had here (${error?.message ?? error}), so this runs on the CPU.`;
    }
  }
  return { ...(await compile("wasm", files)), note, download_ms: downloaded - began };
}

async function get(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: the server says ${answer.status}`);
  return answer;
}

/** The graphs' bytes, each checked against its digest where the browser can (https and localhost). */
async function download() {
  const total = GRAPHS.reduce((sum, graph) => sum + state.facts.models[graph].bytes, 0);
  const found = {};
  let done = 0;
  for (const graph of GRAPHS) {
    const { file, bytes, sha256 } = state.facts.models[graph];
    const whole = new Uint8Array(bytes);
    let at = 0;
    const reader = (await get(file)).body.getReader();
    for (;;) {
      const { value, done: last } = await reader.read();
      if (last) break;
      if (at + value.length > bytes) throw new Error(`${file} is longer than demo.json says`);
      whole.set(value, at);
      at += value.length;
      done += value.length;
      self.postMessage({ kind: "progress", what: `fetching ${graph}`, share: (0.9 * done) / total });
    }
    if (at !== bytes || (crypto.subtle && (await hex(whole)) !== sha256)) throw new Error(`${file} is not what demo.json says`);
    found[graph] = whole;
  }
  return found;
}

async function hex(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function compile(backend, files) {
  if (backend === "webgpu" && !(await navigator.gpu?.requestAdapter())) throw new Error("no adapter");
  const began = performance.now();
  state.ort = await import(backend === "webgpu" ? "./ort/ort.webgpu.min.mjs" : "./ort/ort.wasm.min.mjs");
  state.ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
  state.ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 8) : 1;
  state.ort.env.logLevel = "error";
  const sessions = {};
  for (const [i, graph] of GRAPHS.entries()) {
    self.postMessage({ kind: "progress", what: `compiling ${graph} for ${backend}`, share: 0.9 + 0.1 * (i / GRAPHS.length) });
    sessions[graph] = await state.ort.InferenceSession.create(files[graph], { executionProviders: [backend] });
  }
  state.sessions = sessions;
  return { backend, threads: state.ort.env.wasm.numThreads, compile_ms: performance.now() - began };
}

async function run(graph, inputs) {
  const answer = await state.sessions[graph].run(inputs);
  const output = answer[state.sessions[graph].outputNames[0]];
  return { data: await output.getData(), dims: output.dims };
}

async function draw({ id, prompt, seed, guidance }) {
  const { facts, ort } = state;
  const shape = facts.latent_shape;
  const timings = { unet_ms: [] };
  const began = performance.now();
  // A graph of several pictures draws the prompt as often; the first is the seed's own, the others' noise goes on from there.
  const row = state.tokenizer.encode(prompt);
  const ids = BigInt64Array.from(Array(shape[0]).fill(row).flat(), BigInt);
  const text = await run("text_encoder", { input_ids: new ort.Tensor("int64", ids, [shape[0], row.length]) });
  timings.text_encoder_ms = performance.now() - began;
  const taken = facts.scheduler.guidance; // where guidance is fixed there is none
  const more = taken ? { guidance: new ort.Tensor("float32", embedScale(guidance ?? taken.scale, taken.width), [1, taken.width]) } : {};
  const unet = async (latent, t) => {
    const from = performance.now();
    const said = await run("unet", {
      latent: new ort.Tensor("float32", latent, shape),
      timestep: new ort.Tensor("float32", [t], [1]),
      text: new ort.Tensor("float32", text.data, text.dims),
      ...more,
    });
    timings.unet_ms.push(performance.now() - from);
    return said.data;
  };
  const count = shape.reduce((a, b) => a * b, 1);
  const steps = facts.scheduler.steps.length;
  const latent = await denoise(unet, facts.scheduler, count, seed, (done) => self.postMessage({ kind: "step", id, done, steps }));
  const from = performance.now();
  const decoded = await run("vae_decoder", { latent: new ort.Tensor("float32", latent, shape) });
  const [images, , height, width] = decoded.dims;
  const pixels = toPixels(decoded.data, width, height, images);
  timings.vae_decoder_ms = performance.now() - from;
  timings.picture_ms = performance.now() - began;
  return { pixels, width, height: height * images, one: height, timings };
}
